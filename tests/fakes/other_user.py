"""Acting in a child process, as another user where the test runs as root."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

import pytest

_PR_SET_DUMPABLE = 4
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def become(uid: int) -> None:
    """Give up this process's user for good, and be to /proc what a process that this user has started is."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # changing the user closes /proc/PID to that user until the next exec
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def in_a_child(act: Callable[[], object], uid: int | None = None) -> str:
    """What `act` returns or raises in a forked child, as text; as another user if `uid` is given."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(120)  # a fork of a process with threads can hang: then the test fails, and does not hang with it
        try:
            if uid is not None:
                become(uid)
            answer = repr(act())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer
