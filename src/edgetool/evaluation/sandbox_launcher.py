"""The launcher: a small process that confines itself and then runs a program that nobody has read.

Started by sandbox.py as `python -c CODE ORDER STATUS`: an `Order` as JSON, and the descriptor on which it says
{"started": true}, {"failed": reason} or {"ended": wait status}, a JSON object a line. Standard library only.

Of kind "namespaces" the tree is: launcher (its death ends the rest) -> init, number 1 of a world of its own -> program.
That world has a root file system in memory with the system's and Python's directories in it, read-only, no /proc, no
/sys, no network, one directory to write in, of limited size; when init ends, the kernel ends all in it at once. Of the
other kinds the program is the launcher's child, and the launcher ends whatever comes to it (it is a subreaper).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from edgetool.evaluation import sandbox_kernel as kernel
from edgetool.process.tree import descendants

INNER_UID = 65534
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
FACTS = ("/proc/meminfo", "/proc/stat", "/proc/cpuinfo")
"""Copied as they are at the start: libraries ask them for memory and cores."""
_ROOT_BYTES = 4 << 20
_MOST_FILES = 10_000
_KILL_LIMIT_S = 5.0


class Order(TypedDict):
    """What a launcher is to do. Sizes in bytes, times in seconds."""

    kind: str
    """namespaces, bubblewrap (whose world is around us already), landlock or limits."""
    parent: int
    """The number of the process that gave the order, whose end ends the launcher."""
    command: list[str]
    """Whole paths; the program's file is found at the path it has outside."""
    readable: list[str]
    """Directories and files that the program needs besides the system's."""
    scratch: str
    """Directory to write in. Of kind namespaces: /tmp, of which there is nothing outside."""
    scratch_bytes: int
    environment: dict[str, str]
    uid: int | None
    """User to become where the launcher is root; None: stay who we are."""
    filtered: bool
    """Whether system calls are filtered."""
    rlimits: dict[str, tuple[int, int]]
    """Name in `resource`, without RLIMIT_ -> soft and hard limit."""
    wall_s: float


class _Refused(Exception):
    """The kernel does not give what this kind needs."""


def _say(status: int, **message: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(status, json.dumps(message).encode() + b"\n")


def _confine_and_run(order: Order, status: int, alive: int) -> None:
    """As init (or as the launcher itself): set everything up, run the program, wait for its end and say it.

    alive: read end of a pipe whose other end the parent holds; -1 for none.
    """
    if order["kind"] == "namespaces":
        _build_world(order)
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
    kernel.prctl("pdeathsig", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user forgets it
    if alive >= 0:
        os.set_blocking(alive, False)
        with contextlib.suppress(BlockingIOError):
            if os.read(alive, 1) == b"":
                os._exit(1)
    kernel.forget_capabilities()
    kernel.prctl("dumpable", kernel.PR_SET_DUMPABLE, 0)  # nobody of the same user can read or trace us
    failure, failed = os.pipe2(os.O_CLOEXEC)
    launcher = os.getpid()
    program = os.fork()
    if program == 0:
        _become_program(order, failed, launcher)
    os.close(failed)
    with os.fdopen(failure, "rb") as stream:
        reason = stream.read().decode()
    if reason:
        os.waitpid(program, 0)
        raise _Refused(reason)
    _say(status, started=True)
    for descriptor in (0, 1, 2):  # the pipes end when the program's end does
        os.close(descriptor)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(program, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, order["wall_s"] + 5)  # should nobody be there to look at the clock
    while True:
        ended, code = os.wait()
        if ended == program:
            _say(status, ended=code)
            return


def _become_program(order: Order, failed: int, launcher: int) -> NoReturn:
    try:
        kernel.prctl("pdeathsig", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        for number in range(1, signal.NSIG):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.chdir(order["scratch"])
        os.umask(0o077)
        for name, (soft, hard) in order["rlimits"].items():
            _limit(getattr(resource, f"RLIMIT_{name}"), soft, hard)
        if order["kind"] == "landlock":
            present = [path for path in (*SYSTEM, *SYSTEM_FILES, *FACTS) if Path(path).exists()]
            kernel.landlock([*present, *order["readable"]], DEVICES, [order["scratch"]])
        if order["filtered"] and kernel.can_filter():
            kernel.filter_system_calls()
        os.execve(order["command"][0], order["command"], order["environment"])  # noqa: S606
    except OSError as error:
        os.write(failed, _text(error).encode())
    finally:
        os._exit(127)


def _limit(which: int, soft: int, hard: int) -> None:
    """Set a limit, or keep what is there where that is lower."""
    _, most = resource.getrlimit(which)
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(which, (soft, hard))


def _build_world(order: Order) -> None:
    """A root file system of its own, in memory; what it shows of the machine is read-only."""
    os.umask(0o022)
    facts = {path: Path(path).read_bytes() for path in FACTS if Path(path).exists()}
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size={_ROOT_BYTES},mode=755")  # noqa: S108
    os.chdir("/tmp")  # noqa: S108
    Path("old").mkdir()
    kernel.pivot_root(".", "old")
    os.chdir("/")
    # before the rest: what is shown may lie below /tmp
    Path("/tmp").mkdir()  # noqa: S108
    kernel.mount(
        "tmpfs",
        "/tmp",  # noqa: S108
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV,
        f"size={order['scratch_bytes']},nr_inodes={_MOST_FILES},mode=1777",
    )
    for path in dict.fromkeys([*SYSTEM, *SYSTEM_FILES, *order["readable"]]):
        _show(path)
    for path in DEVICES:
        _show(path, device=True)
    for path, data in facts.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)
    Path("/dev/shm").symlink_to("/tmp")  # noqa: S108
    kernel.unmount("/old")
    Path("/old").rmdir()
    kernel.remount("/", kernel.MS_RDONLY)


def _show(path: str, *, device: bool = False) -> None:
    """Bind what is at `path` outside (now below /old) to the same path inside, read-only; if it is there at all."""
    outside, inside = Path("/old" + path), Path(path)
    if outside.is_symlink() and path.count("/") == 1:  # /bin -> usr/bin
        inside.symlink_to(outside.readlink())
        return
    if not outside.exists() or inside.exists():  # a directory within one that is shown already
        return
    inside.parent.mkdir(parents=True, exist_ok=True)
    if outside.is_dir():
        inside.mkdir()
    else:
        inside.touch()
    kernel.mount(str(outside), path, None, kernel.MS_BIND | kernel.MS_REC)
    closed = kernel.MS_NOSUID | kernel.MS_RDONLY | (0 if device else kernel.MS_NODEV)
    for point in kernel.mount_points_below(path, "/old/proc"):
        kernel.remount(point, closed)


def _enter_namespaces(order: Order) -> None:
    """New namespaces: by root's own power, or in a user namespace of our own, which needs none."""
    if os.geteuid() != 0:
        uid, gid = os.getuid(), os.getgid()
        kernel.unshare(kernel.CLONE_NEWUSER, "user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{INNER_UID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{INNER_UID} {gid} 1")
    kernel.unshare(kernel.CLONE_NEWNS, "mount namespace")
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS, "network, IPC and host namespaces")
    kernel.unshare(kernel.CLONE_NEWPID, "process namespace")


def _in_namespaces(order: Order, status: int) -> None:
    _enter_namespaces(order)
    alive, held = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(held)
        code = 0
        try:
            _confine_and_run(order, status, alive)
        except BaseException as error:
            _say(status, failed=_text(error))
            code = 1
        os._exit(code)
    for descriptor in (0, 1, 2, status, alive):
        os.close(descriptor)
    os.waitpid(init, 0)


def _without_namespaces(order: Order, status: int) -> None:
    kernel.prctl("subreaper", kernel.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _confine_and_run(order, status, -1)
    finally:
        _end_all()


def _stop(*_: Any) -> NoReturn:
    raise SystemExit(1)


def _end_all() -> None:
    """Kill what is below until nothing is. What forks faster than it is killed hits its limit of processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + _KILL_LIMIT_S
    while time.monotonic() < until:
        for process in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error.args[-1]) if isinstance(error, OSError) and error.args else str(error)


def main() -> None:
    """Run as the launcher; the exit code says nothing."""
    order: Order = json.loads(sys.argv[1])
    status = int(sys.argv[2])
    os.set_inheritable(status, False)
    try:
        kernel.prctl("pdeathsig", kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != order["parent"] and order["kind"] != "bubblewrap":  # bwrap looks for itself
            return
        with contextlib.suppress(OSError):  # the first to go, should the machine run out of memory
            Path("/proc/self/oom_score_adj").write_text("1000")
        if order["kind"] == "namespaces":
            _in_namespaces(order, status)
        else:
            _without_namespaces(order, status)
    except Exception as error:
        _say(status, failed=_text(error))
