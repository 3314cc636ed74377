"""A file of named pieces whose places are known before any of them is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]

_ONE_WRITE_BYTES = 1 << 30  # one write(2) moves at most 2 GiB


class PlacedFile:
    """Writes a header at once, then each named tensor at its place, in whatever order and from whatever thread.

    places: name -> (absolute offset, bytes). size_bytes: length of the whole file where it ends in padding.
    The caller maps OSError (disk full) with artifacts.disk_errors. As a context manager, an exception removes the file.
    """

    def __init__(
        self, path: Path, header: bytes, places: Mapping[str, tuple[int, int]], size_bytes: int | None = None
    ) -> None:
        self.path = path
        self._places = places
        self._missing = set(places)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._pwrite(memoryview(header), 0)
        if size_bytes is not None:
            os.ftruncate(self._fd, size_bytes)

    def write(self, name: str, pieces: Iterable[bytes | memoryview | AnyArray]) -> None:
        """Store one tensor: consecutive pieces of its data, arrays of any dtype (written little-endian) or bytes.

        Raises ValueError for a wrong byte count and a tensor written twice, KeyError for one that was not announced.
        """
        offset, nbytes = self._places[name]
        if name not in self._missing:
            raise ValueError(f"tensor {name!r} written twice")
        done = 0
        for piece in pieces:
            view = _raw(piece)
            if done + len(view) > nbytes:
                raise ValueError(f"tensor {name!r}: more than its {nbytes} bytes given")
            self._pwrite(view, offset + done)
            done += len(view)
        if done != nbytes:
            raise ValueError(f"tensor {name!r}: {done} of its {nbytes} bytes given")
        self._missing.remove(name)

    def close(self) -> None:
        """Flush to the disk and close. Raises ValueError when an announced tensor was never written."""
        if self._fd < 0:
            return
        try:
            if self._missing:
                raise ValueError(f"{self.path}: tensors never written: {sorted(self._missing)[:5]}")
            os.fsync(self._fd)
        finally:
            self.abort()

    def abort(self) -> None:
        """Close without checking; the file stays as far as it got."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + _ONE_WRITE_BYTES], offset + done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
                return
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        self.abort()
        self.path.unlink(missing_ok=True)


def _raw(piece: bytes | memoryview | AnyArray) -> memoryview:
    if isinstance(piece, np.ndarray):
        little = np.ascontiguousarray(piece).astype(piece.dtype.newbyteorder("<"), copy=False)
        return little.reshape(-1).view(np.uint8).data
    return memoryview(piece).cast("B")
