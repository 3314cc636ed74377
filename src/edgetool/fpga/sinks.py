"""Where port bytes go: the 32 files of an image, the file tree of EdgeLLM's tools, or both. Safe for many threads."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image_format import hbm_name
from edgetool.fpga.layout import MatrixLayout
from edgetool.fpga.model import Linear
from edgetool.fpga.tree import weight_files

Array = npt.NDArray[Any]


class Sink(Protocol):
    """A place for matrices."""

    def matrix(self, linear: Linear) -> Any:
        """Context manager that yields (32 file descriptors, offset of the matrix in each file)."""


class ImageSink:
    """hbm/pc00.bin .. pc31.bin, made at their full size at once; a matrix lies at its address."""

    def __init__(self, directory: Path, size: int, addresses: dict[str, int]) -> None:
        self._addresses = addresses
        (directory / "hbm").mkdir(exist_ok=True)
        self._files: list[int] = []
        for pc in range(VCU128.pseudo_channels):
            file = os.open(directory / hbm_name(pc), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._files.append(file)
            os.ftruncate(file, size)

    @contextmanager
    def matrix(self, linear: Linear) -> Iterator[tuple[list[int], int]]:
        yield self._files, self._addresses[linear.name]

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


class TreeSink:
    """A file a matrix and port, as EdgeLLM's tools name them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def matrix(self, linear: Linear) -> Iterator[tuple[list[int], int]]:
        paths = [self._directory / name for name in weight_files(linear)]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        files: list[int] = []
        try:
            for path in paths:
                files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            yield files, 0
        finally:
            for file in files:
                os.close(file)

    def close(self) -> None:
        return None


def put(files: list[int], offset: int, block: Array) -> None:
    """Write one block, uint8 [32, rows, row_bytes], each port's part at `offset` of its file."""
    for file, part in zip(files, block, strict=True):
        view = part.reshape(-1).data
        done = 0
        while done < len(view):
            done += os.pwrite(file, view[done:], offset + done)


def checksum(files: list[int], offset: int, layout: MatrixLayout, rows_per_block: int) -> int | None:
    """CRC-32 over the blocks of a matrix as `put` wrote them, in order; None where a file is too short."""
    crc = 0
    step = rows_per_block // VCU128.pseudo_channels
    for first in range(0, layout.rows, step):
        size = (min(first + step, layout.rows) - first) * layout.row_bytes
        for file in files:
            raw = np.empty(size, dtype=np.uint8)
            if os.preadv(file, [raw.data], offset + first * layout.row_bytes) != size:
                return None
            crc = zlib.crc32(raw.data, crc)
    return crc
