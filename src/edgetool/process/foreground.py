"""A command run in place of this process: same terminal, signals passed on, its exit code the result.

The command stays in this process's session and process group, so that it can read from the terminal and be stopped
with Ctrl-Z. What the terminal sends (Ctrl-C) reaches it by itself and is not sent twice.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgetool.errors import BadInput

_WAITED = {
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD),
}
_LOOK_S = 1.0
"""Where another thread takes the signal that tells of the end, the end is seen after this time."""
_SI_KERNEL = 0x80
"""si_code of a signal that the kernel sent by itself, such as a terminal's (sigaction(2))."""


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    stdout: int = 1,
    started: Callable[[int], None] = lambda _pid: None,
) -> int:
    """Run `command` until it ends.

    Args:
        command: program and arguments; the program is looked for in PATH.
        env: its whole environment.
        pass_fds: descriptors that it inherits under the same numbers.
        stdout: the descriptor that is its standard output.
        started: called with its process number.

    Returns:
        Its exit code, or 128 + the number of the signal that ended it, as shells say it.

    Raises:
        BadInput: there is no such program, or it cannot be run.
    """
    with _blocked(_WAITED), _inheritable(pass_fds):
        try:
            if not command[0]:  # an empty variable of the shell, which posix_spawnp calls a ValueError
                raise FileNotFoundError
            pid = os.posix_spawnp(
                command[0],
                list(command),
                dict(env),
                file_actions=[(os.POSIX_SPAWN_DUP2, stdout, 1)] if stdout != 1 else [],
                setsigmask=(),
                # python ignores these, and an ignored signal stays ignored in a child; what the user ignores (nohup)
                # is to stay so
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except OSError as error:
            name = command[0]
            missing = isinstance(error, FileNotFoundError)
            raise BadInput(
                f"cannot run {name!r}: {'no such program' if missing else os.strerror(error.errno or 0)}",
                f"did you mean ./{name}?" if missing and Path(name).is_file() else None,
            ) from error
        started(pid)
        while True:
            got = signal.sigtimedwait(_WAITED, _LOOK_S)
            if got is not None and got.si_signo != signal.SIGCHLD and got.si_code != _SI_KERNEL:
                os.kill(pid, got.si_signo)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == pid:
                return _code(status)


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


@contextmanager
def _blocked(numbers: set[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        # a Ctrl-C that ended the command has had its effect
        while signal.sigtimedwait(numbers, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _inheritable(descriptors: Sequence[int]) -> Iterator[None]:
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
