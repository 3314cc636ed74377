"""Run a command as a child process and say what it cost: CPU seconds, wall seconds, peak resident memory."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.05


@dataclass(frozen=True)
class Cost:
    """What one command used, over its whole process tree."""

    cpu_s: float
    """User + system time of the child and of every descendant it waited for, from the kernel's own books (wait4)."""
    wall_s: float
    peak_rss_bytes: int
    """The larger of: the tree's summed RSS sampled every 50 ms (pages shared by two processes count twice), and the
    kernel's ru_maxrss of the largest single process (no sampling, so no short peak is missed)."""
    returncode: int


def run(command: Sequence[str], env: Mapping[str, str], log: Path, timeout_s: float) -> Cost:
    """Run `command` in a session of its own with both outputs into `log`; the whole group is killed at the timeout."""
    start = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(command, env=dict(env), stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    sampler = _Sampler(child.pid)
    sampler.start()
    alarm = threading.Timer(timeout_s, _kill_group, args=(child.pid,))
    alarm.start()
    try:
        # Not Popen.wait: it throws the rusage away.
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        _kill_group(child.pid)
        os.waitpid(child.pid, 0)
        raise
    finally:
        alarm.cancel()
        sampler.stop()
    child.returncode = os.waitstatus_to_exitcode(status)
    _kill_group(child.pid)  # helpers that outlive their parent would disturb the next measurement
    return Cost(
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=time.monotonic() - start,
        peak_rss_bytes=max(sampler.peak_bytes, usage.ru_maxrss * 1024),
        returncode=child.returncode,
    )


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class _Sampler(threading.Thread):
    """Largest sum of the resident sizes of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_bytes = 0
        self._done = threading.Event()

    def run(self) -> None:
        try:
            root = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return
        while not self._done.wait(SAMPLE_S):
            total = 0
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            for process in tree:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> None:
        self._done.set()
        self.join()
