"""An opened GGUF file: its metadata, its tensor table, and rows of its tensors as stored or as float32.

Values are decoded by the `gguf` package; data is read with plain reads, a range of rows at a time, not through that
package's memory map, whose pages would count as this process's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.gguf.header import read_header
from edgetool.errors import BadInput, MissingDependency

Array = npt.NDArray[Any]

_FETCH_AGAIN = "fetch the file again"
_UPGRADE = "pip install --upgrade gguf"
_DENSE_FACTOR = 2  # rows wanted out of order are read in one piece where that reads at most this many times as much


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file: `shape` in row-major order (GGUF lists it reversed), `offset` absolute in bytes.

    kind: the element type's name, for example F16, Q4_0 or Q6_K.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Number of rows that `GgufFile.rows` can be asked for: 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


@dataclass(frozen=True)
class GgufFile:
    """An opened GGUF file; nothing of its data has been read. Reading is safe from several threads.

    metadata: key -> value, arrays as lists. tensors: name -> table entry, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read metadata and tensor table.

        Raises BadInput, naming the file, when it is none, damaged, cut off or big-endian; MissingDependency without the
        `gguf` package.
        """
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError:
            raise MissingDependency(
                "reading GGUF files (the demo model is one) needs the package gguf", "pip install 'edgetool[demo]'"
            ) from None
        metadata, table = read_header(path)
        tensors: dict[str, GgufTensor] = {}
        for row in table:
            where = f"{path}: damaged GGUF file: tensor {row.name!r}"
            try:
                kind = GGMLQuantizationType(row.type_number)
            except ValueError as error:
                raise BadInput(f"{where} has type {row.type_number}, which is not known", _UPGRADE) from error
            block_values, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in row.shape or row.shape[-1] % block_values:
                raise BadInput(f"{where} has shape {row.shape}, which is no whole blocks of {kind.name}", _FETCH_AGAIN)
            nbytes = math.prod(row.shape) // block_values * block_bytes
            tensors[row.name] = GgufTensor(row.name, row.shape, kind.name, row.offset, nbytes)
        size = path.stat().st_size
        for tensor in tensors.values():
            if tensor.offset + tensor.nbytes > size:
                raise BadInput(
                    f"{path}: truncated: tensor {tensor.name!r} reaches beyond the file's {size} bytes", _FETCH_AGAIN
                )
        return cls(path, metadata, tensors)

    def rows(self, tensor: GgufTensor, wanted: npt.NDArray[np.integer[Any]] | range) -> Array:
        """Rows of `tensor` as stored: uint8 [len(wanted), row_bytes], in the order of `wanted`."""
        numbers = np.asarray(wanted)
        if numbers.size == 0:
            return np.empty((0, tensor.row_bytes), dtype=np.uint8)
        low, high = int(numbers.min()), int(numbers.max()) + 1
        with self.path.open("rb", buffering=0) as file:
            if high - low <= _DENSE_FACTOR * numbers.size:
                whole = self._read(file.fileno(), tensor, low, high)
                ordered = high - low == numbers.size and bool(np.all(np.diff(numbers) == 1))
                return whole if ordered else whole[numbers - low]
            return np.concatenate([self._read(file.fileno(), tensor, int(row), int(row) + 1) for row in numbers])

    def float32(self, tensor: GgufTensor, wanted: npt.NDArray[np.integer[Any]] | range) -> npt.NDArray[np.float32]:
        """Rows of `tensor` as numbers: float32 [len(wanted), shape[-1]], in the order of `wanted`.

        Raises BadInput for an element type that the `gguf` package cannot decode.
        """
        from gguf import GGMLQuantizationType, dequantize

        stored = self.rows(tensor, wanted)
        plain = {"F32": np.float32, "F16": np.float16}
        if tensor.kind in plain:
            return stored.view(plain[tensor.kind]).astype(np.float32, copy=False)
        try:
            values: npt.NDArray[np.float32] = dequantize(stored, GGMLQuantizationType[tensor.kind])
        except (NotImplementedError, ValueError) as error:
            raise BadInput(f"{self.path}: tensor {tensor.name!r} of type {tensor.kind}: {error}") from error
        return values

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """All values of a small tensor, flat, or None where the file has none of that name."""
        tensor = self.tensors.get(name)
        return None if tensor is None else self.float32(tensor, range(tensor.rows)).reshape(-1)

    def _read(self, fd: int, tensor: GgufTensor, start: int, stop: int) -> Array:
        whole = np.empty((stop - start, tensor.row_bytes), dtype=np.uint8)
        view, done = whole.reshape(-1).data, 0
        while done < len(view):
            # one read(2) moves at most 2 GiB, and may move less
            count = os.preadv(fd, [view[done : done + (1 << 30)]], tensor.offset + start * tensor.row_bytes + done)
            if count == 0:
                raise BadInput(
                    f"{self.path}: tensor {tensor.name!r} is cut off (the file became shorter while it was read)"
                )
            done += count
        return whole
