"""Programs that nobody has read, run so that they can harm nothing: the side of edgetool.

Four kinds of isolation, the strongest that works here is taken, found out by running a trial in each:

| kind | files | processes | for |
|---|---|---|---|
| namespaces | a root of its own: system and Python read-only, a limited /tmp | sees only its own | root and users |
| bubblewrap | the same, built by bwrap | sees only its own | users who get namespaces from bwrap only |
| landlock | reads system and Python, writes its own directory | no signals out (Linux 6.12) | containers |
| limits | whatever the user may | whatever the user may | where there is nothing better |

In all: no network, an empty environment, no new privileges, filtered system calls, limits of CPU time, address space,
file size, descriptors and processes, and a watch over wall time, memory, disk and output that ends the whole tree.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool.errors import BackendFailed, ResourceUnavailable
from edgetool.evaluation import sandbox_bubblewrap as bubblewrap
from edgetool.evaluation.sandbox_talk import Talk
from edgetool.evaluation.sandbox_watch import Watch
from edgetool.process.tree import TREE_VARIABLE, carriers, send

KINDS = ("namespaces", "bubblewrap", "landlock", "limits")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LAUNCHER = (
    f"import sys; sys.path.append({_PACKAGE_ROOT!r}); from edgetool.evaluation.sandbox_launcher import main; main()"
)
_LAUNCHER_FILES = [
    f"{_PACKAGE_ROOT}/edgetool/{name}.py"
    for name in (
        "__init__",
        "process/__init__",
        "process/tree",
        "evaluation/__init__",
        "evaluation/sandbox_launcher",
        "evaluation/sandbox_kernel",
    )
]
_FIRST_UID, _UIDS = 61184, 4336
"""Numbers that systemd gives out for a while and nobody else has; one for each run, so that limits count it alone."""
_START_LIMIT_S = 60.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Limits:
    """What a program may use. Whoever asks for more gets an error; whoever gets around that is ended.

    address_space_bytes: of one process. memory_bytes: resident, of all its processes together. disk_bytes: of its
    directory. processes: threads count. output_bytes: on stdout.
    """

    wall_s: float = 60.0
    cpu_s: int = 60
    address_space_bytes: int = 4 << 30
    memory_bytes: int = 4 << 30
    disk_bytes: int = 64 << 20
    processes: int = 64
    descriptors: int = 256
    output_bytes: int = 4 << 20


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    returncode: of the program, minus the signal that ended it; None when it was ended from outside. ended_by: the limit
    that was broken ("time", "memory", "disk", "output"), "machine" (whose memory others took), "stopped", or None.
    errors: the end of its stderr.
    """

    returncode: int | None
    output: bytes
    errors: str
    ended_by: str | None
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """One way to run a program. Made by `sandbox_choice.open_sandbox`; may be used from several threads, one run each.

    kind: of `KINDS`. readable: directories and files that programs may read besides the system's and Python's.
    warnings: what this kind leaves open, one sentence each.
    """

    kind: str
    readable: tuple[str, ...]
    limits: Limits
    warnings: tuple[str, ...] = ()
    filtered: bool = True
    change_user: bool = field(default_factory=lambda: os.geteuid() == 0)

    def run(
        self,
        program: Path,
        arguments: Sequence[str] = (),
        stdin: bytes = b"",
        *,
        limits: Limits | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Run a Python program; it reads `stdin` and answers on stdout.

        Raises BackendFailed when the sandbox itself could not be set up. The calling thread must live until it returns.
        """
        limits = limits or self.limits
        scratch = None if self.kind in ("namespaces", "bubblewrap") else Path(tempfile.mkdtemp(prefix="edgetool-run-"))
        try:
            return self._run(program, arguments, stdin, limits, scratch, stopped)
        finally:
            if scratch is not None:
                _remove(scratch)

    def _run(
        self,
        program: Path,
        arguments: Sequence[str],
        stdin: bytes,
        limits: Limits,
        scratch: Path | None,
        stopped: Callable[[], bool],
    ) -> Outcome:
        token = secrets.token_hex(8)
        uid = _FIRST_UID + secrets.randbelow(_UIDS) if self.change_user else None
        if scratch is not None and uid is not None:
            os.chown(scratch, uid, uid)
        order = self._order(program, arguments, limits, scratch, uid, token)
        reading, writing = os.pipe()
        begun = time.monotonic()
        try:
            process = subprocess.Popen(
                self._words(order, writing),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={TREE_VARIABLE: token, **_libraries()},
                pass_fds=(writing,),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            os.close(reading)
            raise ResourceUnavailable(f"no process for generated code could be started: {error.strerror}") from error
        finally:
            os.close(writing)
        talk = Talk(process, reading, stdin, limits.output_bytes)
        watch = Watch(process.pid, limits.memory_bytes, limits.disk_bytes, scratch)
        ended_by: str | None = None
        try:
            while talk.open(_LOOK_S):
                if stopped():
                    ended_by = "stopped"
                elif talk.flooded:
                    ended_by = "output"
                elif talk.began is not None and time.monotonic() - talk.began > limits.wall_s:
                    ended_by = "time"
                elif talk.began is None and time.monotonic() - begun > _START_LIMIT_S:
                    raise BackendFailed("the sandbox for generated code did not start in a minute")
                else:
                    ended_by = watch.broken()
                if ended_by is not None:
                    break
        finally:
            self._end(process, token)
            talk.close()
        if talk.failed is not None:
            raise BackendFailed(f"the sandbox ({self.kind}) could not be set up: {talk.failed}")
        if talk.ended is None and ended_by is None and talk.began is None:
            raise BackendFailed(
                f"the sandbox ({self.kind}) ended before it began: {talk.errors.decode(errors='replace')}"
            )
        status = talk.ended if ended_by is None else None
        return Outcome(
            returncode=None if status is None else os.waitstatus_to_exitcode(status),
            output=bytes(talk.output),
            errors=talk.errors.decode(errors="replace"),
            ended_by=ended_by,
            seconds=time.monotonic() - (talk.began or begun),
        )

    def _order(
        self, program: Path, arguments: Sequence[str], limits: Limits, scratch: Path | None, uid: int | None, token: str
    ) -> dict[str, Any]:
        place = "/tmp" if scratch is None else str(scratch)  # noqa: S108  inside it is a file system of its own
        source = str(program.resolve())
        processes = limits.processes
        if uid is None and not (self.kind == "namespaces" and _counts_by_namespace()):
            processes += _threads_of(os.getuid())  # the limit counts all that this user runs
        return {
            "kind": self.kind,
            "parent": os.getpid(),
            "command": [sys.executable, "-I", "-B", source, *arguments],
            "readable": [*self.readable, source, *_library_places()],
            "scratch": place,
            "scratch_bytes": limits.disk_bytes,
            "environment": {
                "HOME": place,
                "TMPDIR": place,
                "LANG": "C.UTF-8",
                "OPENBLAS_NUM_THREADS": "1",
                TREE_VARIABLE: token,
                **_libraries(),
            },
            "uid": uid,
            "filtered": self.filtered,
            "rlimits": {
                "CPU": (limits.cpu_s, limits.cpu_s + 5),
                "AS": (limits.address_space_bytes,) * 2,
                "FSIZE": (limits.disk_bytes,) * 2,
                "NOFILE": (limits.descriptors,) * 2,
                "NPROC": (processes,) * 2,
                "CORE": (0, 0),
                "MEMLOCK": (0, 0),
            },
            "wall_s": limits.wall_s,
        }

    def _words(self, order: dict[str, Any], status: int) -> list[str]:
        launcher = [sys.executable, "-I", "-S", "-B", "-c", _LAUNCHER, json.dumps(order), str(status)]
        if self.kind != "bubblewrap":
            return launcher
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise BackendFailed("no program bwrap is installed")
        return [*bubblewrap.words(bwrap, [*order["readable"], *_LAUNCHER_FILES], order["scratch_bytes"]), *launcher]

    def _end(self, process: subprocess.Popen[bytes], token: str) -> None:
        """End the whole tree. In namespaces the kernel does that when the launcher is gone."""
        if self.kind in ("landlock", "limits") and process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the launcher ends what is below it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(6)
        if process.poll() is None:  # not waited for yet, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self.kind in ("landlock", "limits"):  # should the program have killed the launcher
            for _ in range(50):
                left = [one for one in carriers(token) if one.pid != os.getpid()]
                if not left:
                    break
                for one in left:
                    send(one, signal.SIGKILL)


def _libraries() -> dict[str, str]:
    """Where Python's own libraries are, if that is said in the environment, as modules on clusters do."""
    return {"LD_LIBRARY_PATH": ":".join(places)} if (places := _library_places()) else {}


def _library_places() -> list[str]:
    places = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [place for place in places if place.startswith("/") and place != "/" and Path(place).is_dir()]


def _counts_by_namespace() -> bool:
    """Whether the limit of processes counts those of a user namespace only: Linux 5.14 and later."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(itertools.takewhile(str.isdigit, minor)) or 0)) >= (5, 14)


def _threads_of(uid: int) -> int:
    count = 0
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if directory.name.isdigit() and directory.stat().st_uid == uid:
                count += sum(1 for _ in (directory / "task").iterdir())
    return count


def _remove(directory: Path) -> None:
    """Remove a directory whatever its modes were made."""
    for place, _, _ in os.walk(directory, topdown=True):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)
