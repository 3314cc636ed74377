"""Hub snapshots: Hugging Face's own client against a small server of ours, ModelScope's behind a stand-in."""

import json
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from edgetool.checkpoints.hubs import fetch_huggingface, fetch_modelscope
from edgetool.errors import BadInput, EdgetoolError, MissingDependency, ResourceUnavailable
from edgetool.progress import NullProgress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/consolidated.00.pth": b"and again",
    "onnx/model.safetensors": b"and again",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "tokenizer.model": b"x",
    "image.png": b"x",
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a snapshot needs, for one repository: org/name."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/org/name/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in FILES]
            return self._send(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        if path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": sha1(d).hexdigest()} for n, d in FILES.items()]
            return self._send(json.dumps(tree).encode())
        if path.startswith("/api/models/org/gated"):
            return self._send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/org/name/resolve/"):
            data = FILES[path.split("/", 5)[5]]
            return self._send(data, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data).hexdigest()}"'})
        return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    _Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys
from edgetool.checkpoints.hubs import fetch_huggingface
from edgetool.errors import EdgetoolError
from edgetool.progress import NullProgress
name, revision, offline = json.loads(sys.argv[1])
try:
    path, commit = fetch_huggingface(name, revision, None, offline, NullProgress())
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    print(json.dumps({"commit": commit, "files": files}))
except EdgetoolError as error:
    print(json.dumps({"error": error.type_name, "message": error.message, "hint": error.hint}))
"""


def _fetch(endpoint: str, home: Path, name: str, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """In a process of its own, since the client reads its environment when it is imported."""
    environ = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PATH": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", FETCH, json.dumps([name, revision, offline])]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_snapshot_has_safetensors_and_side_files_and_is_then_there_offline(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert _fetch(endpoint, tmp_path, "org/name") == {"commit": COMMIT, "files": wanted}
    assert not [line for line in _Hub.asked if ".bin" in line or "consolidated" in line or "onnx" in line]
    asked = len(_Hub.asked)
    assert _fetch(endpoint, tmp_path, "org/name", offline=True)["files"] == wanted
    assert len(_Hub.asked) == asked


@pytest.mark.parametrize(
    ("name", "revision", "error", "message"),
    [
        ("org/absent", None, "BadInput", "no such repository"),
        ("org/name", "v9", "BadInput", "no revision 'v9'"),
        ("org/gated", None, "BadInput", "gated"),
    ],
)
def test_the_hubs_refusals_are_told_apart(
    hub: ThreadingHTTPServer, tmp_path: Path, name: str, revision: str | None, error: str, message: str
) -> None:
    answer = _fetch(f"http://127.0.0.1:{hub.server_port}", tmp_path, name, revision)
    assert answer["error"] == error
    assert message in answer["message"]
    assert answer["hint"]


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_or_a_cache_the_way_out_is_named(tmp_path: Path, offline: bool) -> None:
    answer = _fetch("http://127.0.0.1:9", tmp_path, "org/name", offline=offline)  # port 9: nobody listens
    assert answer["error"] == "ResourceUnavailable"
    assert "hf download org/name" in answer["hint"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(28, "No space left on device"), ResourceUnavailable),
        (OSError(104, "Connection reset by peer"), ResourceUnavailable),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), ResourceUnavailable),
        # of whichever HTTP library this release of the hub's stands on
        (errors.HTTPError("peer closed connection without sending complete message body"), ResourceUnavailable),
    ],
)
def test_failures_on_the_way_become_errors_a_user_can_act_on(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[EdgetoolError]
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind) as caught:
        fetch_huggingface("org/name", None, None, False, NullProgress())
    assert caught.value.hint


def test_a_repository_of_pickled_weights_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(BadInput, match="no safetensors weights"):
        fetch_huggingface("org/name", None, None, False, NullProgress())


@pytest.mark.parametrize(
    ("module", "fetch"), [("huggingface_hub", fetch_huggingface), ("modelscope", fetch_modelscope)]
)
def test_a_missing_package_comes_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, module: str, fetch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=module) as caught:
        fetch("org/name", None, None, False, NullProgress())
    assert caught.value.hint == "pip install 'edgetool[hub]'"


class _ModelScope(types.ModuleType):
    """Stand-in for the package: answers with a directory or raises."""

    def __init__(self, answer: Path | Exception) -> None:
        super().__init__("modelscope")
        self.answer = answer
        self.calls: list[dict[str, Any]] = []
        self.HubApi = object

    def snapshot_download(self, name: str, **arguments: Any) -> str:
        self.calls.append({"name": name, **arguments})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_modelscope_is_asked_for_safetensors_of_the_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    scope = _ModelScope(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", scope)
    assert fetch_modelscope("org/name", "v1", None, True, NullProgress()) == (tmp_path, "v1")
    [call] = scope.calls
    assert (call["name"], call["revision"], call["local_files_only"]) == ("org/name", "v1", True)
    assert "*.safetensors" in call["allow_file_pattern"]


@pytest.mark.parametrize(
    ("failure", "offline", "kind"),
    [
        (ValueError("Cannot find the requested files in the cached path"), True, ResourceUnavailable),
        (RuntimeError("The request model: org/name does not exist!"), False, BadInput),
        (ConnectionError("unreachable"), False, ResourceUnavailable),
        (OSError(28, "No space left on device"), False, ResourceUnavailable),
    ],
)
def test_modelscopes_failures_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, offline: bool, kind: type[EdgetoolError]
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", _ModelScope(failure))
    with pytest.raises(kind) as caught:
        fetch_modelscope("org/name", None, None, offline, NullProgress())
    assert caught.value.hint
