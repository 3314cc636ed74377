"""Everything that edgetool shows: results on stdout, progress and errors on stderr. The only importer of rich.

rich is imported where it is used: `--version`, errors and `--json` do without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from edgetool.errors import EdgetoolError, ReaderGone, ResourceUnavailable
from edgetool.messages import label, translated
from edgetool.progress import NullProgress, Progress, Steps, Task
from edgetool.progress_lines import JsonProgress, PlainProgress, count, event_line, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_UNBOUNDED_COLUMNS = 100_000
_LEAST_COLUMNS = 60


@dataclass(frozen=True)
class Table:
    """A titled table. Without `headers` the first column is a list of names."""

    title: str
    rows: Sequence[Sequence[str]]
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Text:
    """A titled paragraph, shown as it is."""

    title: str
    body: str


Block = Table | Text


class Output:
    """Where one command's result goes. `json` may be set once the configuration is known."""

    def __init__(self, schema: str, as_json: bool) -> None:
        self.schema = schema
        self.json = as_json
        self.progress_mode = "auto"
        self.arguments: tuple[str, ...] = ()  # the command line as it was typed
        self._stdout: TextIO | None = None
        self._saved_fd: int | None = None
        self._said = False

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep stdout for the result: whatever libraries and child processes print meanwhile goes to stderr."""
        real = sys.stdout
        self._saved_fd = saved_fd = _divert_stdout(real)
        self._stdout = real if saved_fd is None else open(saved_fd, "w", encoding=real.encoding)  # noqa: SIM115, PTH123
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            if saved_fd is not None:
                os.dup2(saved_fd, 1)
                with contextlib.suppress(OSError):  # what could not be written has been an error already
                    self._stdout.close()
            self._stdout = self._saved_fd = None

    def result(self, result: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        """Print the one result of a command: the document with `--json`, the blocks otherwise."""
        if self.json:
            self._print({"schema": self.schema, "ok": True, **result})
            return
        stream = self._stdout or sys.stdout
        _tolerate_any_text(stream)
        console = _console(stream)
        self.text("\n".join(_drawn(console, block, stream.isatty()) for block in blocks))

    def descriptor(self) -> int:
        """The descriptor of the real stdout, for a child whose output is the command's result."""
        return 1 if self._saved_fd is None else self._saved_fd

    def clear(self) -> None:
        """Empty the terminal for the next of several results; elsewhere they follow each other."""
        stream = self._stdout or sys.stdout
        self.text("\x1b[H\x1b[2J\x1b[3J" if stream.isatty() else "\n")

    def text(self, text: str) -> None:
        """Print text on stdout as it is.

        Raises:
            ReaderGone: nobody reads it any more.
            ResourceUnavailable: it cannot be written (a full disk).
        """
        stream = self._stdout or sys.stdout
        _tolerate_any_text(stream)
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            raise unwritable(error) from error

    def spoken(self, text: str) -> None:
        """Print what a model wrote: as it is into files and pipes; on a terminal its control characters are shown, not
        obeyed. Raises as `text`."""
        self.text(text.translate(_PICTURES) if (self._stdout or sys.stdout).isatty() else text)

    def failure(
        self,
        type_name: str,
        message: str,
        hint: str | None,
        exit_code: int,
        *,
        say: bool = True,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Report a failure: on stderr in words (unless `say` is False), and with `--json` on stdout as a document.

        `details` are further fields of the document.
        """
        error = {"type": type_name, "message": message, "hint": hint, "exit_code": exit_code}
        # Where stdout or stderr cannot be written, the exit code alone has to say it.
        with contextlib.suppress(OSError):
            if say and self.progress_mode == "json":
                sys.stderr.write(event_line("error", **error) + "\n")
            elif say:
                strong, plain = ("\x1b[1;31m", "\x1b[0m") if _colours(sys.stderr) else ("", "")
                _tolerate_any_text(sys.stderr)
                shown = f"{strong}{label('error: ')}{plain}{translated(message)}\n"
                sys.stderr.write(shown + (f"{label('hint: ')}{translated(hint)}\n" if hint else ""))
            sys.stderr.flush()
        if self.json and not self._said:  # a server that fails after it said that it is ready has given its document
            with contextlib.suppress(ReaderGone, ResourceUnavailable):
                self._print({"schema": self.schema, "ok": False, **error, **(details or {})})

    def error(self, error: EdgetoolError) -> None:
        """Report an EdgetoolError."""
        self.failure(error.type_name, error.message, error.hint, error.exit_code, details=error.details)

    def _print(self, document: Mapping[str, Any]) -> None:
        # ASCII only, so that no locale can refuse it; NaN and infinity are not JSON, and become null.
        self._said = True
        self.text(json.dumps(_strict(document), indent=2, allow_nan=False, default=str) + "\n")


@contextlib.contextmanager
def progress(mode: str) -> Iterator[Progress]:
    """Progress on stderr as `mode` says: auto, bar, plain, json or quiet (see CommonConfig.progress)."""
    if mode == "quiet":
        yield NullProgress()
    elif mode == "bar" or (mode == "auto" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        with _BarProgress() as bars:
            yield bars
    else:
        lines = JsonProgress(sys.stderr) if mode == "json" else PlainProgress(sys.stderr, say=label)
        with contextlib.closing(lines):
            yield lines


class _BarProgress:
    """Live bars on stderr, one a task, with time spent and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._bars: RichProgress = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn(label("left")),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )

    def __enter__(self) -> _BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Iterator[Task]:
        identity = self._bars.add_task(label(name), total=total, completed=int(before), count="", note="")
        bar = _Bar(self._bars, identity, total, unit, before)
        try:
            yield bar
        finally:
            self._bars.stop_task(bar.identity)

    @contextlib.contextmanager
    def steps(self, names: Sequence[str]) -> Iterator[Steps]:
        width = max(map(len, names), default=0)
        rows = {
            name: self._bars.add_task(name.ljust(width), total=None, start=False, count=label("waiting"), note="")
            for name in names
        }
        try:
            yield _StepBars(self._bars, rows)
        finally:
            for row in rows.values():
                self._bars.stop_task(row)

    def note(self, message: str) -> None:
        self._bars.console.print(translated(message), markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._bars.console.print(
            f"{label('warning: ')}{translated(message)}", markup=False, highlight=False, style="yellow"
        )


@dataclass
class _Bar:
    bars: RichProgress
    identity: TaskID
    total: float
    unit: str
    done: float = 0

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.done += steps
        done, total = (size(n) if self.unit == "B" else f"{n:g}" for n in (self.done, self.total))
        if note is not None:
            self.bars.update(self.identity, note=label(note))
        # parts of a step add up to almost one, and a bar that is almost full never ends
        self.bars.update(self.identity, completed=round(self.done, 6), count=f"{done}/{total}")


@dataclass
class _StepBars:
    bars: RichProgress
    rows: Mapping[str, TaskID]
    running: set[str] = field(default_factory=set)

    def state(self, name: str, state: str, note: str = "") -> None:
        row = self.rows[name]
        if state == "running" and name in self.running:
            self.bars.update(row, total=None, count=label(state), note=label(note))
            return
        if state == "running":
            self.running.add(name)
            self.bars.reset(row, total=None, count=label(state), note=label(note))
            return
        self.running.discard(name)
        finished = state in ("done", "unchanged")
        self.bars.update(row, total=1, completed=int(finished), count=label(state), note=label(note))
        self.bars.stop_task(row)

    def advance(self, name: str, task: str, done: float, total: float, unit: str = "", note: str = "") -> None:
        shown = " ".join(filter(None, [label(task), label(note)]))
        counted = label(count(done, total, unit))
        self.bars.update(self.rows[name], total=total, completed=done, count=counted, note=shown)


def _divert_stdout(stream: TextIO) -> int | None:
    """Point file descriptor 1 at stderr and return a duplicate of the old one; None when `stream` is not on it."""
    try:
        if stream.fileno() != 1:
            return None
        stream.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):
        return None
    return saved


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False)
    # Off a terminal rich assumes 80 columns and cuts; a file or a pipe has no width. On a very narrow terminal lines
    # that it wraps are easier to read than columns of one letter.
    console.width = max(console.width, _LEAST_COLUMNS) if stream.isatty() else _UNBOUNDED_COLUMNS
    return console


def _drawn(console: Console, block: Block, on_terminal: bool) -> str:
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    with console.capture() as drawn:
        if block.title:
            console.print(RichText(label(block.title), style="bold"))
        if isinstance(block, Text):
            console.print(RichText(translated(block.body)))
    if isinstance(block, Text):
        return drawn.get()
    table = RichTable(box=None, show_header=bool(block.headers), pad_edge=False, header_style="dim")
    width = max((len(row) for row in block.rows), default=len(block.headers))
    for column in range(width):
        header = label(block.headers[column]) if column < len(block.headers) else ""
        table.add_column(header, overflow="fold", style="cyan" if column == 0 else "")
    for row in block.rows:
        # a first cell below a header is somebody's name for something, and stays as it is unless it is a sentence
        names = translated if block.headers else label
        table.add_row(*(RichText((label if column else names)(cell)) for column, cell in enumerate(row)))
    with console.capture() as rows:
        console.print(table)
    # rich pads the last column too; in a file or a pipe that is noise
    lines = rows.get().splitlines()
    return drawn.get() + "".join(f"{line if on_terminal else line.rstrip()}\n" for line in lines)


def unwritable(error: OSError) -> EdgetoolError:
    """What it means that stdout could not be written."""
    if isinstance(error, BrokenPipeError):
        return ReaderGone("nobody reads the output any more")
    return ResourceUnavailable(
        f"the output cannot be written to stdout: {error.strerror}", "run the command again where there is space for it"
    )


def _colours(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
"""Control characters as Unicode's pictures of them: a terminal would take them for orders (its title, its clipboard,
what is typed next), and the server of a conversation can be anybody's."""


def _tolerate_any_text(stream: TextIO) -> None:
    """A model may answer with characters that the terminal's encoding does not have; that is no reason to fail."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
