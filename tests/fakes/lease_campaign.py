"""Processes that lease, run children, release and are killed at random moments; run as a script, it prints what it saw.

The judge does not know the scheduler: every GPU is a row of files of 1 GiB each, every port and board a file. Whoever
is granted something takes the flock of as many of these files as it was granted, and hands them to its children with
the lease. A grant for which there are not enough files left is a double grant. When a process dies, Linux lets go of
the file with the highest number first (exit_task_work, last in first out): the judge's have higher numbers than the
lease's, so that what is free for the scheduler is free for the judge.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgetool.errors import ResourceUnavailable
from edgetool.process.tree import entries, variable_of
from edgetool.scheduler import leases
from edgetool.scheduler.inventory import Gpu, Inventory
from edgetool.scheduler.lease_records import DIRECTORY_VARIABLE
from edgetool.scheduler.leases import LeaseDirectory
from edgetool.scheduler.leasing import Lease, Request, Scheduler
from edgetool.scheduler.reaping import reap
from tests.fakes.other_user import become, in_a_child
from tests.fakes.worker_ports import worker_ports

GIB = 2**30
GPU_GIB = 8
GPUS = 4
REAP_EVERY = 25
BOARDS = ("vcu128-0", "simulator")
PORTS = worker_ports(27_000, 6, 100)
INVENTORY = Inventory("1", tuple(Gpu(i, f"GPU-{i}", "NVIDIA L4", "L4", GPU_GIB * GIB, 0) for i in range(GPUS)))


class Judge:
    """The files of the true owners, open in this process."""

    def __init__(self, directory: Path) -> None:
        names = [f"GPU-{gpu}.{part}" for gpu in range(GPUS) for part in range(GPU_GIB)]
        names += [str(port) for port in range(PORTS[0], PORTS[1] + 1)] + list(BOARDS)
        self._files = {name: _open_high(directory / name) for name in names}
        self._report = os.open(directory / "violations", os.O_WRONLY | os.O_APPEND)
        self._taken: list[int] = []

    def take(self, lease: Lease, request: Request) -> None:
        """Take what was granted; says so when somebody has it."""
        gib = GPU_GIB if request.exclusive else request.min_free_bytes // GIB
        rows = [([f"{uuid}.{part}" for part in range(GPU_GIB)], gib) for uuid in lease.gpu_uuids]
        rows += [([str(port)], 1) for port in lease.ports] + ([([lease.board], 1)] if lease.board else [])
        for names, count in rows:
            got = 0
            for name in names:
                if got < count and self._lock(name):
                    got += 1
            if got < count:
                os.write(self._report, f"{names[0]}: {got} of {count} free for {lease.id}\n".encode())

    def _lock(self, name: str) -> bool:
        try:
            fcntl.flock(self._files[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._taken.append(self._files[name])
        return True

    def close(self) -> None:
        """Give everything back, as far as no child has it."""
        for descriptor in (self._report, *self._files.values()):
            os.close(descriptor)

    @property
    def inherited(self) -> tuple[int, ...]:
        return tuple(self._taken)


def _open_high(path: Path) -> int:
    low = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)
    os.close(low)
    return high


def request(dice: random.Random) -> Request:
    if dice.random() < 0.2:
        return Request(board=dice.choice(BOARDS), ports=dice.choice((0, 1)))
    gpus = dice.choice((0, 1, 1, 1, 2, 3))
    return Request(
        gpus=gpus,
        min_free_bytes=dice.randint(1, GPU_GIB) * GIB if gpus else 0,
        exclusive=dice.random() < 0.4,
        ports=dice.choice((0, 1, 2)) if gpus else 1,
    )


def job(lease: Lease, dice: random.Random) -> None:
    """Some leases are worked under by children: made by fork, or by exec with descriptors handed down."""
    kind = dice.random()
    hold_s = dice.choice((0, 0, dice.uniform(0, 0.01)))
    child_s = 600 if dice.random() < 0.1 else dice.uniform(0, 0.3)
    if kind < 0.15:
        if os.fork() == 0:
            if not HANDED_DOWN:
                os.close(lease.fds[0])
            time.sleep(child_s)
            os._exit(0)
    elif kind < 0.3:
        held = (*(lease.fds if HANDED_DOWN else ()), *JUDGE[0].inherited)
        for descriptor in held:
            os.set_inheritable(descriptor, True)
        environment = {**os.environ, **lease.environment()}
        os.posix_spawn("/bin/sleep", ["sleep", f"{child_s:.3f}"], environment)
    time.sleep(hold_s)


JUDGE: list[Judge] = []
HANDED_DOWN = {"the lease"}


def worker(directory: Path, seed: int, uid: int | None) -> None:
    """Leases until it is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that ended are not kept
    if uid is not None:
        become(uid)
    dice = random.Random(seed)
    scheduler = Scheduler(directory / "leases", lambda: INVENTORY, port_range=PORTS)
    count = os.open(directory / "grants", os.O_WRONLY | os.O_APPEND)
    while True:
        wanted = request(dice)
        try:
            lease = scheduler.acquire(wanted, command=f"worker {seed}", wait_s=dice.choice((0, 0.05, 1)))
        except ResourceUnavailable:
            continue
        JUDGE[:] = [Judge(directory)]
        JUDGE[0].take(lease, wanted)
        os.write(count, b".")
        job(lease, dice)
        JUDGE[0].close()
        lease.release()


def start(directory: Path, seed: int, uid: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 1
            )  # the result's reader must not wait for a child that has leaked
            worker(directory, seed, uid)
        except BaseException as error:
            with (directory / "crashes").open("a") as stream:
                stream.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(1)
    return pid


def campaign(directory: Path, kills: int, workers: int, seed: int, uids: list[int | None]) -> dict[str, Any]:
    """Kill workers at random moments and start others; then end them all, and see what is left."""
    dice = random.Random(seed)
    for name in ("grants", "violations", "crashes"):
        (directory / name).touch()
        (directory / name).chmod(0o666)
    Judge(directory).close()
    running = {start(directory, dice.getrandbits(32), uids[n % len(uids)]): uids[n % len(uids)] for n in range(workers)}
    ends: Counter[int] = Counter()
    done = reaped = 0
    try:
        while done < kills:
            _until_granted(directory, 2 * done)
            time.sleep(dice.uniform(0.001, 0.03))
            pid = dice.choice(list(running))
            os.kill(pid, signal.SIGKILL)
            ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
            done += 1
            uid = running.pop(pid)
            running[start(directory, dice.getrandbits(32), uid)] = uid
            if done % REAP_EVERY == 0:
                reaped += sum(reap_as(directory, uid) for uid in uids)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        reaped += sum(reap_as(directory, uid) for uid in uids)
    return {
        "kills": done,
        "reaped": reaped,
        "ends": dict(ends),
        "grants": (directory / "grants").stat().st_size,
        "violations": (directory / "violations").read_text().splitlines(),
        "crashes": (directory / "crashes").read_text().splitlines(),
        "left": left(directory),
    }


def _until_granted(directory: Path, grants: int) -> None:
    """On a slow machine kills must not come faster than there is anything to be seen of what they do."""
    until = time.monotonic() + 60
    while (directory / "grants").stat().st_size < grants and time.monotonic() < until:
        time.sleep(0.002)


def reap_as(directory: Path, uid: int | None) -> int:
    """The orphans of one user are ended by that user; how many that were."""

    def act() -> int:
        return len(reap(LeaseDirectory(directory / "leases"), lambda: INVENTORY, grace_s=0)["reaped"])

    answer = in_a_child(act, uid)
    if not answer.isdigit():
        with (directory / "crashes").open("a") as stream:
            stream.write(f"reap: {answer}\n")
        return 0
    return int(answer)


def strays(directory: Path) -> list[int]:
    """Processes that have a file of the campaign open or name its leases, except this one."""
    found = []
    for entry in entries():
        pid, home = entry.id.pid, directory / "leases"
        names = []
        with suppress(OSError):
            names = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        if pid != os.getpid() and (
            any(name.startswith(f"{directory}/") for name in names) or variable_of(pid, DIRECTORY_VARIABLE) == str(home)
        ):
            found.append(pid)
    return found


def left(directory: Path) -> dict[str, Any]:
    """What still runs or is still taken when all orphans were reaped: nothing, or it has leaked."""
    running = strays(directory)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    scheduler = Scheduler(directory / "leases", lambda: INVENTORY, port_range=PORTS)
    everything = Request(
        gpus=GPUS, min_free_bytes=GPU_GIB * GIB, exclusive=True, ports=PORTS[1] - PORTS[0] + 1, board=BOARDS[0]
    )
    try:
        # what leaks does so for ever; that another test tries a port lasts a moment
        with scheduler.acquire(everything, command="the last", wait_s=20) as lease:
            judge = Judge(directory)
            judge.take(lease, everything)
            judge.close()
    except ResourceUnavailable as error:
        return {"running": running, "leases": error.message}
    with scheduler.directory.locked() as opened:
        opened.scan(clean=True)
    own = [path.name for path in scheduler.directory.path.iterdir() if path.stat().st_uid == os.geteuid()]
    return {"running": running, "leases": None, "files": own, "waiting": len(scheduler.directory.scan().waiting)}


def break_it(how: str) -> None:
    """Take away one of the things that the scheduler stands on, to see that the judge sees it."""
    if how == "no lock":

        @contextmanager
        def unlocked(self: LeaseDirectory, limit_s: float = 0) -> Any:
            with self.opened() as descriptor:
                yield leases.OpenDirectory(descriptor, self.path)

        LeaseDirectory.locked = unlocked  # type: ignore[method-assign]
    elif how == "no inheritance":
        HANDED_DOWN.clear()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uids", type=int, nargs="*", default=[])
    parser.add_argument("--broken", default="")
    arguments = parser.parse_args()
    break_it(arguments.broken)
    os.umask(0o022)  # other users open the judge's files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    result = campaign(arguments.directory, arguments.kills, arguments.workers, arguments.seed, [None, *arguments.uids])
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
