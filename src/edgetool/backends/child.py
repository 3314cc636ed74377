"""Calling a backend that lives in another interpreter: a JSON job in, progress and one JSON result out.

What runs there is one Python file with `run(job, report) -> dict`, which may import what that interpreter has, and
nothing of edgetool; backends/child_side.py carries the messages. All it starts is supervised (process/child.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetool import errors
from edgetool.backends import child_side
from edgetool.backends.environments import Interpreter, use
from edgetool.config import EnvsConfig
from edgetool.errors import EdgetoolError, Stopped
from edgetool.process.child import GRACE_S, Child, describe
from edgetool.progress import Progress, Task

_LOOK_S = 0.1
_EXIT_LIMIT_S = 30.0
_ENDS = ("result", "refused", "failed", "stopped")


def run_in(
    environment: str,
    script: Path,
    job: Mapping[str, Any],
    settings: EnvsConfig,
    *,
    log: Path,
    progress: Progress,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stop: threading.Event | None = None,
    grace_s: float = GRACE_S,
) -> dict[str, Any]:
    """`run` in one of the environments of `edgetool envs`, which cannot be removed meanwhile.

    Raises:
        MissingDependency: the environment is not installed, or not up to date.
        EdgetoolError: as `run`.
    """
    with use(environment, settings) as interpreter:
        return run(
            interpreter,
            script,
            job,
            log=log,
            progress=progress,
            env=env,
            pass_fds=pass_fds,
            stop=stop,
            grace_s=grace_s,
        )


def run(
    interpreter: Interpreter,
    script: Path,
    job: Mapping[str, Any],
    *,
    log: Path,
    progress: Progress,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    stop: threading.Event | None = None,
    grace_s: float = GRACE_S,
) -> dict[str, Any]:
    """Run `script`'s `run(job, report)` in another interpreter and return what it returns.

    Args:
        job: anything JSON can say; it may hold secrets, since it is on no command line and in no file.
        log: takes all that the backend prints. Its directory is the working directory, for what backends drop there.
        env: variables besides those of this process, such as `Lease.environment()`.
        pass_fds: descriptors to inherit, such as `Lease.fds`.
        stop: when it is set, the backend is asked to end (SIGTERM) and, after `grace_s`, killed.

    Raises:
        BackendFailed: it failed or was killed; the message has its last lines and the path of the log.
        Stopped: it ended because `stop` was set.
        EdgetoolError: what the backend refused, as `report.refuse(type, message, hint)` said it.
    """
    end: dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        held.callback(os.close, reader)
        with os.fdopen(writer, "wb"), os.fdopen(_readable(json.dumps(job)), "rb") as told:
            child = Child.start(
                [interpreter.python, "-I", child_side.__file__, script.absolute(), str(writer)],
                log=log,
                env=_environment(env or {}),
                cwd=log.absolute().parent,
                stdin=told.fileno(),
                pass_fds=(writer, *interpreter.fds, *pass_fds),
            )
        held.enter_context(child)
        messages = _Messages(reader, progress)
        held.callback(messages.close)
        asked = False
        while child.poll() is None and not end:
            end = messages.read(_LOOK_S)
            if stop is not None and stop.is_set():
                asked = True
                child.stop(grace_s)
        code = child.wait(_EXIT_LIMIT_S)
        end = end or messages.read(0.0)
        if asked and "result" not in end:
            raise Stopped(f"{script.stem} was stopped; log: {log}")
        if "result" not in end:
            raise _error(end, script.stem, child, code)
        if code != 0:
            how = "did not end" if code is None else describe(code)
            progress.warn(f"{script.stem} gave its result, and then failed to end well ({how}); log: {log}")
    result: dict[str, Any] = end["result"]
    return result


def _readable(text: str) -> int:
    """A descriptor to read `text` from, which is on no disk."""
    descriptor = os.memfd_create("edgetool-job", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as stream:
        stream.write(text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    # settings of edgetool and of our own interpreter mean nothing there
    ours = ("EDGETOOL_", "PYTHON", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)}, **extra}


def _error(end: Mapping[str, Any], name: str, child: Child, code: int | None) -> EdgetoolError:
    refused = end.get("refused")
    if refused:
        kind = getattr(errors, str(refused["type"]), None)
        if isinstance(kind, type) and issubclass(kind, EdgetoolError):
            return kind(str(refused["message"]), refused["hint"])
        return child.failure(f"{name} failed: {refused['type']}: {refused['message']}")
    if "failed" in end:
        return child.failure(f"{name} failed: {end['failed']}")
    how = "it does not end" if code is None else describe(code)
    failure = child.failure(f"{name} ended without a result ({how})")
    if code == -9:
        failure.hint = "the kernel kills processes like this when memory runs out (see `dmesg`)"
    return failure


class _Messages:
    """What the child says, handed on to a Progress until it says how it ended."""

    def __init__(self, reader: int, progress: Progress) -> None:
        os.set_blocking(reader, False)
        self._reader = reader
        self._progress = progress
        self._rest = b""
        self._open: dict[int, tuple[contextlib.ExitStack, Task]] = {}

    def read(self, timeout_s: float) -> dict[str, Any]:
        """Hand on what comes within the time; returns the message that ends the job, or {}."""
        if not select.select([self._reader], [], [], timeout_s)[0]:
            return {}
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._reader, 1 << 16):
                self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if any(kind in message for kind in _ENDS):
                return dict(message)
            self._hand_on(message)
        return {}

    def _hand_on(self, message: Mapping[str, Any]) -> None:
        if "task" in message:
            stack = contextlib.ExitStack()
            task = stack.enter_context(self._progress.task(message["name"], message["total"], message["unit"]))
            self._open[message["task"]] = (stack, task)
        elif "advance" in message and message["advance"] in self._open:
            self._open[message["advance"]][1].advance(message["steps"], message["note"])
        elif "end" in message and message["end"] in self._open:
            self._open.pop(message["end"])[0].close()
        elif "note" in message:
            self._progress.note(str(message["note"]))
        elif "warn" in message:
            self._progress.warn(str(message["warn"]))

    def close(self) -> None:
        """End the tasks that the child has not ended."""
        for stack, _ in reversed(list(self._open.values())):
            stack.close()
        self._open.clear()
