"""Wakes those who wait when a lease ends, also by the death of its holder: inotify(7) on the directory of leases.

A lease's file is open for writing in its holder and nowhere else, so the kernel tells of its last close.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from pathlib import Path

_CLOSE_WRITE = 0x8
_DELETE = 0x200
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_REST_S = 0.002
"""After a wake: several leases often end together."""


class LeaseWatch:
    """Watches a directory from its making on. Where the kernel has no watch left to give, waiting is sleeping."""

    def __init__(self, directory: Path) -> None:
        self._descriptor = -1
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor: int = libc.inotify_init1(_FLAGS)
        if descriptor < 0:
            return
        if libc.inotify_add_watch(descriptor, os.fsencode(directory), _CLOSE_WRITE | _DELETE) < 0:
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def wait(self, longest_s: float) -> None:
        """Return when something has ended since the last call, at the latest after `longest_s`."""
        if self._descriptor < 0:
            time.sleep(min(longest_s, 0.05))
            return
        if select.select([self._descriptor], [], [], longest_s)[0]:
            time.sleep(min(longest_s, _REST_S))
            while self._drain():
                pass

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _drain(self) -> bool:
        try:
            return bool(os.read(self._descriptor, 1 << 16))
        except BlockingIOError:
            return False
