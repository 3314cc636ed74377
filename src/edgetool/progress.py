"""What long jobs say about themselves while they run.

A job takes a `Progress` and never knows whether a terminal, a log file or a JSON reader is at the other end.
Standard library only; the versions that print live in console.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Task(Protocol):
    """One bar: a named piece of work with a known number of steps."""

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Count `steps` as done; `note` replaces the short text behind the bar."""


class Steps(Protocol):
    """One view of several commands that follow each other, a row each."""

    def state(self, name: str, state: str, note: str = "") -> None:
        """A step is now waiting, running, unchanged, done, failed, stopped ...; `note`: what else to know of it."""

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        """How far a running step has come in one of its own tasks."""


class Progress(Protocol):
    """Sink for the progress of one command."""

    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Any:
        """Context manager that yields a `Task` of `total` steps (`unit` names a step: "layer", "B", ...).

        `before`: steps that an earlier run has done; they count as done, but not for the time that is left.
        """

    def steps(self, names: Sequence[str]) -> Any:
        """Context manager that yields `Steps` for steps of these names, all of them waiting."""

    def note(self, message: str) -> None:
        """Say one line that stays visible: a phase that starts, a fact worth knowing."""

    def warn(self, message: str) -> None:
        """Say one line the user should act on or know when judging the result."""


class _NullTask:
    def advance(self, steps: float = 1, note: str | None = None) -> None:
        return None


class _NullSteps:
    def state(self, name: str, state: str, note: str = "") -> None:
        return None

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        return None


class NullProgress:
    """Says nothing."""

    @contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[Steps]:
        yield _NullSteps()

    @contextmanager
    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Iterator[Task]:
        yield _NullTask()

    def note(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None


@dataclass
class RecordingProgress:
    """Keeps everything in `events` as (kind, text, value) tuples, for tests and for reports."""

    events: list[tuple[str, str, float]] = field(default_factory=list)

    @contextmanager
    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Iterator[Task]:
        self.events.append(("start", name, total))
        yield _RecordingTask(self, name)
        self.events.append(("end", name, total))

    @contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[Steps]:
        yield _RecordingSteps(self)

    def note(self, message: str) -> None:
        self.events.append(("note", message, 0.0))

    def warn(self, message: str) -> None:
        self.events.append(("warn", message, 0.0))


@dataclass
class _RecordingTask:
    owner: RecordingProgress
    name: str

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.owner.events.append(("advance", self.name, steps))


@dataclass
class _RecordingSteps:
    owner: RecordingProgress

    def state(self, name: str, state: str, note: str = "") -> None:
        self.owner.events.append((state, name, 0.0))

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        self.owner.events.append(("advance", f"{name}: {task}", done))


class TeeProgress:
    """Says everything to several others."""

    def __init__(self, *sinks: Progress) -> None:
        self.sinks = sinks

    @contextmanager
    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Iterator[Task]:
        with ExitStack() as held:
            yield _TeeTask([held.enter_context(sink.task(name, total, unit, before)) for sink in self.sinks])

    @contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[Steps]:
        with ExitStack() as held:
            yield _TeeSteps([held.enter_context(sink.steps(names)) for sink in self.sinks])

    def note(self, message: str) -> None:
        for sink in self.sinks:
            sink.note(message)

    def warn(self, message: str) -> None:
        for sink in self.sinks:
            sink.warn(message)


@dataclass
class _TeeTask:
    tasks: list[Task]

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        for task in self.tasks:
            task.advance(steps, note)


@dataclass
class _TeeSteps:
    views: list[Steps]

    def state(self, name: str, state: str, note: str = "") -> None:
        for view in self.views:
            view.state(name, state, note)

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        for view in self.views:
            view.advance(name, task, done, total, unit, note)
