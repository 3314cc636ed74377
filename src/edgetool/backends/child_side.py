"""The other end of backends/child.py: runs a backend's `run(job, report)` in an interpreter that has no edgetool.

Standard library only, and as Python 3.8 reads it, since the interpreter may be anybody's:
`python -I child_side.py SCRIPT FD`. The job is one JSON object on stdin. FD takes one JSON object a line: what the
backend reports, and last its result, or how it failed. stdout and stderr belong to the backend and whatever it calls;
they go to a log.

    {"task": 1, "name": "layers", "total": 30, "unit": "layer"}  {"advance": 1, "steps": 1, "note": null}  {"end": 1}
    {"note": "..."}  {"warn": "..."}
    {"result": {...}}  {"refused": {"type": "BadInput", "message": "...", "hint": null}}  {"failed": "..."}
    {"stopped": true}
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any


class Refused(Exception):
    """One of edgetool's own errors, to be raised there: `type` is the name of a class in edgetool/errors.py."""

    def __init__(self, type: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.told = {"type": type, "message": message, "hint": hint}


class _Stop(BaseException):
    pass


class Task:
    """A bar of the caller's: `advance` as in edgetool/progress.py."""

    def __init__(self, report: Report, number: int) -> None:
        self._report = report
        self._number = number

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Count `steps` as done."""
        self._report._say({"advance": self._number, "steps": steps, "note": note})


class Report:
    """What a backend tells its caller while it runs: edgetool's Progress, and refusals."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._tasks = 0

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Task]:
        """A piece of work with `total` steps."""
        self._tasks += 1
        number = self._tasks
        self._say({"task": number, "name": name, "total": total, "unit": unit})
        yield Task(self, number)
        self._say({"end": number})

    def note(self, message: str) -> None:
        """Say one line that stays visible."""
        self._say({"note": message})

    def warn(self, message: str) -> None:
        """Say one line that the user should act on."""
        self._say({"warn": message})

    def made_by(self, package: str) -> dict[str, Any]:
        """What a quantiser's `run` returns: versions, and the most memory that this process had."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"version": version(package), "torch": version("torch"), "peak_rss_bytes": peak}

    def refuse(self, type: str, message: str, hint: str | None = None) -> None:
        """Raise one of edgetool's errors in the caller: `refuse("BadInput", "...", "...")`."""
        raise Refused(type, message, hint)

    def _say(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, default=_plain).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)  # numbers of numpy and torch; paths


def _on_sigterm(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stop


def main() -> None:
    """Run the script's `run` and report how it ended; the exit code is 0 only with a result."""
    script, descriptor = sys.argv[1], int(sys.argv[2])
    os.set_inheritable(descriptor, False)
    report = Report(descriptor)
    signal.signal(signal.SIGTERM, _on_sigterm)
    ours = os.getpid()
    try:
        job = json.loads(sys.stdin.buffer.read().decode())
        spec = importlib.util.spec_from_file_location("edgetool_backend", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["edgetool_backend"] = module  # dataclasses and pickles look for it there
        spec.loader.exec_module(module)
        end = {"result": module.run(job, report)}
    except _Stop:
        end = {"stopped": True}
    except Refused as refused:
        end = {"refused": refused.told}
    except BaseException as error:
        traceback.print_exc()
        end = {"failed": f"{type(error).__name__}: {error}"}
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            end = {"refused": {"type": "ResourceUnavailable", "message": f"out of memory: {error}", "hint": None}}
    if os.getpid() != ours:  # a forked worker that has come out here must not speak for the job
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    report._say(end)
    sys.exit(0 if "result" in end else 1)


if __name__ == "__main__":
    main()
