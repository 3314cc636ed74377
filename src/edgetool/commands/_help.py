"""Help and usage errors in the reader's language, by typer's own formatter with other words and wider characters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import IO, Any

import typer
from typer._click.formatting import HelpFormatter

from edgetool.messages import label, translated
from edgetool.messages.width import cells, wrapped


class TranslatingFormatter(HelpFormatter):
    """Every text of a help page passes here on its way to the page."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The line `Usage: ...`; what can be typed is the same in every language."""
        shown = label(prefix or "Usage: ")
        lines = wrapped(args, max(self.width - cells(f"{shown}{prog} "), 20))
        indent = " " * cells(f"{shown}{prog} ")
        self.write(f"{shown}{prog} " + f"\n{indent}".join(lines) + "\n")

    def write_heading(self, heading: str) -> None:
        """The heading of a list."""
        self.write(f"{'':>{self.current_indent}}{label(heading)}：\n")

    def write_text(self, text: str) -> None:
        """Paragraphs."""
        indent = " " * self.current_indent
        paragraphs = [_paragraph(one, self.width - self.current_indent) for one in text.split("\n\n")]
        self.write("\n\n".join("\n".join(f"{indent}{line}" for line in lines) for lines in paragraphs) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Options or commands with their meanings, in two columns."""
        rows = [(first, second) for first, second in rows]
        column = min(max((cells(first) for first, _ in rows), default=0), col_max) + col_spacing
        indent = " " * self.current_indent
        for first, second in rows:
            lines = _paragraph(second, max(self.width - column - self.current_indent, 10))
            head = first + " " * (column - cells(first))
            if lines and cells(first) > column - col_spacing:
                self.write(f"{indent}{first}\n")
                head = " " * column
            self.write(f"{indent}{head}{lines[0] if lines else ''}".rstrip() + "\n")
            self.write("".join(f"{indent}{'':{column}}{line}\n" for line in lines[1:]))


class TranslatingContext(typer.Context):
    """A context whose help is written by that formatter."""

    formatter_class = TranslatingFormatter


def translate(command: Any) -> None:
    """Let a command, and all below it, show help in the language that is spoken."""
    command.context_class = TranslatingContext
    if command.help:
        # typer would cut it by counting characters, and shows no more than the first sentence
        first = translated(" ".join(command.help.split("\n\n")[0].split()))
        command.short_help = first.partition("。")[0] + ("。" if "。" in first else "")
    for below in getattr(command, "commands", {}).values():
        translate(below)


def translate_error(error: Any) -> None:
    """Let an error that typer would put in words say them in the language that is spoken."""
    # a missing command is answered with a whole help page, which is translated already
    if callable(getattr(error, "format_message", None)) and not type(error).__name__.startswith("NoArgs"):
        error.show = functools.partial(_show, error)


def _show(error: Any, file: IO[Any] | None = None) -> None:
    context = getattr(error, "ctx", None)
    if context is not None:
        typer.echo(context.get_usage(), file=file, err=True)
        typer.echo(translated(f"Try '{context.command_path} --help' for help.") + "\n", file=file, err=True)
    typer.echo(label("Error: ") + translated(error.format_message()), file=file, err=True)


def _paragraph(text: str, width: int) -> list[str]:
    """One paragraph in lines; what typer adds behind a help text, two spaces apart, is a text of its own."""
    parts = (" ".join(part.split()) for part in text.replace("\n", " ").split("  ["))
    said = [translated(part if position == 0 else f"[{part}") for position, part in enumerate(parts)]
    return wrapped(" ".join(said), width)
