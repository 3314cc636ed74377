"""The header of a GGUF file: its metadata and where its tensors lie. The layout is in writer.py.

The `gguf` package's own reader makes two array views of every token and every merge, which takes 14 s and 500 MB for a
vocabulary of 150 000 (here 0.2 s), and with some damaged counts it never ends. It remains the oracle in the tests.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetool.errors import BadInput

_VERSIONS = (2, 3)  # of which only big-endian files differ
_ALIGNMENT = 32  # where general.alignment says nothing else
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class RawTensor:
    """A row of the tensor table: shape in row-major order, type as ggml numbers it, offset absolute in bytes."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class _Damaged(Exception):
    """What is wrong with a header; read_header adds the file's name."""


def read_header(path: Path) -> tuple[dict[str, Any], list[RawTensor]]:
    """(metadata, tensors) of a GGUF file; metadata are numbers, strings and lists of either.

    Raises BadInput, naming the file, when it cannot be read, is no GGUF file, or ends before its header does.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise BadInput(f"{path}: not a GGUF file (begins with {magic!r})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data).read()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (_Damaged, ValueError) as error:  # ValueError: text that is not UTF-8
        raise BadInput(f"{path}: damaged GGUF file: {error}", _FETCH_AGAIN) from error


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4

    def read(self) -> tuple[dict[str, Any], list[RawTensor]]:
        version = self._number("<u4")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise _Damaged("it is big-endian" if swapped in _VERSIONS else f"version {version}; known are 2 and 3")
        tensor_count, metadata_count = self._number("<u8"), self._number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):  # a count that is too large ends at the end of the file
            key = self._string()
            if key in metadata:
                raise _Damaged(f"it has {key!r} twice")
            metadata[key] = self._value(self._number("<u4"))
        table = [self._row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {alignment!r}; must be a power of two")
        start = -(-self._at // alignment) * alignment
        if len({name for name, *_ in table}) != len(table):
            raise _Damaged("it has two tensors of one name")
        return metadata, [RawTensor(name, shape, number, start + offset) for name, shape, number, offset in table]

    def _row(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self._string(), self._number("<u4")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {count} dimensions")
        shape = tuple(self._number("<u8") for _ in range(count))[::-1]
        return name, shape, self._number("<u4"), self._number("<u8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_scalar(kind))
        kind, count = self._number("<u4"), self._number("<u8")
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        dtype = np.dtype(_scalar(kind))
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype).tolist()

    def _string(self) -> str:
        (length,) = struct.unpack("<Q", self._take(8))
        return self._take(length).decode("utf-8")

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype=dtype)[0].item()

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _Damaged(f"truncated: its header reaches beyond its {len(self._data)} bytes")
        taken = self._data[self._at : end]
        self._at = end
        return taken


def _scalar(kind: int) -> str:
    if kind not in _NUMBERS:
        raise _Damaged(f"it has a value of type {kind}, which is none")
    return _NUMBERS[kind]
