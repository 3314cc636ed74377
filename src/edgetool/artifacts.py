"""Output directories that are either whole or absent, file hashes, and the run manifest edgetool.json.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetool.errors import BadInput, ResourceUnavailable

MANIFEST_NAME = "edgetool.json"

_HASH_CHUNK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TOO_LARGE = {errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_HASH_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what an operating system says about a full or closed disk into an error a user can act on.

    Raises:
        ResourceUnavailable: the disk (or the quota) that holds `path` is full, or a file is larger than it may be.
        BadInput: `path` may not be written, or the directory that it is in is gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceUnavailable(
                f"disk full while writing {path} ({_free_bytes(path):,} bytes free)",
                "free some space, then run the same command again with --resume",
            ) from error
        if error.errno in _TOO_LARGE:
            raise ResourceUnavailable(
                f"a file in {path} is larger than the file system or `ulimit -f` allows",
                "raise the limit and add --resume, or use a smaller --max-shard-size",
            ) from error
        removed = error.errno == errno.ENOENT and not path.parent.exists()  # by somebody, while it was written to
        if removed or error.errno in _REFUSED:
            raise BadInput(
                f"cannot write {path}: {os.strerror(error.errno or 0)}", "choose another --output directory"
            ) from error
        raise


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` so that after a crash at any moment `path` holds either its old content or all of `data`."""
    temporary = path.with_name(_temporary_of(path.name, os.getpid()))
    with disk_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _temporary_of(name: str, process: object) -> str:
    return f".{name}.{process}.tmp"


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write `edgetool.json` into `directory`: UTF-8 JSON, keys sorted, indented by 2, one newline at the end."""
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    atomic_write(directory / MANIFEST_NAME, text.encode() + b"\n")


class OutputDirectory:
    """The output of one run, filled beside its final place and moved there when complete.

        with OutputDirectory(output, overwrite=False, resume=True) as out:
            ...write into out.partial...
            out.publish()

    Entering checks, takes a lock against a second run into the same place, and creates `<output>.partial`. Leaving
    without `publish()` keeps the partial directory, so that a stopped or failed run can be resumed; `discard()`
    removes it where there is nothing worth keeping. With `overwrite` the old output stays until the new one is whole.
    """

    def __init__(self, output: Path, overwrite: bool = False, resume: bool = False) -> None:
        # absolute() first: the place must not move when the job changes its working directory
        self.output = Path(os.path.normpath(output.absolute()))
        self.overwrite = overwrite
        self.resume = resume
        self._lock_fd: int | None = None

    @property
    def partial(self) -> Path:
        """The directory to write into: `<output>.partial`, on the same file system as the output."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def resuming(self) -> bool:
        """Whether an earlier run's partial directory is there and may be continued."""
        return self.resume and self.partial.is_dir()

    def check(self) -> None:
        """Refuse what cannot become an output, without writing anything (for `--dry-run`).

        Raises:
            BadInput: the output exists and may not be replaced, an unfinished one is in the way, or the place
                cannot be written.
            ResourceUnavailable: the unfinished one in the way is another process's, which is still running.
        """
        if self.output.is_symlink() or self.output.exists():
            self._check_replaceable()
        if self.partial.exists() and not (self.resume or self.overwrite):
            self._refuse_beside_another_run()
            raise BadInput(
                f"an unfinished run is in the way: {self.partial}",
                "add --resume to go on with it, or --overwrite to start again",
            )
        parent = self.output.parent
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise BadInput(f"cannot write {self.output}: {parent} is not a directory", "choose another --output")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise BadInput(f"cannot write {self.output}: no permission to write in {parent}", "choose another --output")

    def _check_replaceable(self) -> None:
        if self.output.is_symlink() or not self.output.is_dir():
            raise BadInput(f"output {self.output} exists and is not a directory", "choose another --output")
        if not self.overwrite:
            raise BadInput(f"output {self.output} exists already", "add --overwrite to replace it, or choose another")
        # --overwrite deletes what was there: a slip of the hand must not cost a home or a project directory
        here, home = Path.cwd(), Path.home()
        holds_work = any(self.output.iterdir())
        ours = (self.output / MANIFEST_NAME).is_file()
        if self.output in {here, home, *here.parents, *home.parents} or (holds_work and not ours):
            raise BadInput(
                f"refused to overwrite {self.output}: it was not written by edgetool (no {MANIFEST_NAME})",
                "remove it yourself, or choose another --output",
            )

    def open(self) -> None:
        """Check, lock and create the partial directory; raises as `check()`, and ResourceUnavailable when locked."""
        self.check()
        with disk_errors(self.output):
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:
                raise BadInput(f"cannot write {self.output}: its parent directory cannot be created") from error
            self._lock()
            try:
                self.check()  # the other run may have finished between the first check and the lock
                for stale in self.output.parent.glob(glob.escape(f".{self.output.name}.old-") + "*"):
                    shutil.rmtree(stale, ignore_errors=True)
                if self.partial.exists() and not self.resume:
                    shutil.rmtree(self.partial)
                self.partial.mkdir(exist_ok=True)
                for stale in self.partial.glob(_temporary_of("*", "*")):  # of an atomic_write that was killed
                    stale.unlink()
            except BaseException:
                self.close()
                raise

    def publish(self) -> None:
        """Make the partial directory the output: every file is on the disk before its name appears."""
        with disk_errors(self.output):
            for directory, _, names in os.walk(self.partial):
                for name in names:
                    _sync(Path(directory) / name)
                _sync(Path(directory))
            aside = self.output.with_name(f".{self.output.name}.old-{os.getpid()}")
            if not self.output.exists():
                self.partial.rename(self.output)
            elif _exchange(self.partial, self.output):
                self.partial.rename(aside)
            else:
                self.output.rename(aside)
                self.partial.rename(self.output)
            _sync(self.output.parent)
            shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the partial directory and everything in it."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def discard_unfinished(self) -> None:
        """Remove what a run that has ended left unfinished; the output itself stays as it is.

        Raises ResourceUnavailable while another run writes there.
        """
        if not self.partial.is_dir():
            return
        with disk_errors(self.output):
            self._lock()
            try:
                self.discard()
            finally:
                self.close()

    def close(self) -> None:
        """Give the lock back. What is in the partial directory stays."""
        if self._lock_fd is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> OutputDirectory:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _lock_path(self) -> Path:
        return self.output.with_name(f".{self.output.name}.lock")

    def _refuse_beside_another_run(self) -> None:
        """Raise ResourceUnavailable while another process holds the lock; takes and leaves nothing."""
        if self._lock_fd is not None:
            return
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken(descriptor) from None
            finally:
                os.close(descriptor)

    def _taken(self, descriptor: int) -> ResourceUnavailable:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        return ResourceUnavailable(
            f"another run (process {holder}) is writing {self.output}", "wait for it, or choose another --output"
        )

    def _lock(self) -> None:
        while True:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = self._taken(descriptor)
                os.close(descriptor)
                raise taken from None
            # The holder removes the file as it leaves: a lock on a file that has lost its name guards nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._lock_path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    self._lock_fd = descriptor
                    return
            os.close(descriptor)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two directories in one step (Linux renameat2, RENAME_EXCHANGE); False where that cannot be had."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(left), at_fdcwd, os.fsencode(right), rename_exchange) == 0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0
