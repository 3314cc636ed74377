"""Which processes belong together, and how all of them are ended: Linux's /proc, and nothing but the standard library.

A process belongs to a tree when its environment carries the tree's token, which survives changes of parent, session and
process group. Process numbers are used again by the kernel, so a process is named by its number and its start time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

TREE_VARIABLE = "EDGETOOL_TREE"
"""Environment variable of every supervised process: the tokens of the trees it is in, outermost first, by colons."""

LEASE_VARIABLE = "EDGETOOL_LEASE"
"""Environment variable of everything that runs under a lease (scheduler/leasing.py): the lease's id."""

KILL_LIMIT_S = 10.0
"""How long killed processes are waited for; one that outlives it hangs in the kernel (a driver, a network disk)."""

_EMPTY_LOOKS = 3

TRACKER_GRACE_S = 5.0
"""What a resource tracker gets after the others have been killed: on a busy machine those take seconds to be gone."""


class ProcessId(NamedTuple):
    """A process of this boot: its number, and its start time in clock ticks after boot."""

    pid: int
    start_ticks: int


class Entry(NamedTuple):
    """What /proc says about a live process."""

    id: ProcessId
    parent: int
    session: int


def entry(pid: int) -> Entry | None:
    """The process with this number; None when there is none, or only a zombie of it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # proc(5): the command is in brackets and may hold any byte, so fields are counted from the last one
    fields = text.rpartition(b")")[2].split()
    # a zombie with threads is one whose main thread alone has ended
    if fields[0] == b"X" or (fields[0] == b"Z" and int(fields[17]) <= 1):
        return None
    return Entry(ProcessId(pid, int(fields[19])), int(fields[1]), int(fields[3]))


def entries() -> list[Entry]:
    """All live processes that can be seen."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [found for number in numbers if (found := entry(number))]


def identify(pid: int) -> ProcessId | None:
    """Number and start time of a live process, or None."""
    found = entry(pid)
    return found.id if found else None


def alive(process: ProcessId) -> bool:
    """Whether this very process still runs: the same number with another start time is another process."""
    return identify(process.pid) == process


def descendants(pid: int) -> set[ProcessId]:
    """The live children of a process, theirs, and so on; not the process itself."""
    children: dict[int, list[ProcessId]] = {}
    for found in entries():
        children.setdefault(found.parent, []).append(found.id)
    below: set[ProcessId] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in below:
                below.add(child)
                waiting.append(child.pid)
    return below


def session_of(session: int, not_before_ticks: int) -> set[ProcessId]:
    """The live members of a session. A session's number is not used again before its last member has ended."""
    return {e.id for e in entries() if e.session == session and e.id.start_ticks >= not_before_ticks}


def variable_of(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with; None when absent or not ours to read."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    wanted = name.encode() + b"="
    for item in block.split(b"\0"):
        if item.startswith(wanted):
            return os.fsdecode(item[len(wanted) :])
    return None


def carriers(token: str, variable: str = TREE_VARIABLE) -> set[ProcessId]:
    """The live processes whose environment names `token` in `variable` (values are lists, separated by colons)."""
    return {e.id for e in entries() if token in (variable_of(e.id.pid, variable) or "").split(":")}


def own_ancestors() -> set[int]:
    """The numbers of this process and of all above it, which must not be ended by it."""
    found = {os.getpid()}
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        above = entry(pid)
        pid = above.parent if above else 0
    return found


def send(process: ProcessId, number: int) -> bool:
    """Send a signal to this very process; False when it has ended, or is not ours."""
    descriptor = -1
    try:
        # opened before the start time is compared, so that the number cannot change hands in between
        with contextlib.suppress(AttributeError, OSError):
            descriptor = os.pidfd_open(process.pid)
        if not alive(process):
            return False
        if descriptor >= 0:
            signal.pidfd_send_signal(descriptor, number)
        else:  # a kernel before 5.3, or a container that forbids the call
            os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return True


def is_resource_tracker(pid: int) -> bool:
    """Whether this is Python's multiprocessing.resource_tracker.

    It ignores SIGTERM, ends when the last process it works for has ended, and then removes the shared memory and the
    semaphores that those have left behind. Killed with them, it would leave that memory taken until the next boot.
    """
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class End(NamedTuple):
    """How a tree ended."""

    seen: tuple[ProcessId, ...]
    """Every process that was in it since the end was asked for."""
    killed: tuple[ProcessId, ...]
    """Those that had to be killed."""
    left: tuple[ProcessId, ...]
    """Those that still run: empty, or the proof has failed."""


def end_tree(
    find: Callable[[], Iterable[ProcessId]],
    main: ProcessId | None,
    deadline: Callable[[], float],
    wait: Callable[[float], None] = time.sleep,
    gone: Callable[[], bool] | None = None,
) -> End:
    """End all processes that `find` finds, until it finds none.

    `main` is asked first (SIGTERM), alone, so that it can end the others in its own order; when it is gone, or after
    half of the grace, all are asked. From `deadline` on (a time of time.monotonic(), which may move while this runs)
    they are killed, resource trackers last. `wait` is called between looks at the tree. `gone` knows for certain that
    nothing is left; without it, finding nothing several times in a row counts, since one look can miss a process that
    forks and ends while it is being looked for.
    """
    begun = time.monotonic()
    seen: set[ProcessId] = set()
    asked: set[ProcessId] = set()
    killed: set[ProcessId] = set()
    empty_looks = 0
    while True:
        left = set(find())
        seen |= left
        empty_looks = 0 if left else empty_looks + 1
        if not left and (gone() if gone is not None else empty_looks >= _EMPTY_LOOKS):
            break
        now, end = time.monotonic(), deadline()
        if now >= end + KILL_LIMIT_S and now >= begun + KILL_LIMIT_S:
            break
        if now >= end:
            spared = {p for p in left if now < end + TRACKER_GRACE_S and is_resource_tracker(p.pid)}
            for process in left - spared:
                send(process, signal.SIGKILL)
            killed |= left - spared
        else:
            called = {main} if main is not None and main in left and now < (begun + end) / 2 else left
            for process in called - asked:
                send(process, signal.SIGTERM)
                send(process, signal.SIGCONT)  # a stopped process does not see the request
            asked |= called
        wait(0.02 if now < begun + 1 else 0.1)
    return End(tuple(sorted(seen)), tuple(sorted(killed)), tuple(sorted(left)))


def reap(token: str, variable: str = TREE_VARIABLE, grace_s: float = 2.0) -> End:
    """End what carries `token` (see `carriers`), except this process and those above it."""
    spared = own_ancestors()
    deadline = time.monotonic() + grace_s
    return end_tree(lambda: {p for p in carriers(token, variable) if p.pid not in spared}, None, lambda: deadline)
