"""What a model has answered, kept on disk, so that nothing is asked twice: JSON lines that are only ever appended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgetool.artifacts import disk_errors
from edgetool.errors import ResourceUnavailable

_LOOK_AGAIN_S = 0.2


def key_of(kind: str, *parts: Any) -> str:
    """Name of a question: SHA-256 (64 hex digits) of `kind` and of `parts` as canonical JSON.

    `parts` are JSON values; tuples count as lists, and the order of a mapping's keys does not matter.
    """
    text = json.dumps([kind, *parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class InUse(ResourceUnavailable):
    """Another run holds the file: it asks the same model the same."""


class Answers:
    """Answers of one target under one set of settings, by key.

    `put` hands a line to the operating system at once, so a killed process loses nothing of it; `flush` brings the
    lines to the disk, so that a crash of the machine loses nothing either. One process at a time holds the file.
    """

    def __init__(self, path: Path, descriptor: int, known: dict[str, Any], size_bytes: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._known = known
        self._size_bytes = size_bytes
        self._pending = False

    @classmethod
    def open(cls, path: Path, *, wait_s: float = 0) -> Self:
        """Take up the file at `path`, or begin it. A last line torn by a crash counts as not written.

        Raises InUse where another process holds the file for longer than `wait_s`, ResourceUnavailable where the disk
        is full, and BadInput where the place may not be written.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(path, time.monotonic() + wait_s)
            try:
                data = path.read_bytes()
                whole, newline, _ = data.rpartition(b"\n")
                size_bytes = len(whole) + len(newline)
                os.ftruncate(descriptor, size_bytes)
                return cls(path, descriptor, _parsed(whole), size_bytes)
            except BaseException:
                os.close(descriptor)
                raise

    def get(self, key: str) -> Any | None:
        """The answer to `key`, None where there is none. An answer that was read from the file has no tuples."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value`, any JSON value but None. Writing again what is known writes nothing."""
        if value is None:
            raise ValueError("None is the absence of an answer")
        if key in self._known and self._known[key] == value:
            return
        line = json.dumps([key, value], separators=(",", ":")).encode() + b"\n"
        assert self._descriptor is not None, "the file is closed"
        with disk_errors(self.path):
            try:
                written = os.write(self._descriptor, line)
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                os.ftruncate(self._descriptor, self._size_bytes)  # the next line must begin on a line of its own
                raise
        self._size_bytes += len(line)
        self._known[key] = value
        self._pending = True

    def flush(self) -> None:
        """Bring everything that was put to the disk."""
        if self._pending and self._descriptor is not None:
            with disk_errors(self.path):
                os.fsync(self._descriptor)
            self._pending = False

    def close(self) -> None:
        """Flush, and let others have the file."""
        if self._descriptor is not None:
            try:
                self.flush()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _locked(path: Path, until: float) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= until:
                raise InUse(
                    f"another evaluation of the same model with the same settings is running; it holds {path}",
                    "wait until it has ended: what it has answered will then be taken from there",
                ) from None
            time.sleep(_LOOK_AGAIN_S)
            continue
        # The holder may have removed the file while we waited: its lock is then worth nothing.
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _parsed(data: bytes) -> dict[str, Any]:
    """Key -> value; a damaged line is one answer less, and the question is asked again."""
    known: dict[str, Any] = {}
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, list) and len(record) == 2 and isinstance(record[0], str) and record[1] is not None:
            known[record[0]] = record[1]
    return known
