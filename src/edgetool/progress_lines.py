"""Progress as lines of text: for log files (plain) and for programs (one JSON object a line).

Standard library only. A thread beats while a task is under way, so that a job that is busy with one long step is
told apart from a job that hangs.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from edgetool.progress import Steps, Task


@dataclass
class Meter:
    """How far one task has come. Times are seconds of a monotonic clock."""

    owner: LineProgress
    name: str
    total: float
    unit: str
    before: float = 0
    done: float = 0
    note: str = ""
    started_s: float = field(default_factory=time.monotonic)
    said_s: float = field(default_factory=time.monotonic)

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Count `steps` and say so, if the last word on this task is older than the interval."""
        self.done += steps
        self.note = self.note if note is None else note
        if time.monotonic() - self.said_s >= self.owner.interval_s:
            self.owner.say("progress", self)


class LineProgress:
    """Common part of the two: which tasks are under way, when something was last said, and the heartbeat.

    Args:
        stream: where lines go, normally stderr.
        interval_s: least time between two lines on the progress of one task, in seconds.
        heartbeat_s: longest silence while a task is under way, in seconds.
    """

    def __init__(self, stream: TextIO, interval_s: float = 5.0, heartbeat_s: float = 30.0) -> None:
        self.stream = stream
        self.interval_s = interval_s
        self.heartbeat_s = heartbeat_s
        self._lock = threading.RLock()  # the beat looks and writes under it
        self._running: list[Meter] = []
        self._born_s = self._said_s = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Iterator[Task]:
        """Announce a task, count it, and say how it ended."""
        meter = Meter(self, name, total, unit, before, before)
        self._running.append(meter)
        self._start_heartbeat()
        self.say("start", meter)
        try:
            yield meter
        except BaseException:
            self._end("stopped", meter)
            raise
        else:
            self._end("done", meter)

    @contextlib.contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[Steps]:
        """Say how each of several commands gets on; what each says of its own tasks comes at its own pace."""
        yield _StepLines(self)

    def note(self, message: str) -> None:
        """Say one line."""
        self._message("note", message)

    def warn(self, message: str) -> None:
        """Say one line, marked as a warning."""
        self._message("warning", message)

    def close(self) -> None:
        """End the heartbeat."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def say(self, event: str, meter: Meter) -> None:
        """Write one line on a task; `event` is start, progress, heartbeat, done or stopped."""
        meter.said_s = time.monotonic()
        self._write(self._task_line(event, meter))

    def say_step(self, name: str, state: str, note: str) -> None:
        """Write one line on the state of a step."""
        self._write(self._step_line(name, state, note))

    def say_step_task(self, name: str, task: str, done: float, total: float, unit: str, note: str) -> None:
        """Write one line on a task within a step."""
        self._write(self._step_task_line(name, task, done, total, unit, note))

    def _step_line(self, name: str, state: str, note: str) -> str:
        raise NotImplementedError

    def _step_task_line(self, name: str, task: str, done: float, total: float, unit: str, note: str) -> str:
        raise NotImplementedError

    def _message(self, kind: str, message: str) -> None:
        self._write(self._message_line(kind, " ".join(message.split())))

    def _task_line(self, event: str, meter: Meter) -> str:
        raise NotImplementedError

    def _message_line(self, kind: str, message: str) -> str:
        raise NotImplementedError

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._born_s

    def _end(self, event: str, meter: Meter) -> None:
        with self._lock:  # a heartbeat is over by then, or does not come any more
            self._running.remove(meter)
        self.say(event, meter)

    def _write(self, line: str) -> None:
        # A reader of the log who goes away must not take a three-hour job along.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._said_s = time.monotonic()
            self.stream.write(line + "\n")
            self.stream.flush()

    def _start_heartbeat(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="edgetool-heartbeat", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(min(1.0, self.heartbeat_s / 4)):
            with self._lock:
                if self._running and time.monotonic() - self._said_s >= self.heartbeat_s:
                    self.say("heartbeat", self._running[-1])


@dataclass
class _StepLines:
    owner: LineProgress

    def state(self, name: str, state: str, note: str = "") -> None:
        self.owner.say_step(name, state, note)

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        self.owner.say_step_task(name, task, done, total, unit, note)


class PlainProgress(LineProgress):
    """Lines for people, without control codes: `[  41s] quantise: 3 of 30 layers, about 6 min left`.

    `say` puts words and sentences into the reader's language (messages.label); a log file has none, and stays English.
    """

    def __init__(
        self,
        stream: TextIO,
        interval_s: float = 5.0,
        heartbeat_s: float = 30.0,
        say: Callable[[str], str] = str,
    ) -> None:
        super().__init__(stream, interval_s, heartbeat_s)
        self.words = say

    def _message_line(self, kind: str, message: str) -> str:
        return self._stamped(f"{self.words('warning: ') if kind == 'warning' else ''}{self.words(message)}")

    def _stamped(self, text: str) -> str:
        return f"[{self._elapsed_s():5.0f}s] {text}"

    def _task_line(self, event: str, meter: Meter) -> str:
        spent_s = time.monotonic() - meter.started_s
        words = self.words
        text = f"{words(meter.name)}: " + words(count(meter.done, meter.total, meter.unit))
        made = meter.done - meter.before
        if event in {"progress", "heartbeat"} and made > 0 and meter.done < meter.total:
            text += ", " + words(f"about {duration(spent_s / made * (meter.total - meter.done))} left")
        if event == "heartbeat":
            text += ", " + words(f"still running after {duration(spent_s)}")
        elif event == "done":
            text = f"{words(meter.name)}: " + words(f"done in {duration(spent_s)}")
        elif event == "stopped":
            text += ", " + words("stopped")
        if meter.note and event in {"progress", "heartbeat"}:
            text += f" ({words(meter.note)})"
        return self._stamped(text)

    def _step_line(self, name: str, state: str, note: str) -> str:
        return self._stamped(f"{name}: {self.words(state)}" + (f" ({self.words(note)})" if note else ""))

    def _step_task_line(self, name: str, task: str, done: float, total: float, unit: str, note: str) -> str:
        words = self.words
        text = f"{name}: {words(task)}: {words(count(done, total, unit))}" + (f" ({words(note)})" if note else "")
        return self._stamped(text)


class JsonProgress(LineProgress):
    """One JSON object a line: `event`, `elapsed_s`, and for tasks `task`, `done`, `total`, `unit`, `note`."""

    def _message_line(self, kind: str, message: str) -> str:
        return self._line(kind, message=message)

    def _task_line(self, event: str, meter: Meter) -> str:
        return self._line(
            event, task=meter.name, done=meter.done, total=meter.total, unit=meter.unit, note=meter.note or None
        )

    def _step_line(self, name: str, state: str, note: str) -> str:
        return self._line("step", step=name, state=state, note=note or None)

    def _step_task_line(self, name: str, task: str, done: float, total: float, unit: str, note: str) -> str:
        return self._line("progress", step=name, task=task, done=done, total=total, unit=unit, note=note or None)

    def _line(self, event: str, **values: Any) -> str:
        return event_line(event, elapsed_s=round(self._elapsed_s(), 3), **values)


def event_line(event: str, **values: Any) -> str:
    """One line of `--progress json` (docs/schemas, edgetool.progress/1)."""
    return json.dumps({"event": event, **values})


def count(done: float, total: float, unit: str) -> str:
    """`3 of 30 layers`, `12.0 MB of 98.4 MB`, `7 of 9`."""
    if unit == "B":
        return f"{size(done)} of {size(total)}"
    name = unit if total == 1 or unit.endswith("s") else unit + "s"
    return f"{done:g} of {total:g} {name}" if unit else f"{done:g} of {total:g}"


def size(value_bytes: float) -> str:
    """Bytes in decimal units: `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value_bytes) < 1000:
            return f"{value_bytes:.0f} B" if unit == "B" else f"{value_bytes:.1f} {unit}"
        value_bytes /= 1000
    return f"{value_bytes:.1f} TB"


def duration(value_s: float) -> str:
    """Seconds in words: `0.3 s`, `41 s`, `6 min`, `2.1 h`."""
    if value_s < 10:
        return f"{value_s:.1f} s"
    if value_s < 120:
        return f"{value_s:.0f} s"
    return f"{value_s / 60:.0f} min" if value_s < 5400 else f"{value_s / 3600:.1f} h"
