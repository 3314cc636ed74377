"""The shared directory of leases: one file for each lease and for each request that waits, flock for all exclusion.

Whoever may read a file can test whether its lock is held; only its owner, the directory's owner and root can remove it
(sticky bit). Nothing is believed of a file that is a link, no regular file, or named differently from the id that it
holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from edgetool.config_sources import own_directory
from edgetool.errors import ConfigError, ResourceUnavailable
from edgetool.scheduler.lease_records import (
    LARGEST_RECORD_BYTES,
    Entry,
    Record,
    Scan,
    parse_record,
    user_name,
    write_record,
)

SHARED_DIRECTORY = Path("/run/lock/edgetool")
SHARED_MODE = 0o1777
_MAKING_MODE = 0o700
_MAKING_LIMIT_S = 5.0
"""Two calls lie between making the directory and opening it to all; a busy machine may stop there for seconds."""

_LEASE = re.compile(r"lease-([0-9a-f]{16})\.json")
_TICKET = re.compile(r"wait-(\d{12})-([0-9a-f]{16})\.json")
_UNFINISHED = re.compile(r"\.new-[0-9a-f]{16}")
_GRANT_LIMIT_S = 20.0
"""A grant takes milliseconds: whoever keeps the directory locked for so long hangs or was stopped."""


def choose_directory(configured: Path | None) -> Path:
    """Where leases are: as configured; else the shared directory; else one of this user's own, where /run/lock is shut.

    A shared directory that is there is never passed over: two directories would be two truths.
    """
    if configured is not None:
        return configured
    if SHARED_DIRECTORY.exists() or os.access(SHARED_DIRECTORY.parent, os.W_OK | os.X_OK):
        return SHARED_DIRECTORY
    return own_directory("state", os.environ) / "leases"


class LeaseDirectory:
    """The records in one directory, which is made when it is not there.

    Raises, from every method:
        ConfigError: the directory cannot be made or used, or lets others remove what is not theirs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory, checked."""
        with self._errors():
            descriptor = self._open()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def locked(self, limit_s: float = _GRANT_LIMIT_S) -> Iterator[OpenDirectory]:
        """The directory, with grants by anybody else kept out.

        The lock is on the directory itself, which cannot be swapped for another by those who write into it.

        Raises:
            ResourceUnavailable: somebody has kept it locked for `limit_s`.
        """
        until = time.monotonic() + limit_s
        pause_s = 0.0005
        while True:
            with self.opened() as descriptor:
                try:
                    with self._errors():
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise ResourceUnavailable(
                            f"{self.path} is locked by {lock_holder(descriptor)} since more than {limit_s:g} s",
                            "a grant takes milliseconds: end that process if it hangs or is stopped",
                        ) from None
                else:
                    try:
                        if self._is_current(descriptor):
                            yield OpenDirectory(descriptor, self.path)
                            return
                    finally:
                        # explicitly, since a fork in another thread may have copied the descriptor
                        fcntl.flock(descriptor, fcntl.LOCK_UN)
            # of different length for each, so that they do not come all at once again
            time.sleep(pause_s * (0.5 + os.urandom(1)[0] / 256))
            pause_s = min(pause_s * 1.3, 0.005)

    def scan(self) -> Scan:
        """All leases and all who wait; takes no lock, so that looking never waits."""
        with self.opened() as descriptor:
            return OpenDirectory(descriptor, self.path).scan()

    def remove_if_free(self, identity: str) -> bool:
        """Remove the file of a lease unless its lock is held; True when the lease is over."""
        with self.opened() as descriptor:
            directory = OpenDirectory(descriptor, self.path)
            name = f"lease-{identity}.json"
            entry = directory.read(name, identity)
            if entry is not None and entry.held:
                return False
            if entry is not None:
                directory.remove(name)
            return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = self.path.stat(follow_symlinks=False)
        except OSError:
            return False
        here = os.fstat(descriptor)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        until = time.monotonic() + _MAKING_LIMIT_S
        while True:
            late = time.monotonic() >= until
            with contextlib.suppress(FileExistsError):
                if not self.path.is_dir() and not self.path.is_symlink():
                    self._make()
            try:
                descriptor = os.open(self.path, flags)
            except FileNotFoundError:
                if late:
                    raise ConfigError(f"the lock directory {self.path} disappears as soon as it is made") from None
            except PermissionError:
                # somebody may be between making it and opening it to all
                if late:
                    raise
            else:
                found = os.fstat(descriptor)
                # the same, as root sees it
                unfinished = found.st_uid != os.geteuid() and stat.S_IMODE(found.st_mode) == _MAKING_MODE
                try:
                    if late or not unfinished:
                        self._check(found)
                        return descriptor
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
            time.sleep(0.01)

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=_MAKING_MODE)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, SHARED_MODE)  # mkdir's own mode is cut by the umask
        finally:
            os.close(descriptor)

    def _check(self, found: os.stat_result) -> None:
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            raise ConfigError(
                f"the lock directory {self.path} has mode {mode:04o}: others could remove leases that are not theirs",
                f"chmod 1777 {self.path}",
            )
        if found.st_uid not in {0, os.geteuid()} and mode & 0o1002 != 0o1002:
            raise ConfigError(
                f"the lock directory {self.path} belongs to {user_name(found.st_uid)} and has mode {mode:04o}",
                f"it must be open to all users: chmod 1777 {self.path}",
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            link = error.errno in {errno.ELOOP, errno.ENOTDIR}
            raise ConfigError(
                f"the lock directory {self.path} cannot be used: "
                + ("it is not a directory (a link is refused)" if link else os.strerror(error.errno or 0)),
                "set EDGETOOL_LOCK_DIR, or let an administrator make it: install -d -m 1777 " + str(self.path),
            ) from error


class OpenDirectory:
    """The records of a directory that is open; those that write need its lock."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    def scan(self, clean: bool = False) -> Scan:
        """All records. `clean` (which needs the lock): remove our own files of processes that were killed."""
        leases: list[Entry] = []
        waiting: list[tuple[int, Entry]] = []
        for name in os.listdir(self.descriptor):  # noqa: PTH208 - pathlib knows no directory descriptors
            if match := _LEASE.fullmatch(name):
                entry, number = self.read(name, match[1]), -1
            elif match := _TICKET.fullmatch(name):
                entry, number = self.read(name, match[2]), int(match[1])
            else:
                if clean and _UNFINISHED.fullmatch(name):
                    self._remove_ours(name)
                continue
            if entry is None:
                continue
            if clean and not entry.held and entry.uid == os.geteuid():
                self.remove(name)
            elif number < 0:
                leases.append(entry)
            elif entry.held:
                waiting.append((number, entry))
        leases.sort(key=lambda entry: (entry.record.since_unix_s, entry.record.id))
        waiting.sort(key=lambda item: (item[0], item[1].record.id))
        return Scan(tuple(leases), tuple(entry for _, entry in waiting))

    def add_lease(self, record: Record) -> int:
        """Write a lease; the descriptor returned holds it."""
        return self._add(record, f"lease-{record.id}.json")

    def add_ticket(self, record: Record) -> tuple[int, str]:
        """Queue behind all that wait; the descriptor holds the place, the name is that of its file."""
        names = os.listdir(self.descriptor)  # noqa: PTH208 - pathlib knows no directory descriptors
        numbers = [int(match[1]) for name in names if (match := _TICKET.fullmatch(name))]
        # names are anybody's to choose: one with the largest number must not close the queue
        number = min(max(numbers, default=0) + 1, 10**12 - 1)
        name = f"wait-{number:012d}-{record.id}.json"
        return self._add(record, name), name

    def read(self, name: str, identity: str) -> Entry | None:
        """One record; None when it is gone or is none."""
        try:
            descriptor = self._open(name)
        except OSError:
            return None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_RECORD_BYTES:
                return None
            # the lock first: what is written down while it is held cannot be half of a record that ends
            held = _is_held(descriptor)
            for _ in range(3):
                record = parse_record(os.pread(descriptor, LARGEST_RECORD_BYTES, 0), identity)
                if record is not None:
                    return Entry(record, found.st_uid, held, (found.st_dev, found.st_ino), found.st_mtime)
                time.sleep(0.001)  # its owner may be writing into it (Lease.adopt)
            return None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone, or is not ours to remove, is left."""
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(name, dir_fd=self.descriptor)

    def _remove_ours(self, name: str) -> None:
        found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        if found.st_uid == os.geteuid():
            self.remove(name)

    def _open(self, name: str) -> int:
        # not blocking: a pipe of that name must not stop us
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=self.descriptor)

    def _add(self, record: Record, name: str) -> int:
        temporary = f".new-{record.id}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o600, dir_fd=self.descriptor)
        except OSError as error:
            raise ConfigError(
                f"cannot write into the lock directory {self.path}: {os.strerror(error.errno or 0)}",
                f"it must be open to all users: chmod 1777 {self.path}",
            ) from error
        try:
            # held before it can be seen, complete before it can be seen, readable by all whatever the umask
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_record(descriptor, record)
            os.fchmod(descriptor, 0o644)
            os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException as error:
            os.close(descriptor)
            self.remove(temporary)
            if isinstance(error, OSError):
                raise ResourceUnavailable(
                    f"cannot write into the lock directory {self.path}: {os.strerror(error.errno or 0)}",
                    "free some space in its file system",
                ) from error
            raise
        return descriptor


def lock_holder(descriptor: int) -> str:
    """In words, who took the lock of the file behind `descriptor` (proc_locks(5))."""
    found = os.fstat(descriptor)
    key = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if key in fields and "FLOCK" in fields and "->" not in fields:
                pid = fields[4]
                with contextlib.suppress(OSError):
                    user = user_name(Path(f"/proc/{pid}").stat().st_uid)
                    return f"process {pid} of {user}"
                return f"process {pid}"
    return "a process that cannot be seen"


def _is_held(descriptor: int) -> bool:
    try:
        # shared, so that two who look at the same time do not take each other for the holder
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
