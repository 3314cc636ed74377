"""Starting a program whose words and environment the test then reads in /proc."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def started(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """The program, once /proc shows it.

    `Popen` returns when the kernel has closed the files that exec closes: a moment before it has put up the new
    program's command line and environment, which until then are empty, or the old ones.
    """
    process = subprocess.Popen(list(words), **options)
    expected = "\0".join(words).encode() + b"\0"
    deadline = time.monotonic() + 30
    while Path(f"/proc/{process.pid}/cmdline").read_bytes() != expected:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{list(words)} did not start")
        time.sleep(0.001)
    return process
