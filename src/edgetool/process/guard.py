"""The guard: a small process between edgetool and a backend, which ends the backend's whole tree when edgetool is gone.

It runs in a session of its own and is the parent of the backend. Orphans below it become its children (subreaper), so
that nothing leaves the tree unseen. It ends the tree when it is told to, when the backend's main process ends, when its
socket to edgetool closes or edgetool's process ends, killed or not; it then says what it found, and ends itself. It
also writes the log. Standard library only: it starts in tens of milliseconds.

Protocol: one JSON object a line, both ways, on the socket whose descriptor is the only argument. First the `Order` to
the guard; then {"stop": grace_s} or {"signal": number}. From the guard: {"started": [pid, start_ticks]} or
{"failed": errno}, then {"ended": {"status": wait status, "seen": [...], "killed": [...], "left": [...]}}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from edgetool.process.log import RotatingLog
from edgetool.process.tree import ProcessId, carriers, descendants, end_tree, identify

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PIPE_BYTES = 1 << 16
_LOOK_S = 1.0
_LEFT_BEHIND_GRACE_S = 1.0


class Order(TypedDict):
    """What a guard is told first."""

    command: list[str]
    environment: dict[str, str]
    cwd: str | None
    token: str
    log: str | None
    """None: the backend writes where edgetool writes."""
    stdout: int | None
    """A descriptor, the same here and there, for the backend's output alone; its errors still go to the log."""
    log_limit_bytes: int
    log_keep: int
    grace_if_orphaned_s: float
    parent: int
    """edgetool's process number."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _Guard:
    def __init__(self, control: socket.socket, order: Order, rest: bytes) -> None:
        self.control = control
        self.order = order
        self.commands = rest
        self.log = (
            RotatingLog(Path(order["log"]), order["log_limit_bytes"], order["log_keep"]) if order["log"] else None
        )
        self.output = -1  # read end of the backend's stdout and stderr
        self.status: int | None = None
        self.main: ProcessId | None = None
        self.main_pid = 0
        self.deadline = math.inf
        """When what is left of the tree is killed (time.monotonic()); finite as soon as the tree has to end."""
        self.wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGTERM:  # only `gpus reap`, or a person, asks the guard itself
            self.end_within(self.order["grace_if_orphaned_s"])

    def end_within(self, grace_s: float) -> None:
        """The tree has to end. A later, shorter grace counts; a longer one does not."""
        self.deadline = min(self.deadline, time.monotonic() + grace_s)

    def start(self) -> bool:
        """Start the backend; False when that failed, which has then been said."""
        output, writer = os.pipe2(os.O_CLOEXEC) if self.log else (-1, -1)
        failure, failed = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            self._become_backend(writer, failed)
        os.close(failed)
        with os.fdopen(failure, "rb") as stream:
            number = stream.read()
        if number:
            os.waitpid(pid, 0)
            self.say({"failed": int(number)})
            return False
        if self.log:
            os.close(writer)
            os.set_blocking(output, False)
            self.output = output
        # the guard must not keep a pipe open whose other end waits for the backend
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1) if self.log else (0, 1, 2):
            os.dup2(null, descriptor)
        self.main_pid, self.main = pid, identify(pid)
        self.say({"started": list(self.main or (pid, 0))})
        return True

    def _become_backend(self, writer: int, failed: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.guard_pid:
                os._exit(127)
            if writer >= 0:
                os.dup2(writer, 1)
                os.dup2(writer, 2)
            if self.order["stdout"] is not None:
                os.dup2(self.order["stdout"], 1)
            for number in range(1, signal.NSIG):  # as a program expects to find them
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if self.order["cwd"] is not None:
                os.chdir(self.order["cwd"])
            os.execvpe(self.order["command"][0], self.order["command"], self.order["environment"])  # noqa: S606
        except OSError as error:
            os.write(failed, str(error.errno).encode())
        finally:
            os._exit(127)

    guard_pid = 0

    def say(self, message: Mapping[str, Any]) -> None:
        """One message to edgetool, which may be gone."""
        with contextlib.suppress(OSError):
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def run(self) -> None:
        """Wait for a reason to end the tree, end it, and say so."""
        while self.status is None and self.deadline == math.inf:
            self.turn(_LOOK_S)
        if self.status is not None:  # the main process has ended by itself: what it left behind has no work any more
            self.end_within(min(_LEFT_BEHIND_GRACE_S, self.order["grace_if_orphaned_s"]))
        end = end_tree(self.find, self.main, lambda: self.deadline, self.turn, self.childless)
        self.turn(0)
        self.say({"ended": {"status": self.status, "seen": end.seen, "killed": end.killed, "left": end.left}})

    def find(self) -> set[ProcessId]:
        """The tree: everything below, and whatever else carries its token."""
        found = descendants(self.guard_pid) | carriers(self.order["token"])
        return {process for process in found if process.pid not in (self.guard_pid, self.order["parent"])}

    def childless(self) -> bool:
        """Whether nothing is below. All orphans come here, so a tree that lives has a child of ours at its root."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    def turn(self, timeout_s: float) -> None:
        """Wait for `timeout_s`, or until a child has ended or the tree has to; log, commands and edgetool's end."""
        until, deadline = time.monotonic() + timeout_s, self.deadline
        while True:
            watched = [self.wakeup] + ([self.control.fileno()] if self.control.fileno() >= 0 else [])
            watched += [self.output] if self.output >= 0 else []
            ready, _, _ = select.select(watched, [], [], max(0.0, until - time.monotonic()))
            if self.wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wakeup, 4096)
            if self.control.fileno() in ready:
                self._obey()
            if os.getppid() != self.order["parent"]:
                self._orphaned()
            more = self.output in ready and self._copy()
            if not more and (self._reap() or self.deadline < deadline or time.monotonic() >= until):
                return

    def _copy(self) -> bool:
        try:
            data = os.read(self.output, _PIPE_BYTES)
        except BlockingIOError:
            return False
        if data and self.log:
            self.log.write(data)
        elif not data:
            os.close(self.output)
            self.output = -1
        return bool(data)

    def _reap(self) -> bool:
        """Whether a child had ended: the backend, or an orphan that became ours."""
        ended = False
        with contextlib.suppress(ChildProcessError):
            while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                ended = True
                if reaped[0] == self.main_pid:
                    self.status = reaped[1]
        return ended

    def _obey(self) -> None:
        try:
            data = self.control.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._orphaned()
            return
        *lines, self.commands = (self.commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "stop" in command:
                self.end_within(float(command["stop"]))
            elif "signal" in command and self.status is None:
                with contextlib.suppress(OSError):
                    os.kill(self.main_pid, command["signal"])  # our own child: its number is ours until it is reaped

    def _orphaned(self) -> None:
        self.control.close()
        self.end_within(self.order["grace_if_orphaned_s"])


def _receive_order(control: socket.socket) -> tuple[Order, bytes] | None:
    data = b""
    while b"\n" not in data:
        piece = control.recv(1 << 16)
        if not piece:
            return None
        data += piece
    line, _, rest = data.partition(b"\n")
    order: Order = json.loads(line)
    return order, rest


def main() -> None:
    """Run as the guard: `python -c "from edgetool.process.guard import main; main()" FD`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    received = _receive_order(control)
    if received is None:
        return
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = _Guard(control, *received)
    _Guard.guard_pid = os.getpid()
    try:
        if guard.start():
            guard.run()
    except BaseException:
        if guard.log:
            guard.log.write(traceback.format_exc().encode())
        end_tree(guard.find, guard.main, lambda: 0.0, guard.turn, guard.childless)
        raise
