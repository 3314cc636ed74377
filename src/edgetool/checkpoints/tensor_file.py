"""The safetensors byte format, read and written as a stream: never more than the tensor at hand in memory.

Layout (https://github.com/huggingface/safetensors, "Format"): uint64 little-endian N; N bytes of JSON that maps each
tensor name to dtype, shape and data_offsets [begin, end) relative to byte 8 + N, padded with spaces; then the data,
little-endian, row-major, without holes. Reading uses plain reads into fresh arrays, not a memory map: mapped pages
count as resident memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32
from edgetool.checkpoints.placed_file import PlacedFile
from edgetool.errors import BadInput

AnyArray = npt.NDArray[Any]

MAX_HEADER_BYTES = 100_000_000
"""Largest header accepted, the limit of the official library."""

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
    "F8_E4M3FNUZ": np.dtype(np.uint8),
    "F8_E5M2FNUZ": np.dtype(np.uint8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""Dtype name in the file -> numpy dtype that carries it: BF16 as uint16, the F8 kinds as uint8 bit patterns.

The order is by alignment, smallest first; its reverse is the order in which the official library lays tensors out.
"""

_LAYOUT_RANK = {name: rank for rank, name in enumerate(NUMPY_DTYPES)}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute in `path`, `dtype` the format's own name ("F16" ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class _Damaged(Exception):
    """What is wrong with a header; read_header adds the file's name."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of every tensor in a safetensors file, in the order of their offsets.

    Raises BadInput, naming the file and where it can the tensor, when the file is missing, cut off, or its header
    breaks the format: length beyond the file, not JSON, a name twice, unknown dtype, size other than shape x dtype,
    overlaps, holes, spare bytes at the end.
    """
    try:
        with path.open("rb") as file:
            return _parse_header(path, file, os.fstat(file.fileno()).st_size)
    except _Damaged as damage:
        raise BadInput(f"{path}: {damage}", hint="fetch this file again: it is not a whole safetensors file") from None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse_header(path: Path, file: IO[bytes], file_bytes: int) -> dict[str, TensorInfo]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _Damaged(f"{file_bytes} bytes long; a safetensors file starts with 8 bytes that hold the header's length")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise _Damaged(f"header length {header_bytes} is over the limit of {MAX_HEADER_BYTES}; not a safetensors file?")
    if 8 + header_bytes > file_bytes:
        raise _Damaged(f"header length {header_bytes} reaches beyond the file's end ({file_bytes} bytes): truncated")
    try:
        header = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise _Damaged("header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damaged("__metadata__ is not a map of strings")
    data_start = 8 + header_bytes
    infos = sorted((_entry(path, name, entry, data_start) for name, entry in header.items()), key=_by_offset)
    end, previous = data_start, None
    for info in infos:
        if info.offset < end:
            raise _Damaged(f"tensor {info.name!r} overlaps tensor {previous!r}")
        if info.offset > end:
            raise _Damaged(f"hole of {info.offset - end} bytes before tensor {info.name!r}")
        end, previous = info.offset + info.nbytes, info.name
        if end > file_bytes:
            raise _Damaged(f"truncated: tensor {info.name!r} ends at byte {end}, the file at {file_bytes}")
    if end != file_bytes:
        raise _Damaged(f"{file_bytes - end} bytes behind the last tensor ({previous!r}) belong to no tensor")
    return {info.name: info for info in infos}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Damaged(f"header names {key!r} twice")
        result[key] = value
    return result


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # `type is`, since True is an int too


def _entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Damaged(f"{where}: entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise _Damaged(f"{where}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise _Damaged(f"{where}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _Damaged(f"{where}: data_offsets {offsets!r} is not [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != expected:
        raise _Damaged(f"{where}: {dtype} of shape {shape} takes {expected} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, expected)


def _by_offset(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes  # an empty tensor sorts before the one that starts at the same byte


def read_tensor(info: TensorInfo, out: AnyArray | None = None) -> AnyArray:
    """The whole tensor as an array of shape `info.shape` and dtype NUMPY_DTYPES[info.dtype] (BF16 as uint16).

    out: a contiguous array of that shape and dtype to read into.
    """
    array = np.empty(info.shape, dtype=NUMPY_DTYPES[info.dtype]) if out is None else out
    with info.path.open("rb", buffering=0) as file:
        _fill(file, info.offset, array, info)
    return array


def read_rows(info: TensorInfo, rows: npt.NDArray[np.integer[Any]]) -> AnyArray:
    """Rows `rows` (1-D, any order, repeats allowed) of a tensor: shape [len(rows), *shape[1:]], dtype as read_tensor.

    Reads only those rows. Raises BadInput when a row is outside 0..shape[0]-1.
    """
    wanted, inverse = np.unique(rows, return_inverse=True)
    if not info.shape or (wanted.size and (wanted[0] < 0 or wanted[-1] >= info.shape[0])):
        span = f"{wanted[0]}..{wanted[-1]}" if wanted.size else ""
        raise BadInput(f"{info.path}: tensor {info.name!r} of shape {list(info.shape)} has no rows {span}")
    found = np.empty((wanted.size, *info.shape[1:]), dtype=NUMPY_DTYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1  # neighbouring rows are fetched with one read
    with info.path.open("rb", buffering=0) as file:
        for start, stop in zip([0, *breaks], [*breaks, wanted.size], strict=True):
            if stop > start:
                _fill(file, info.offset + int(wanted[start]) * row_bytes, found[start:stop], info)
    gathered: AnyArray = found[inverse.reshape(-1)]
    return gathered


def iter_chunks(info: TensorInfo, chunk_bytes: int = 1 << 24) -> Iterator[AnyArray]:
    """The tensor as flat 1-D arrays, in order, each at most `chunk_bytes` (but at least one element)."""
    dtype = NUMPY_DTYPES[info.dtype]
    step = max(chunk_bytes // dtype.itemsize, 1)
    count = info.nbytes // dtype.itemsize
    with info.path.open("rb", buffering=0) as file:
        for start in range(0, count, step):
            chunk = np.empty(min(step, count - start), dtype=dtype)
            _fill(file, info.offset + start * dtype.itemsize, chunk, info)
            yield chunk


def _fill(file: Any, offset: int, array: AnyArray, info: TensorInfo) -> None:
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        # one read(2) moves at most 2 GiB, and may move less
        count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise BadInput(f"{info.path}: tensor {info.name!r} is cut off (the file became shorter while it was read)")
        done += count


def to_float32(array: AnyArray, dtype: str) -> npt.NDArray[np.float32]:
    """An array as `read_tensor` gives it, of file dtype `dtype`, as float32. Exact but for F64 and wide integers.

    Raises BadInput for dtypes that hold no plain numbers (the F8 kinds, C64).
    """
    if dtype == "BF16":
        return bfloat16_to_float32(array)
    if dtype.startswith("F8") or dtype == "C64":
        raise BadInput(f"dtype {dtype} cannot be used as weights", hint="use a checkpoint in bf16, fp16 or fp32")
    return array.astype(np.float32, copy=False)


Entry = tuple[str, str, tuple[int, ...]]
"""Name, dtype name and shape of a tensor to be written."""


class TensorFileWriter(PlacedFile):
    """Writes one safetensors file: the header at once, then each tensor at its place, in whatever order they come.

    `entries` are (name, dtype, shape). Data is laid out as the official library does it (dtypes of larger alignment
    first, then by name), so every tensor is aligned, and the same tensors give the same bytes whatever the order.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        header, self._infos = _layout(path, entries, {"format": "pt"} if metadata is None else metadata)
        super().__init__(path, header, {name: (info.offset, info.nbytes) for name, info in self._infos.items()})

    def write(self, name: str, pieces: AnyArray | Iterable[bytes | memoryview | AnyArray]) -> None:
        """Store one tensor: an array of its shape and numpy dtype (BF16 as uint16), or consecutive raw pieces of it.

        Raises ValueError for a wrong dtype, shape or byte count and a tensor written twice, KeyError for one that was
        not announced.
        """
        info = self._infos[name]
        if isinstance(pieces, np.ndarray):
            if pieces.shape != info.shape or pieces.dtype != NUMPY_DTYPES[info.dtype]:
                given = f"{pieces.dtype} {pieces.shape}"
                raise ValueError(f"tensor {name!r}: announced {info.dtype} {info.shape}, given {given}")
            pieces = (pieces,)
        super().write(name, pieces)


def _layout(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, TensorInfo]]:
    """Header bytes, length prefix and padding included, and where each tensor goes."""
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (-_LAYOUT_RANK[entry[1]], entry[0])):
        if name in document:
            raise ValueError(f"tensor {name!r} announced twice, or reserved")
        nbytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8, as the format asks
    header = struct.pack("<Q", len(text)) + text
    infos = {
        name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, len(header) + begin, end - begin)
        for name, entry in document.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    }
    return header, infos


def write_tensor_file(
    path: Path, tensors: Mapping[str, tuple[str, AnyArray]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write name -> (dtype name, array) as one file; `metadata` None means {"format": "pt"}, for transformers."""
    entries = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with TensorFileWriter(path, entries, metadata) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
