"""Backends in another interpreter: the job goes in, progress and a result come out, and every failure has a name."""

from __future__ import annotations

import ast
import gc
import os
import secrets
import shutil
import sys
import threading
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetool.backends import child_side
from edgetool.backends.child import run
from edgetool.backends.environments import RECIPES, Interpreter
from edgetool.errors import BackendFailed, BadInput, EdgetoolError, ResourceUnavailable, Stopped
from edgetool.process.tree import TREE_VARIABLE, carriers
from edgetool.progress import NullProgress, RecordingProgress
from tests.interpreters import interpreter_of

SCRIPT = Path(__file__).parents[2] / "fakes" / "backend_job.py"
REFUSALS = ["BadInput", "ConfigError", "MissingDependency", "ResourceUnavailable", "VerificationFailed"]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """A Python in which edgetool is not installed."""
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=False)
    return Interpreter(place / "bin" / "python", ())


@pytest.fixture
def call(interpreter: Interpreter, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def call(do: str, progress: Any = None, how: dict[str, Any] | None = None, **job: Any) -> dict[str, Any]:
        log = tmp_path / "work" / "backend.log"
        return run(interpreter, SCRIPT, {"do": do, **job}, log=log, progress=progress or NullProgress(), **(how or {}))

    return call


def test_a_job_is_run_by_the_other_interpreter_which_has_no_edgetool(
    call: Callable[..., dict[str, Any]], interpreter: Interpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETOOL_QUANTIZE_BITS", "4")
    monkeypatch.setenv("PYTHONPATH", "/nonsense")
    told = call("describe", how={"env": {"FROM_CALLER": "x"}}, key="s3cret", text="жж\n")
    assert told["python"] == str(interpreter.python)
    assert told["modules"] == []
    assert told["environment"] == {
        "EDGETOOL_QUANTIZE_BITS": None, "PYTHONPATH": None, "FROM_CALLER": "x", "HOME": os.environ.get("HOME")
    }  # fmt: skip
    assert told["job"] == {"do": "describe", "key": "s3cret", "text": "жж\n"}
    assert "s3cret" not in told["arguments"]
    assert (told["cwd"], told["stdin"], told["descriptor"]) == (str(tmp_path / "work"), "", False)


def test_all_that_is_printed_goes_to_the_log(
    call: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call("describe")
    text = (tmp_path / "work" / "backend.log").read_text()
    assert text == "the backend talks on stdout\nand a child of it on stderr\n"
    assert capfd.readouterr() == ("", "")


def test_progress_is_handed_on_and_large_results_arrive_whole(call: Callable[..., dict[str, Any]]) -> None:
    progress = RecordingProgress()
    result = call("progress", progress, length=3_000_000)
    assert result == {"text": "ж" * 3_000_000}
    assert progress.events == [
        ("note", "a note", 0.0),
        ("start", "layers", 3),
        ("advance", "layers", 1),
        ("advance", "layers", 1),
        ("advance", "layers", 1),
        ("warn", "a warning", 0.0),
        ("end", "layers", 3),
    ]


def test_what_json_cannot_say_becomes_text(call: Callable[..., dict[str, Any]]) -> None:
    assert call("odd")["unfit"] == "{1, 2}"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_raised_here_as_the_error_it_names(call: Callable[..., dict[str, Any]], name: str) -> None:
    with pytest.raises(EdgetoolError, match=r"^what was wrong$") as refused:
        call("refuse", type=name)
    assert (refused.value.type_name, refused.value.hint) == (name, "what to do")


@pytest.mark.parametrize("name", ["NoSuchError", "EXIT_CODES", "Any"])
def test_a_refusal_by_no_error_of_ours_is_a_failed_backend(call: Callable[..., dict[str, Any]], name: str) -> None:
    with pytest.raises(BackendFailed, match=f"{name}: what was wrong"):
        call("refuse", type=name)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("raise", "ValueError: a value that a library did not like"),
        ("exit", "SystemExit: 3"),
        ("vanish", r"without a result \(exit code 4\)"),
        ("killed", r"without a result \(killed by SIGKILL\)"),
    ],
)
def test_a_failure_shows_the_log_and_its_last_lines(
    call: Callable[..., dict[str, Any]], tmp_path: Path, do: str, said: str
) -> None:
    with pytest.raises(BackendFailed, match=f"backend_job .*{said}") as failed:
        call(do)
    assert f"log: {tmp_path / 'work' / 'backend.log'}" in failed.value.message
    assert "and a child of it on stderr" in failed.value.message
    assert (do == "killed") == ("memory" in (failed.value.hint or ""))


def test_a_traceback_of_the_backend_is_in_the_log(call: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(BackendFailed):
        call("raise")
    assert 'raise ValueError("a value that a library did not like")' in (tmp_path / "work" / "backend.log").read_text()


def test_memory_that_runs_out_is_a_resource(call: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ResourceUnavailable, match="out of memory: cannot allocate 3 TiB"):
        call("memory")


def test_a_result_counts_though_the_interpreter_fails_at_its_end(call: Callable[..., dict[str, Any]]) -> None:
    progress = RecordingProgress()
    assert call("die after", progress) == {"kept": True}
    assert [text for kind, text, _ in progress.events if kind == "warn" and "SIGSEGV" in text]


@pytest.mark.parametrize(("do", "grace_s", "unwound"), [("sleep", 60.0, True), ("stubborn", 0.3, False)])
def test_a_stop_ends_the_backend_and_all_it_has_started(
    call: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    do: str,
    grace_s: float,
    unwound: bool,
) -> None:
    token = f"test-{secrets.token_hex(8)}"  # the same test may run beside this one
    monkeypatch.setenv(TREE_VARIABLE, token)
    stop = threading.Event()

    class WhenAsleep(NullProgress):
        def note(self, message: str) -> None:
            stop.set()

    with pytest.raises(Stopped):
        call(do, WhenAsleep(), {"stop": stop, "grace_s": grace_s}, mark=str(tmp_path / "mark"))
    assert carriers(token) == set()
    assert (tmp_path / "mark").exists() == unwound


def test_an_exception_here_ends_the_backend_too(
    call: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"test-{secrets.token_hex(8)}"
    monkeypatch.setenv(TREE_VARIABLE, token)

    class Interrupting(NullProgress):
        def note(self, message: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("sleep", Interrupting(), mark=str(tmp_path / "mark"))
    assert carriers(token) == set()


def test_a_script_that_is_not_there_is_a_failed_backend(interpreter: Interpreter, tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="FileNotFoundError"):
        run(interpreter, tmp_path / "absent.py", {}, log=tmp_path / "log", progress=NullProgress())


def test_no_file_descriptor_stays_open(call: Callable[..., dict[str, Any]]) -> None:
    def open_descriptors() -> int:
        gc.collect()  # what tests before this one have left to it
        return len(list(Path("/proc/self/fd").iterdir()))

    call("odd")
    before = open_descriptors()
    call("odd")
    with pytest.raises(BadInput):
        call("refuse", type="BadInput")
    assert open_descriptors() == before


def test_the_side_that_is_sent_along_is_python_3_8_and_standard_library() -> None:
    source = Path(child_side.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names) | {"__future__"}


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
def test_other_pythons_run_it(version: str, tmp_path: Path) -> None:
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    found = [name for name in candidates if name and os.system(f"{name} -c '' 2>/dev/null") == 0]
    if not found:
        pytest.skip(f"no Python {version} on this machine")
    progress = RecordingProgress()
    there = Interpreter(Path(found[0]), ())
    assert run(there, SCRIPT, {"do": "progress", "length": 2}, log=tmp_path / "log", progress=progress)["text"] == "жж"
    assert len(progress.events) == 7


@pytest.mark.backends
def test_a_real_backend_answers_from_its_environment(tmp_path: Path) -> None:
    script = tmp_path / "versions.py"
    script.write_text(
        "def run(job, report):\n"
        "    import gptqmodel, torch\n"
        "    return {'version': gptqmodel.__version__, 'sum': torch.full((job['size'],), 0.5).sum()}\n"
    )
    interpreter = Interpreter(interpreter_of("gptqmodel", "EDGETOOL_GPTQMODEL_PYTHON"), ())
    result = run(interpreter, script, {"size": 6}, log=tmp_path / "log", progress=NullProgress())
    assert result == {"version": RECIPES["gptqmodel"].pins()["gptqmodel"], "sum": 3.0}
    assert (tmp_path / "log").read_text()  # its banner, which is not ours to show
