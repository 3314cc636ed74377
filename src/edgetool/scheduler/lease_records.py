"""What is written down about leases, and about those who wait for one: records, their owners, their text.

A record is JSON that its user wrote and all users read. What it says is believed of its owner only: the user is the
file's owner, never a name in the text.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgetool.process.tree import ProcessId, identify

DIRECTORY_VARIABLE = "EDGETOOL_LOCK_DIR"
"""Where that lease is; a process that finds it in its environment leases in the same directory."""
LEASE_FDS_VARIABLE = "EDGETOOL_LEASE_FDS"
"""The numbers of the inherited descriptors that hold the lease, separated by commas."""

_ID = re.compile(r"[0-9a-f]{16}")
LARGEST_RECORD_BYTES = 1 << 16
_SECRET = re.compile(r"(?i)(key|token|secret|passw(or)?d|credential)")


@dataclass(frozen=True)
class Share:
    """What a lease reserves of one GPU or MIG instance."""

    uuid: str
    memory_bytes: int


@dataclass(frozen=True)
class Record:
    """What is written down about one lease, or about one request that waits for one.

    Attributes:
        pid, start_ticks: the process that holds or wants the lease (number, start in clock ticks after boot).
        pid_namespace: where that number means something (the inode of /proc/self/ns/pid).
        since_unix_s: when it was granted or asked for.
        within: id of the lease that the owner itself works under; what is leased then is a part of that.
        members: children that were named by Lease.adopt, as (pid, start_ticks).
        released: its owner has let go, and processes that inherited it go on.
        wanted: the request, of one that waits.
    """

    id: str
    pid: int
    start_ticks: int
    pid_namespace: int
    command: str
    since_unix_s: float
    gpus: tuple[Share, ...] = ()
    exclusive: bool = False
    ports: tuple[int, ...] = ()
    board: str | None = None
    within: str | None = None
    members: tuple[ProcessId, ...] = ()
    released: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A record as found in the directory. `held`: its lock is taken; else the lease is over, whatever the file says."""

    record: Record
    uid: int
    held: bool
    inode: tuple[int, int]
    """Device and inode of the file: how a descriptor that holds it is recognised."""
    touched_unix_s: float = 0.0
    """When its owner last touched it; who waits does so at every look."""

    @property
    def user(self) -> str:
        """Name of the user whose lease it is."""
        return user_name(self.uid)

    @property
    def process(self) -> ProcessId:
        """The process that asked for the lease."""
        return ProcessId(self.record.pid, self.record.start_ticks)

    @property
    def same_namespace(self) -> bool:
        """Whether the process numbers in the record are numbers that this process sees."""
        return self.record.pid_namespace == pid_namespace()

    @property
    def orphaned(self) -> bool:
        """The lock is free, or held only by processes that outlive the owner or that it has let go of."""
        if not self.held or self.record.released:
            return True
        return self.same_namespace and not _runs(self.process)


def _runs(process: ProcessId) -> bool:
    found = identify(process.pid)
    if found is not None:
        return found == process
    try:
        os.kill(process.pid, 0)
    except PermissionError:
        # it is there, and /proc hides other users' processes (mount option hidepid)
        return not Path(f"/proc/{process.pid}").exists()
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class Scan:
    """The records of a directory at one moment.

    Attributes:
        leases: oldest first; those that are not held are over, and their files not removed yet.
        waiting: the requests whose processes still wait, first come first.
    """

    leases: tuple[Entry, ...]
    waiting: tuple[Entry, ...]


@cache
def user_name(uid: int) -> str:
    """The name of a user, or the number where there is no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def process_uid(pid: int) -> int | None:
    """The real user of a process; None when it is gone."""
    try:
        # the owner of /proc/PID itself is root for programs that may not be inspected
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Uid:")), None)


@cache
def pid_namespace() -> int:
    """The namespace of this process's number; containers have their own."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def new_record(command: str, **resources: Any) -> Record:
    """A record of this process, with a fresh id."""
    own = identify(os.getpid())
    start_ticks = own.start_ticks if own else 0
    return Record(
        os.urandom(8).hex(), os.getpid(), start_ticks, pid_namespace(), command[:500], time.time(), **resources
    )


def lease_ids(variable: str | None) -> list[str]:
    """The ids in a value of EDGETOOL_LEASE, outermost first."""
    return [part for part in (variable or "").split(":") if _ID.fullmatch(part)]


def shown_command(arguments: list[str]) -> str:
    """A command line for records, which all users can read: what looks like a secret is left out."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET.search(name)) and (argument.startswith("-") or (bool(equals) and name.isidentifier()))
        shown.append("***" if hide else f"{name}=***" if secret and equals else argument)
        hide = secret and not equals and not hide
    return " ".join(" ".join(shown).split())


def write_record(descriptor: int, record: Record) -> None:
    """Write a record into its file, in place: the lock is on the file, and another file would have none."""
    data = json.dumps(asdict(record)).encode() + b"\n"
    if len(data) > LARGEST_RECORD_BYTES:
        raise ValueError(f"a record of {len(data)} bytes would be read by nobody")
    # padded, so that a shorter text never leaves a tail and never needs the file to be cut
    data = data.ljust(os.fstat(descriptor).st_size)
    if os.pwrite(descriptor, data, 0) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def parse_record(data: bytes, identity: str) -> Record | None:
    """The record in the file of the lease `identity`; None when the text is no record, or one of another lease."""
    try:
        raw = json.loads(data)
        record = Record(
            id=str(raw["id"]),
            pid=int(raw["pid"]),
            start_ticks=int(raw["start_ticks"]),
            pid_namespace=int(raw["pid_namespace"]),
            command="".join(c if c.isprintable() else "?" for c in str(raw["command"]))[:500],
            since_unix_s=float(raw["since_unix_s"]),
            gpus=tuple(Share(str(share["uuid"]), max(0, int(share["memory_bytes"]))) for share in raw["gpus"]),
            exclusive=bool(raw["exclusive"]),
            ports=tuple(int(port) for port in raw["ports"]),
            board=None if raw["board"] is None else str(raw["board"]),
            within=None if raw["within"] is None else str(raw["within"]),
            members=tuple(ProcessId(int(pid), int(start)) for pid, start in raw["members"]),
            released=bool(raw["released"]),
            wanted=dict(raw["wanted"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # a copy or a hard link under another name is not the lease that it says it is
    return record if record.id == identity and _ID.fullmatch(record.id) else None
