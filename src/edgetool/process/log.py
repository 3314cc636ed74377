"""The log of a child process: written with a limit on its size, followed by line while it grows.

Standard library only: the guard process imports this too.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_CHUNK_BYTES = 1 << 16
_LINE_LIMIT_BYTES = 1 << 16
_ENDS = re.compile(rb"\r\n|\r|\n")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f]")


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`. Logs are for their owner alone: they may hold prompts.

    Raises:
        OSError: `path` cannot be written.
    """
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def older(path: Path, number: int) -> Path:
    """The name of the log that was full `number` files ago: `server.log.1`, ..."""
    return path.with_name(f"{path.name}.{number}")


class RotatingLog:
    """Appends to `path`; at `limit_bytes` the file becomes `path.1`, that one `path.2`, up to `keep` old ones.

    A disk that is full must not end the process that is logged: what does not fit is counted and said later.
    """

    def __init__(self, path: Path, limit_bytes: int, keep: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.keep = keep
        self._descriptor = open_log(path)
        self._size_bytes = os.fstat(self._descriptor).st_size
        self._lost_bytes = 0

    def write(self, data: bytes) -> None:
        """Append `data`; never raises OSError."""
        if self._size_bytes and self._size_bytes + len(data) > self.limit_bytes:
            self._rotate()
        try:
            if self._lost_bytes:
                note = f"\n[{self._lost_bytes} bytes of output lost: the log could not be written]\n".encode()
                self._size_bytes += os.write(self._descriptor, note)
                self._lost_bytes = 0
            written = os.write(self._descriptor, data)
        except OSError:
            written = 0
        self._size_bytes += written
        self._lost_bytes += len(data) - written

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            names = [self.path, *(older(self.path, number) for number in range(1, self.keep + 1))]
            if self.path.exists():  # not so when an earlier attempt failed half way
                names[-1].unlink(missing_ok=True)
                for number in range(self.keep, 0, -1):
                    if names[number - 1].exists():
                        names[number - 1].replace(names[number])
            fresh = open_log(self.path)
            os.close(self._descriptor)
            self._descriptor, self._size_bytes = fresh, 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class LogFollower:
    """Reads what a log gains after this object was made, as lines; follows it when it is rotated.

    With `from_start` what it holds already comes first.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self.path = path
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not from_start:
            os.lseek(self._descriptor, 0, os.SEEK_END)
        self._rest = b""

    def lines(self, *, final: bool = False) -> list[str]:
        """The lines that ended since the last call; a carriage return ends one as well (progress bars).

        Empty lines are left out, colours and other control codes removed. `final`: an unfinished last line too.
        """
        while piece := self._read():
            self._rest += piece
        parts = _ENDS.split(self._rest)
        # a \r at the very end may be half of a \r\n: either way the line in front of it has ended
        self._rest = b"" if final or len(parts[-1]) > _LINE_LIMIT_BYTES else parts.pop()
        texts = (_CONTROL.sub("", part.decode(errors="replace")).rstrip() for part in parts)
        return [text for text in texts if text]

    def _read(self) -> bytes:
        if piece := os.read(self._descriptor, _CHUNK_BYTES):
            return piece
        try:
            fresh = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        if os.path.sameopenfile(fresh, self._descriptor):
            os.close(fresh)
            return b""
        # the writer moved on before the new name was there: whatever it wrote to the old file can be read now
        last = os.read(self._descriptor, _CHUNK_BYTES)
        if last:
            os.close(fresh)
            return last
        os.close(self._descriptor)
        self._descriptor = fresh
        return os.read(self._descriptor, _CHUNK_BYTES)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def log_end(path: Path) -> tuple[int, int]:
    """Where a log ends now: its inode, since it may be rotated, and its bytes."""
    status = path.stat()
    return status.st_ino, status.st_size


def last_lines(path: Path, count: int, since: tuple[int, int] = (0, 0)) -> str:
    """The last `count` lines of a log, control codes removed; empty when it cannot be read.

    Nothing that stood in it at `since` (`log_end`): that is of an earlier process.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            same = os.fstat(stream.fileno()).st_ino == since[0] and size >= since[1]
            first = since[1] if same else 0
            stream.seek(max(first, size - count * 1000))
            data = stream.read()
    except OSError:
        return ""
    texts = (_CONTROL.sub("", part.decode(errors="replace")).rstrip() for part in _ENDS.split(data))
    return "\n".join([text for text in texts if text][-count:])
