"""The host that `serve-fpga --image` starts for itself: a process, watched, and started again when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetool.errors import BadInput, EdgetoolError, MissingDependency, ResourceUnavailable, VerificationFailed
from edgetool.fpga_service.jobs import HostJob
from edgetool.process.child import Child, Restarts, describe
from edgetool.progress import Progress
from edgetool.scheduler.leasing import Lease
from edgetool.serving.starting import own_environment, start_child

_BACKLOG = 128
_PREFIX = "edgetool-board-"
_YOUNG_S = 60.0
"""A directory younger than this may be one that is just being made."""
_LOOK_S = 0.1
_ERROR = "error: "
_OWN_WORDS = {kind.exit_code: kind for kind in (BadInput, MissingDependency, ResourceUnavailable, VerificationFailed)}
"""Exit codes of the host whose last error is one sentence for the user."""
_COMMAND = [sys.executable, "-m", "edgetool.fpga_service.host_main"]


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for sockets that nobody else can enter; those that killed gateways of this user left are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            _remove_if_left(left)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_if_left(path: Path) -> None:
    """Remove a directory whose gateway does not hold its lock any more. Raises OSError where that cannot be done."""
    if path.stat().st_uid != os.geteuid() or time.time() - path.stat().st_mtime < _YOUNG_S:
        return
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def listen_at(path: Path) -> socket.socket:
    """A Unix socket that listens at `path`. It outlives the host, so that a connection made meanwhile only waits."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


@dataclass
class EmbeddedHost:
    """The host and what it needs. `restarts`: how often it may be started again."""

    job: HostJob
    lease: Lease
    listening: socket.socket
    log: Path
    restarts: int
    child: Child | None = None

    def start(self) -> None:
        """Start the process. Raises what `Child.start` raises."""
        passed = (*self.lease.fds, self.listening.fileno())
        stdin = self.job.to_json().encode()
        self.child = start_child(_COMMAND, own_environment(self.lease), self.log, passed, stdin, self.lease)

    async def keep(self, progress: Progress) -> None:
        """Watch it, and start it again when it ends. Raises BackendFailed when it is given up."""
        restarts = Restarts(self.restarts)
        started_s = time.monotonic()
        while True:
            assert self.child is not None
            code = self.child.poll()
            if code is None:
                await asyncio.sleep(_LOOK_S)
                continue
            what = f"the host of {self.job.image} ended ({describe(code)})"
            pause_s = restarts.pause_after(time.monotonic() - started_s)
            if pause_s is None:
                again = f" after {restarts.count} restarts" if restarts.count else ""
                raise self.child.failure(what + again)
            progress.warn(f"{what}; restart {restarts.count} of {self.restarts} in {pause_s:.0f} s; log: {self.log}")
            await asyncio.sleep(pause_s)
            await asyncio.to_thread(self.start)
            started_s = time.monotonic()

    def ended(self) -> EdgetoolError | None:
        """Why it is of no use any more: it has ended, with words of its own or without. None while it runs."""
        if self.child is None or (code := self.child.poll()) is None:
            return None
        words = [line.removeprefix(_ERROR) for line in self.child.tail().splitlines() if line.startswith(_ERROR)]
        if words and code in _OWN_WORDS:
            return _OWN_WORDS[code](words[-1])
        return self.child.failure(f"the host of {self.job.image} ended before it was ready ({describe(code)})")

    def stop(self, grace_s: float) -> None:
        """End it and all that belongs to it."""
        if self.child is not None:
            self.child.stop(grace_s)
        self.listening.close()
