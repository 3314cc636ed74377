"""What long jobs say about themselves while they run.

A job takes a `Progress` and never knows whether a terminal, a log file or a JSON reader is at the other end.
Standard library only; the versions that print live in console.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Task(Protocol):
    """One bar: a named piece of work with a known number of steps."""

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Count `steps` as done; `note` replaces the short text behind the bar."""


class Progress(Protocol):
    """Sink for the progress of one command."""

    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Any:
        """Context manager that yields a `Task` of `total` steps (`unit` names a step: "layer", "B", ...).

        `before`: steps that an earlier run has done; they count as done, but not for the time that is left.
        """

    def note(self, message: str) -> None:
        """Say one line that stays visible: a phase that starts, a fact worth knowing."""

    def warn(self, message: str) -> None:
        """Say one line the user should act on or know when judging the result."""


class _NullTask:
    def advance(self, steps: float = 1, note: str | None = None) -> None:
        return None


class NullProgress:
    """Says nothing."""

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
