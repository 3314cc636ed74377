"""One command of the command line as a supervised child: its progress passed on, its one document read."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool import errors
from edgetool.errors import BackendFailed, EdgetoolError, Stopped
from edgetool.pipeline.command_line import for_a_step, inserted
from edgetool.pipeline.recipe import Step
from edgetool.process.child import Child, describe
from edgetool.progress import Progress, Steps

PROGRAM = [sys.executable, "-m", "edgetool"]
"""The command line itself."""

_LOOK_S = 0.25
_TASK_EVENTS = {"start", "progress", "heartbeat", "done"}
_STOPPED_CODES = (75, 130, 143)


@dataclass
class Said:
    """Passes on what a step says on its stderr, one JSON event a line; what is no event is only in its log."""

    step: Step
    view: Steps
    progress: Progress
    warnings: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        """Pass one line on."""
        try:
            event = json.loads(text)
            kind = event["event"]
            if kind in _TASK_EVENTS and "task" in event:
                note = event.get("note") or ""
                self.view.advance(self.step.name, event["task"], event["done"], event["total"], event["unit"], note)
            elif kind == "note":
                self.progress.note(f"{self.step.name}: {event['message']}")
            elif kind == "warning":
                self.warnings.append(event["message"])
                self.progress.warn(f"{self.step.name}: {event['message']}")
        except (ValueError, KeyError, TypeError):
            return


@dataclass(frozen=True)
class Ended:
    """How a step ended. document: its JSON document, without schema and ok."""

    exit_code: int
    document: dict[str, Any]
    seconds: float
    warnings: tuple[str, ...]


class RunningStep:
    """A step that runs. As a context manager its whole tree is ended at the end of the block."""

    def __init__(self, words: Sequence[str], said: Said, log: Path, environment: Mapping[str, str]) -> None:
        self.said = said
        self._started_s = time.monotonic()
        self._out = os.memfd_create("edgetool-step", os.MFD_CLOEXEC)
        try:
            command = [*PROGRAM, *inserted(words, ["--json", "--progress", "json"])]
            self.child = Child.start(command, log=log, env={**os.environ, **environment}, stdout=self._out)
        except BaseException:
            os.close(self._out)
            raise

    def wait(self, stop: threading.Event) -> Ended:
        """Wait for its end; when `stop` is set it is asked to end in order."""
        asked = False
        while (code := self.child.wait(_LOOK_S, self.said.line)) is None:
            if stop.is_set() and not asked:
                asked = True
                self.child.send_signal(signal.SIGTERM)
                self.said.view.state(self.said.step.name, "stopping")
        document = self.document()
        if document is None:
            if code in (-signal.SIGTERM, -signal.SIGINT):
                raise Stopped(f"step {self.said.step.name} was stopped")
            failure = self.child.failure(f"step {self.said.step.name} ended without a result ({describe(code)})")
            if code == -signal.SIGKILL:
                failure.hint = "the kernel kills processes like this when memory runs out (see `dmesg`)"
            raise failure
        seconds = time.monotonic() - self._started_s
        return Ended(code, document, round(seconds, 3), tuple(self.said.warnings))

    def wait_ready(self, stop: threading.Event) -> dict[str, Any]:
        """Wait for the document of a server, which it prints when it answers.

        Raises what it failed with, or Stopped.
        """
        while (document := self.document()) is None:
            if stop.is_set():
                raise Stopped(f"stopped on request while {self.said.step.name} started")
            if self.child.wait(_LOOK_S, self.said.line) is not None:
                ended = self.wait(stop)
                raise failure_of(self.said.step, ended.exit_code, ended.document)
        if not document.pop("ok", True):
            ended = self.wait(stop)
            raise failure_of(self.said.step, ended.exit_code, ended.document)
        return document

    def document(self) -> dict[str, Any] | None:
        """What it has printed, None while that is no whole document."""
        text = os.pread(self._out, os.fstat(self._out).st_size, 0)
        try:
            document = json.loads(text)
        except ValueError:
            return None
        return document if isinstance(document, dict) else None

    def __enter__(self) -> RunningStep:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.child.__exit__(None, None, None)
        finally:
            os.close(self._out)


def run_step(
    words: Sequence[str], said: Said, log: Path, environment: Mapping[str, str], stop: threading.Event
) -> Ended:
    """Run a command to its end, whatever that is; the document tells. Nothing of it runs when this returns."""
    with RunningStep(words, said, log, environment) as running:
        ended = running.wait(stop)
    ended.document.pop("schema", None)
    ended.document.pop("ok", None)
    return ended


def failure_of(step: Step, exit_code: int, document: Mapping[str, Any]) -> EdgetoolError:
    """The error that a step has ended with, as an error of the run."""
    message = f"step {step.name}: {document.get('message')}"
    hint = document.get("hint")
    if exit_code in _STOPPED_CODES:
        return Stopped(message)
    kind = getattr(errors, str(document.get("type")), None)
    make: Callable[..., EdgetoolError] = BackendFailed
    if isinstance(kind, type) and issubclass(kind, EdgetoolError):
        make = kind
    return make(message, None if hint is None else for_a_step(str(hint), step.name, step.command))
