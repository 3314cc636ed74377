"""Backends as supervised trees of processes: started, followed, and ended with proof that nothing is left.

What holds the tree together, whatever is killed:

| killed | what ends the rest |
|---|---|
| the backend's main process | the guard (guard.py), its parent, which is also handed every orphan below it |
| edgetool itself | the guard, whose socket closes: within `grace_if_orphaned_s` and a moment |
| the guard | the kernel ends the main process (PR_SET_PDEATHSIG); `poll`, `wait` and `stop` end the rest by its token |
| edgetool and the guard at once | the kernel ends the main process; `edgetool gpus reap` finds the rest by its lease |
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetool.errors import BackendFailed, BadInput, MissingDependency, ResourceUnavailable
from edgetool.process.guard import Order
from edgetool.process.log import LogFollower, last_lines, log_end, open_log
from edgetool.process.tree import LEASE_VARIABLE, TREE_VARIABLE, ProcessId, carriers, end_tree, session_of

GRACE_S = 10.0
"""How long a tree that is asked to end may take before it is killed."""

_LOOK_S = 0.1
_GUARD_LIMIT_S = 15.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Last on the path, so that nothing beside the package can stand in for the standard library.
_GUARD_CODE = f"import sys; sys.path.append({_PACKAGE_ROOT!r}); from edgetool.process.guard import main; main()"

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a tree of processes ended."""

    returncode: int
    """Of the main process: its exit code, or minus the signal that ended it."""
    seen: tuple[ProcessId, ...] = ()
    """Every process that was still there when the end was asked for."""
    killed: tuple[ProcessId, ...] = ()
    """Those of them that did not end by themselves."""
    left: tuple[ProcessId, ...] = ()
    """Those that even SIGKILL did not end. Empty is the proof that nothing is left."""
    guard_lost: bool = False
    """The guard was killed; what it was to say was found by looking."""


@dataclass(frozen=True)
class LogRules:
    """How large the log of a child may become: `keep` full files of `limit_bytes` beside the one being written."""

    limit_bytes: int = 16 * 2**20
    keep: int = 3


class Child:
    """A supervised tree of processes. As a context manager it is stopped at the end of the block.

    Not safe for use from several threads at once, except `stop`, which any thread may call.
    """

    def __init__(
        self, guard: subprocess.Popen[bytes], control: socket.socket, main: ProcessId, token: str, log: Path | None
    ) -> None:
        """Use `Child.start`."""
        self.main = main
        self.token = token
        self.log = log
        self._guard = guard
        self._control = control
        self._pending = b""
        self._ended: Ended | None = None
        self._lock = threading.RLock()
        self._follower: LogFollower | None = None
        self._log_from = (0, 0)

    @property
    def pid(self) -> int:
        """The number of the main process."""
        return self.main.pid

    @classmethod
    def start(
        cls,
        command: Sequence[str | Path],
        *,
        log: Path | None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
        log_rules: LogRules | None = None,
        grace_if_orphaned_s: float = 3.0,
    ) -> Child:
        """Start `command` in a session of its own, under a guard.

        Args:
            command: program (looked for on PATH) and arguments; nothing secret, since everybody can read them.
            log: file that its stdout and stderr are appended to, in a directory that exists or can be made;
                None: it writes where edgetool writes.
            env: its whole environment (None: a copy of ours). A token of the tree is added, as EDGETOOL_TREE.
            stdin: a descriptor it reads from; None: nothing to read.
            stdout: a descriptor it writes its output to, so that the log has only its stderr.
            pass_fds: descriptors that it inherits under the same numbers, e.g. `Lease.fds`; the guard holds them too.
            grace_if_orphaned_s: what the tree gets between SIGTERM and SIGKILL when edgetool is gone.

        Raises:
            MissingDependency: there is no such program, or this is not Linux.
            BadInput: the working directory or the log cannot be used, or the program may not be run.
            ResourceUnavailable: the system has no more processes, memory or descriptors to give.
        """
        if sys.platform != "linux":
            raise MissingDependency("starting backends needs Linux (process trees are read from /proc)")
        rules = log_rules or LogRules()
        environment = dict(os.environ if env is None else env)
        token = secrets.token_hex(8)
        environment[TREE_VARIABLE] = ":".join(filter(None, [os.environ.get(TREE_VARIABLE), token]))
        # setproctitle (vLLM uses it) otherwise overwrites the memory that the kernel shows as the environment
        environment.setdefault("SPT_NOENV", "1")
        follower = _followed(log) if log else None
        log_from = log_end(log) if log else (0, 0)
        order: Order = {
            "command": [os.fspath(part) for part in command],
            "environment": environment,
            "cwd": None if cwd is None else os.fspath(cwd),
            "token": token,
            "log": None if log is None else os.fspath(log.absolute()),
            "stdout": stdout,
            "log_limit_bytes": rules.limit_bytes,
            "log_keep": rules.keep,
            "grace_if_orphaned_s": grace_if_orphaned_s,
            "parent": os.getpid(),
        }
        guard, control = _start_guard(order, stdin, (*pass_fds, *(() if stdout is None else (stdout,))))
        child = cls(guard, control, ProcessId(0, 0), token, log)
        child._follower = follower
        child._log_from = log_from
        try:
            first = child._next_message(_GUARD_LIMIT_S)
            if first is None or "started" not in first:
                raise _start_failure(order, first)
            child.main = ProcessId(*first["started"])
        except BaseException:
            control.close()  # the guard ends what it may have started
            guard.wait()
            raise
        return child

    def poll(self) -> int | None:
        """The return code of the main process once the whole tree has ended, else None."""
        return self._look(0.0)

    def wait(self, timeout_s: float | None = None, on_line: OnLine | None = None) -> int | None:
        """As `poll`, after at most `timeout_s`; meanwhile `on_line` gets each line of the log as it comes."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self._look(_LOOK_S)) is None:
            self._pass_lines(on_line)
            if until is not None and time.monotonic() >= until:
                return None
        self._pass_lines(on_line, final=True)
        return code

    def wait_ready(self, check: Callable[[], bool], timeout_s: float, on_line: OnLine | None = None) -> float:
        """Wait until `check` is true, and return the seconds that took.

        `check` is called some times a second and must not take long; what it raises ends the wait.

        Raises:
            BackendFailed: the main process ended, or was not ready in time (it then still runs).
        """
        begun = time.monotonic()
        while True:
            code = self._look(_LOOK_S)
            self._pass_lines(on_line, final=code is not None)
            if code is not None:
                raise self.failure(f"{self._name} ended before it was ready ({describe(code)})")
            if check():
                return time.monotonic() - begun
            if time.monotonic() - begun >= timeout_s:
                raise self.failure(f"{self._name} was not ready after {timeout_s:.0f} s")

    def failure(self, what: str) -> BackendFailed:
        """A BackendFailed that says `what`, where the log is, and its last lines."""
        lines = self.tail()
        where = f"; log: {self.log}" if self.log else ""
        return BackendFailed(f"{what}{where}" + (f"\n{lines}" if lines else ""))

    def send_signal(self, number: int) -> None:
        """Send a signal to the main process alone; nothing when it has ended."""
        self._tell({"signal": int(number)})

    def tree(self) -> set[ProcessId]:
        """The processes of the tree that run now, without the guard."""
        found = carriers(self.token) | session_of(self.main.pid, self.main.start_ticks)
        return {process for process in found if process.pid not in (self._guard.pid, os.getpid())}

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log, of those that were written since the start."""
        return last_lines(self.log, lines, self._log_from) if self.log else ""

    def stop(self, grace_s: float = GRACE_S) -> Ended:
        """End the whole tree and prove it: SIGTERM to the main process, then to all, then SIGKILL.

        May be called again, also by another thread while it waits, to shorten the grace; a tree that has ended
        answers at once. Processes that survive are in `left`.
        """
        self._tell({"stop": grace_s})
        until = time.monotonic() + grace_s + _GUARD_LIMIT_S
        while self._look(_LOOK_S) is None:
            if time.monotonic() >= until:
                with self._lock:
                    self._guard.kill()
        assert self._ended is not None
        return self._ended

    @property
    def ended(self) -> Ended | None:
        """How it ended; None while `poll` returns None."""
        return self._ended

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    @property
    def _name(self) -> str:
        return f"process {self.pid}"

    def _tell(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def _pass_lines(self, on_line: OnLine | None, *, final: bool = False) -> None:
        if on_line is not None and self._follower is not None:
            for line in self._follower.lines(final=final):
                on_line(line)
            if final:
                self._follower.close()
                self._follower = None

    def _look(self, timeout_s: float) -> int | None:
        with self._lock:
            if self._ended is None:
                message = self._next_message(timeout_s)
                if message is not None and "ended" in message:
                    self._ended = self._from_guard(message["ended"])
                elif message is not None:
                    self._ended = self._without_guard()
            return None if self._ended is None else self._ended.returncode

    def _next_message(self, timeout_s: float) -> dict[str, Any] | None:
        """The guard's next message, {} when it is gone, None when there is nothing yet."""
        until = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            if not select.select([self._control], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            try:
                piece = self._control.recv(1 << 16)
            except ConnectionError:
                piece = b""
            if not piece:
                return {}
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _from_guard(self, told: Mapping[str, Any]) -> Ended:
        self._guard.wait()
        self._control.close()
        seen, killed, left = (tuple(ProcessId(*pair) for pair in told[name]) for name in ("seen", "killed", "left"))
        status = told["status"]  # None: even SIGKILL has not ended the main process
        return Ended(-9 if status is None else os.waitstatus_to_exitcode(status), seen, killed, left)

    def _without_guard(self) -> Ended:
        self._guard.wait()
        self._control.close()
        now = time.monotonic()
        end = end_tree(self.tree, None, lambda: now)
        return Ended(-9, end.seen, end.killed, end.left, guard_lost=True)


def describe(returncode: int) -> str:
    """A return code in words."""
    if returncode >= 0:
        return f"exit code {returncode}"
    import signal

    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


@dataclass
class Restarts:
    """Whether a backend that has failed is started again, and after which pause: one object for each backend."""

    limit: int
    """Restarts without a good stretch in between, before it is given up; 0 = never started again."""
    backoff_s: float = 1.0
    """Pause before the first restart; it doubles with each, up to `backoff_limit_s`."""
    backoff_limit_s: float = 60.0
    good_after_s: float = 600.0
    """A run of this length counts as good: the next failure is the first again."""
    count: int = 0
    """Restarts since the last good stretch."""

    def pause_after(self, ran_s: float) -> float | None:
        """The pause in seconds after a failure of a backend that ran for `ran_s`; None: it is given up."""
        if ran_s >= self.good_after_s:
            self.count = 0
        if self.count >= self.limit:
            return None
        self.count += 1
        return float(min(self.backoff_s * 2 ** (self.count - 1), self.backoff_limit_s))


def _followed(log: Path) -> LogFollower:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        os.close(open_log(log))
        return LogFollower(log)
    except OSError as error:
        raise BadInput(f"cannot write the log {log}: {error.strerror}") from error


def _start_guard(
    order: Order, stdin: int | None, pass_fds: Sequence[int]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    # Its own environment only names the tree and the lease, so that `gpus reap` knows it.
    known = {name: order["environment"].get(name, "") for name in (TREE_VARIABLE, LEASE_VARIABLE)}
    log = open_log(Path(order["log"])) if order["log"] else None
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD_CODE, str(theirs.fileno())],
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=log,
            stderr=log,
            env=known,
            pass_fds=(theirs.fileno(), *pass_fds),
            start_new_session=True,
        )
        ours.sendall(json.dumps(order).encode() + b"\n")
    except OSError as error:
        ours.close()
        raise ResourceUnavailable(f"cannot start another process: {error.strerror}") from error
    finally:
        theirs.close()
        if log is not None:
            os.close(log)
    return guard, ours


def _start_failure(order: Order, message: Mapping[str, Any] | None) -> Exception:
    program = order["command"][0]
    if not message or "failed" not in message:
        return ResourceUnavailable(f"the guard of {program} did not start")
    if order["cwd"] is not None and not os.path.isdir(order["cwd"]):  # noqa: PTH112
        return BadInput(f"cannot start {program}: {order['cwd']} is not a directory")
    why = os.strerror(message["failed"])
    if isinstance(message["failed"], int) and message["failed"] == 2:
        return MissingDependency(f"cannot start {program}: there is no such program")
    return BadInput(f"cannot start {program}: {why}")
