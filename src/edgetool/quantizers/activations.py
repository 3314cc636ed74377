"""Hidden states of all calibration samples, in files: memory holds one batch, the page cache holds what fits.

Plain reads and writes instead of a memory map: the bytes are the same and cached the same, but they do not count as
this process's memory, and a full disk is an error that can be reported instead of a signal.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from edgetool.errors import BadInput


class ActivationFile:
    """`batches` records of one shape and dtype in a file; records are written whole and in any order."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.path = path
        self.dtype = dtype
        self.device = device
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._offsets: dict[int, int] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, batch: int, states: Tensor) -> None:
        """Store batch number `batch`; the first writing of each batch, in order, lays out the file."""
        data = states.detach().to("cpu", self.dtype).contiguous()
        if self._shapes.get(batch) != tuple(data.shape):
            self._place(batch, tuple(data.shape))
        view = _bytes_of(data)
        offset = self._offsets[batch]
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def read(self, batch: int) -> Tensor:
        """Batch number `batch` on the device."""
        data = torch.empty(self._shapes[batch], dtype=self.dtype)
        view = _bytes_of(data)
        offset = self._offsets[batch]
        while view:
            got = os.preadv(self._fd, [view], offset)
            if not got:
                raise BadInput(f"{self.path}: shorter than what was written", "start again with --overwrite")
            view, offset = view[got:], offset + got
        return data.to(self.device)

    def layout(self, shapes: list[tuple[int, ...]]) -> None:
        """Declare the shapes of all batches, as when a stopped run is taken up again."""
        self._shapes.clear()
        self._offsets.clear()
        for batch, shape in enumerate(shapes):
            self._place(batch, shape)

    def checksum(self) -> int:
        """CRC-32 of the file, to tell whether it survived a crash of the machine."""
        crc, offset = 0, 0
        while piece := os.pread(self._fd, 1 << 22, offset):
            crc, offset = zlib.crc32(piece, crc), offset + len(piece)
        return crc

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _place(self, batch: int, shape: tuple[int, ...]) -> None:
        size = torch.empty(0, dtype=self.dtype).element_size() * torch.Size(shape).numel()
        if batch in self._shapes:  # another stage's width: records must not overlap, so start a new layout
            if batch:
                raise AssertionError("shapes change only when the first batch is written again")
            self._shapes.clear()
            self._offsets.clear()
        previous = batch - 1
        start = 0
        if batch:
            rows = torch.Size(self._shapes[previous]).numel()
            start = self._offsets[previous] + rows * torch.empty(0, dtype=self.dtype).element_size()
        self._shapes[batch] = shape
        self._offsets[batch] = start
        if os.fstat(self._fd).st_size < start + size:
            os.ftruncate(self._fd, start + size)


def _bytes_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, for reading and writing in place."""
    return data.view(torch.uint8).reshape(-1).numpy().data
