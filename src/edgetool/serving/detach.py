"""`serve-gpu --detach`: the same command in a session of its own, whose start is followed until it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from edgetool import errors
from edgetool.config import SECTIONS, Config, key_of
from edgetool.errors import BackendFailed
from edgetool.progress import Progress
from edgetool.serving.secrets import choose_key

_LOOK_S = 0.1
_STOP_LIMIT_S = 30.0


def serve_detached(config: Config, progress: Progress) -> dict[str, Any]:
    """Start it and return its result once it is ready; it stays when this process ends.

    Raises what it failed with; nothing of it runs then.
    """
    key = choose_key(config, progress)
    directory = config.serve_gpu.state_dir
    (directory / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    with _settings_file(config, directory) as settings, _log_file(directory) as (log, sink):
        child = subprocess.Popen(
            [sys.executable, "-m", "edgetool", "serve-gpu", "--config", str(settings), "--json", "--progress", "json"],
            env=_environment(config, key.text),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
        )
        try:
            result = _wait(child, log, progress)
        except BaseException:
            _end(child)
            raise
    result["supervisor_log"] = str(log)
    return {**result, "api_key": key.text if key.generated else None}


def _wait(child: subprocess.Popen[bytes], log: Path, progress: Progress) -> dict[str, Any]:
    """Its document, which is all that it writes to stdout; meanwhile its progress is passed on."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    text, said = b"", 0
    while True:
        ended = child.poll() is not None
        text += child.stdout.read() or b""
        lines = log.read_text(errors="replace").splitlines()
        for line in lines[said:]:
            _relay(line, progress)
        said = len(lines)
        with contextlib.suppress(ValueError):
            document = json.loads(text)
            return _judge(document)
        if ended:
            tail = "\n".join(lines[-20:])
            raise BackendFailed(f"the detached server ended with {child.returncode}; log: {log}\n{tail}")
        time.sleep(_LOOK_S)


def _judge(document: dict[str, Any]) -> dict[str, Any]:
    if document.pop("ok", False):
        document.pop("schema", None)
        return document
    kind = getattr(errors, str(document.get("type")), BackendFailed)
    raise kind(str(document.get("message")), document.get("hint"))


def _relay(line: str, progress: Progress) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        return
    kind = event.get("event") if isinstance(event, dict) else None
    if kind == "warning":
        progress.warn(event["message"])
    elif kind == "note":
        progress.note(event["message"])
    elif kind in ("start", "progress") and event.get("task"):
        progress.note(": ".join(filter(None, [event["task"], event.get("note")])))


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()  # the guards of its processes end them


def _environment(config: Config, key: str) -> dict[str, str]:
    """Secrets by the environment, all other settings by the file; what the file says must not be said twice."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGETOOL_")}
    token = config.common.token()
    return {**kept, "EDGETOOL_API_KEY": key, **({"EDGETOOL_HUB_TOKEN": token} if token else {})}


@contextlib.contextmanager
def _settings_file(config: Config, directory: Path) -> Iterator[Path]:
    """All settings that are not defaults, as a file for `--config` (JSON is YAML), without secrets."""
    tables: dict[str, dict[str, Any]] = {}
    for name, section in SECTIONS.items():
        values = getattr(config, name)
        dumped = values.model_dump(mode="json")
        for attribute, field in section.model_fields.items():
            key = key_of(attribute, field)
            if f"{name}.{key}" in config.origins and not isinstance(getattr(values, attribute), SecretStr):
                tables.setdefault(name, {})[key] = dumped[attribute]
    for key in ("json", "progress"):
        tables.get("common", {}).pop(key, None)
    tables.setdefault("serve_gpu", {})["detach"] = False
    handle, path = tempfile.mkstemp(prefix="detached-", suffix=".yaml", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(tables, file)
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _log_file(directory: Path) -> Iterator[tuple[Path, int]]:
    handle, path = tempfile.mkstemp(prefix="detached-", suffix=".log", dir=directory / "logs")
    try:
        yield Path(path), handle
    finally:
        os.close(handle)
