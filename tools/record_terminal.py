"""Write docs/images/terminal.svg: real commands, run one after the other in a terminal, as they end on its screen.

    .venv/bin/python tools/record_terminal.py                     # the commands below, on the demo model: some minutes
    .venv/bin/python tools/record_terminal.py -o x.svg "edgetool gpus"

Each command is run by `sh -c` in a pseudo-terminal, in an empty directory that goes away. What it prints is put on a
screen as a terminal would (bars overwrite themselves), and rich draws that screen. Nothing is edited. The picture names
no font to be fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "images" / "terminal.svg"
COLUMNS, ROWS = 100, 100

COMMANDS = [
    "edgetool quantize demo -o out --group-size 64 --calib-samples 32",
    "edgetool compile-vcu128 out -o image --lm-head rtn4 --quiet | grep -A 2 estimate",
    "edgetool chat --image image -m 'What is the capital of France?' --temperature 0",
]

_CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n")


class Screen:
    """Lines as a terminal shows them. Colours stay in the text; a line is only ever written again as a whole."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = 0
        self._again = False

    def feed(self, text: str) -> None:
        """Put what a program has written on the screen."""
        position = 0
        for control in _CONTROL.finditer(text):
            self._write(text[position : control.start()])
            self._obey(control)
            position = control.end()
        self._write(text[position:])

    def _write(self, text: str) -> None:
        if text and self._again:
            self.lines[self.row] = ""
        if text:
            self._again = False
            self.lines[self.row] += text

    def _obey(self, control: re.Match[str]) -> None:
        arguments, letter = control.groups()
        if control[0] == "\n":
            self.row += 1
            self._again = True  # the terminal makes \r\n of it
            if self.row == len(self.lines):
                self.lines.append("")
        elif control[0] == "\r":
            self._again = True  # what is written next replaces the line
        elif letter == "A":
            self.row = max(0, self.row - int(arguments or 1))
        elif letter == "K":
            self.lines[self.row] = ""
        elif letter == "m":
            self._write(control[0])
        elif letter not in "hl":  # the cursor shown or hidden
            raise ValueError(f"a terminal sequence that this screen does not know: {control[0]!r}")


def run(command: str, directory: Path) -> tuple[int, str]:
    """Exit code, and everything that `command` writes to a terminal of COLUMNS x ROWS."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGETOOL_", "NO_COLOR"))}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "LC_ALL": "C.UTF-8",
        "EDGETOOL_JOBS_RECORD": "0",
    }
    child = subprocess.Popen(
        ["sh", "-c", command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # EIO: the last writer has gone
        while data := os.read(ours, 1 << 16):
            written += data
    os.close(ours)
    return child.wait(), written.decode()


def picture(sessions: list[tuple[str, str]], title: str) -> str:
    """An SVG of commands and what they wrote, one below the other."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for number, (command, written) in enumerate(sessions):
        screen = Screen()
        screen.feed(written)
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=True)
        for line in "\n".join(screen.lines).rstrip().splitlines():
            console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")
    return console.export_svg(title=title, code_format=template, unique_id="edgetool")


def main() -> None:
    """Record, and write the picture; end with the exit code of a command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    parser.add_argument("commands", nargs="*", help="shell commands [default: those of the README]")
    arguments = parser.parse_args()
    sessions = []
    with tempfile.TemporaryDirectory() as directory:
        for command in arguments.commands or COMMANDS:
            code, written = run(command, Path(directory))
            if code:
                sys.exit(f"{command}: exit code {code}\n{written}")
            sessions.append((command, written))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(picture(sessions, "edgetool"))


if __name__ == "__main__":
    main()
