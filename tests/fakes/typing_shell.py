"""An interactive bash, zsh or fish at a terminal, into which a test types; what it then runs is what it understood.

The program that is completed writes down the words it was called with, so that a test reads what the shell made of the
line, quotes and all, and not what the screen looked like on the way there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

COMMANDS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOADING = {
    "bash": "source <(edgetool completion bash)",
    "zsh": "autoload -Uz compinit && compinit -D -u && source <(edgetool completion zsh)",
    "fish": "edgetool completion fish | source",
}
_PATIENCE_S = 30.0
_RECORDER = """#!/bin/sh
case $1 in _complete|completion) exec {python} -m edgetool "$@";; esac
for word in "$@"; do printf '%s\\0' "$word"; done >"{typed}.part"
mv "{typed}.part" "{typed}"
"""


class TypingShell:
    """One shell in `directory`, whose programs see `environment` too. `close` ends it."""

    def __init__(self, name: str, home: Path, directory: Path, environment: dict[str, str], loading: str = "") -> None:
        self._typed = home / "typed"
        (home / "bin").mkdir(parents=True)
        program = home / "bin" / "edgetool"
        program.write_text(_RECORDER.format(python=sys.executable, typed=self._typed))
        program.chmod(0o755)
        variables = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
            **environment,
        }
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            try:
                os.chdir(directory)
                os.execvpe(COMMANDS[name][0], COMMANDS[name], variables)
            finally:
                os._exit(127)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        self._shown = ""
        self._send(f"{loading or LOADING[name]}; printf 're%s\\n' ady\r")
        self._wait(lambda: "ready\r\n" in self._shown, "it did not load the script")

    def words(self, typed: str) -> list[str]:
        """Type a line (with tabs) and Enter; the words that edgetool was then called with."""
        self._typed.unlink(missing_ok=True)
        self._shown = ""
        self._send(typed + "\r")
        self._wait(self._typed.exists, f"edgetool was not called after {typed!r}")
        return self._typed.read_bytes().decode().split("\0")[:-1]

    def shows(self, typed: str, *expected: str) -> None:
        """Type a line (with tabs), and wait until the terminal shows all that is expected; then drop the line."""
        self._shown = ""
        self._send(typed)
        self._wait(lambda: all(text in self._plain() for text in expected), f"{expected} not shown after {typed!r}")
        self._send("\x15")  # not Ctrl-C: with the line, a terminal drops what is typed after it

    def close(self) -> None:
        os.close(self._terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\(B", "", self._shown)

    def _send(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _wait(self, reached, problem: str) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + _PATIENCE_S
        while not reached():
            if time.monotonic() > deadline:
                raise AssertionError(f"{problem}; the terminal shows: {self._plain()!r}")
            if select.select([self._terminal], [], [], 0.05)[0]:
                self._shown += os.read(self._terminal, 65536).decode(errors="replace")
