"""The GGUF container, version 3, written as a stream: header at once, then each tensor at its place, in any order.

Layout (ggml-org/ggml docs/gguf.md), all little-endian: "GGUF", uint32 version, uint64 number of tensors, uint64 number
of metadata; metadata as key, uint32 type, value; for each tensor its name, uint32 number of dimensions, uint64 each
dimension (innermost first), uint32 type, uint64 offset into the data; padding to 32; the data, each tensor padded to 32
bytes. Strings are a uint64 length and UTF-8. The same content gives the same bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgetool.checkpoints.gguf.blocks import BLOCK, BLOCK_BYTES
from edgetool.checkpoints.placed_file import PlacedFile

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q8_0": 8, "BF16": 30}
"""Element types that can be written -> their number, enum ggml_type."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
"""Type of most of a model's matrices -> general.file_type, enum llama_ftype."""

_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_VERSION = 3
_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9

Value = bool | int | float | str | Sequence[str] | Sequence[int]
"""Metadata: bool, int as uint32, float as float32, str, and lists of str or of int (as int32)."""

Entry = tuple[str, str, tuple[int, ...]]
"""Name, type and shape (row-major) of a tensor."""


def tensor_bytes(entry: Entry) -> int:
    """Size of a tensor's data without padding."""
    _, kind, shape = entry
    if kind in _FLOAT_BYTES:
        return math.prod(shape) * _FLOAT_BYTES[kind]
    return math.prod(shape) // BLOCK * BLOCK_BYTES[kind]


class GgufFileWriter(PlacedFile):
    """Writes one GGUF file. Tensors lie in the order of `entries`."""

    def __init__(self, path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> None:
        header, places = _layout(metadata, entries)
        # padding is zeros, that behind the last tensor too
        ends = [offset + -(-nbytes // _ALIGNMENT) * _ALIGNMENT for offset, nbytes in places.values()]
        super().__init__(path, header, places, max([len(header), *ends]))


def _layout(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes, padding included, and (absolute offset, bytes) of each tensor."""
    header = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(entries), len(metadata)))
    for key, value in metadata.items():
        kind, data = _packed(value)
        header += _string(key) + struct.pack("<I", kind) + data
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for entry in entries:
        name, kind_name, shape = entry
        if name in places:
            raise ValueError(f"tensor {name!r} announced twice")
        if kind_name in BLOCK_BYTES and shape[-1] % BLOCK:
            raise ValueError(f"tensor {name!r}: rows of {shape[-1]} are no whole blocks of {BLOCK}")
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", TYPE_NUMBERS[kind_name], offset)
        places[name] = (offset, tensor_bytes(entry))
        offset += -(-places[name][1] // _ALIGNMENT) * _ALIGNMENT
    header += bytes(-len(header) % _ALIGNMENT)
    return bytes(header), {name: (len(header) + offset, nbytes) for name, (offset, nbytes) in places.items()}


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _packed(value: Value) -> tuple[int, bytes]:
    """Type number and bytes of a metadata value."""
    if isinstance(value, bool):  # before int, which it is too
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if all(isinstance(item, str) for item in value):
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(_string(str(item)) for item in value)
    return _ARRAY, struct.pack("<IQ", _INT32, len(value)) + np.array(value, dtype="<i4").tobytes()
