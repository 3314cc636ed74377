"""Tensors of two sides held together: equal to the bit, or where the first difference is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.plain_reader import PlainLinear, Rows
from edgetool.converter.sides import Values, Weights

Array = npt.NDArray[Any]

_BLOCK_VALUES = 1 << 19  # worked on at a time: temporaries of 2 MiB
_FLOATS = {"F16", "BF16", "F32", "F64"}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}
_MIN_ROWS = 64  # so that formats that pack along the output channels are read in whole cache lines


@dataclass(frozen=True, eq=False)
class Order:
    """Which channel of the source each channel of the output is: row r was rows[r]; None: as they were.

    For a linear, rows are output channels and columns input channels; for other tensors the first and second axis.
    """

    rows: Array | None = None
    columns: Array | None = None

    def source_rows(self, rows: slice) -> Rows:
        """The source's rows that became `rows`."""
        return rows if self.rows is None else self.rows[rows]


UNCHANGED = Order()


@dataclass(frozen=True)
class Difference:
    """parts: what of a linear is at fault, as in Side.modules. text: where it is first seen."""

    parts: tuple[str, ...]
    text: str


def compare_linears(
    source: PlainLinear | Weights, output: PlainLinear | Weights, order: Order = UNCHANGED
) -> Difference | None:
    """None where `output` holds the same weights.

    Groups, zeros, scales and codes are equal; or, where codes moved together with their zero or a group was cut into
    several, every float32 product scale * (code - zero) is. Where only values are known, 0 equals -0.
    """
    if (output.out_features, output.in_features) != (source.out_features, source.in_features):
        shown = f"[{output.out_features}, {output.in_features}]"
        return Difference(("shape", "codes"), f"is {shown}, must be [{source.out_features}, {source.in_features}]")
    moved: list[str] = []
    if isinstance(source, PlainLinear) and isinstance(output, PlainLinear):
        moved = _moved_parts(source, output, order)
        different_codes = _first_different_code(source, output, order)
        if not moved:
            return None if different_codes is None else Difference(("codes",), different_codes)
        if different_codes is not None:
            moved.insert(0, "codes")
    for rows in _blocks(output):
        text = _first(_weight(source, rows, order), output.weight(rows), rows.start, signed=bool(moved))
        if text is not None:
            return Difference(tuple(moved) or ("codes",), f"weight {text}")
    return None


def compare_weights(
    source: PlainLinear | Weights, output: Values, dtype: str, order: Order = UNCHANGED
) -> Difference | None:
    """None where `output` of `dtype`, F16 or BF16, holds the float32 weights of `source`, each rounded once."""
    shape = (source.out_features, source.in_features)
    if (output.dtype, output.shape) != (dtype, shape):
        return Difference(("codes",), f"is {output.dtype} {list(output.shape)}, must be {dtype} {list(shape)}")
    blocks, signed = _blocks(source), isinstance(source, PlainLinear)
    for rows, flat in zip(blocks, output.pieces((blocks[0].stop - blocks[0].start) * shape[1]), strict=True):
        meant = rounded(_weight(source, rows, order), output.dtype)
        text = _first(meant, flat.reshape(meant.shape), rows.start, output.dtype, signed=signed)
        if text is not None:
            return Difference(("codes",), f"weight {text}")
        if ((_bits(meant) & 0x7FFF) >= _INFINITY[output.dtype]).any():
            return Difference(("codes",), f"has infinite weights: {output.dtype} cannot hold the source's")
    return None


def compare_values(
    source: Values, output: Values, order: Order = UNCHANGED, *, rounding: bool = False
) -> Difference | None:
    """None where `output` holds the bytes of `source`, or after a change of dtype the same numbers.

    rounding: where the new dtype has not the number, its nearest is meant.
    """
    if output.shape != source.shape:
        return Difference((), f"is {list(output.shape)}, must be {list(source.shape)}")
    if output.dtype != source.dtype and not {output.dtype, source.dtype} <= _FLOATS:
        return Difference((), f"is {output.dtype}, must be {source.dtype}")
    if order.rows is not None or order.columns is not None:
        whole = source.whole()
        whole = whole if order.rows is None else whole[order.rows]
        whole = whole if order.columns is None else whole[:, order.columns]
        source = Values(source.dtype, source.shape, lambda count: _cut(whole, count))
    done = 0
    for given, made in zip(source.pieces(_BLOCK_VALUES), output.pieces(_BLOCK_VALUES), strict=True):
        meant = given
        if output.dtype != source.dtype:
            wide = widened(given, source.dtype)
            meant = rounded(wide, output.dtype)
            kept = widened(meant, output.dtype) == wide
            lost = ~kept if not rounding else np.isfinite(wide) & ~np.isfinite(widened(meant, output.dtype))
            nan = np.isnan(wide)
            if nan.any():  # which NaN it becomes is nobody's concern
                lost &= ~nan
                meant = np.where(nan & np.isnan(widened(made, output.dtype)), made, meant)
            if lost.any():
                place = int(np.argmax(lost))
                return Difference((), f"value {done + place} is {wide[place]}, which {output.dtype} does not hold")
        text = _first(meant, made, done, output.dtype)
        if text is not None:
            return Difference((), f"value {text}")
        done += len(given)
    return None


def crc32(linear: PlainLinear | Weights) -> int:
    """CRC-32 of the float32 weights, row after row."""
    crc = 0
    for rows in _blocks(linear):
        crc = zlib.crc32(np.ascontiguousarray(linear.weight(rows)).data, crc)
    return crc


def widened(values: Array, dtype: str) -> Array:
    """Values stored as `dtype` as float32, or float64 where they are that. BF16 comes as uint16."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if dtype == "F64" else values.astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """float32 or float64 to the nearest F16, BF16 (as uint16), F32 or F64, ties to even."""
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        odd = (bits >> 16) & 1
        return ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def _moved_parts(source: PlainLinear, output: PlainLinear, order: Order) -> list[str]:
    groups = source.groups if order.columns is None else source.groups[order.columns]
    rows = order.source_rows(slice(0, source.out_features))
    parts = []
    if not np.array_equal(output.groups, groups):
        parts.append("g_idx")
    if not np.array_equal(output.zeros, source.zeros[rows]):
        parts.append("zeros")
    if not np.array_equal(output.scales.view(np.uint32), source.scales[rows].view(np.uint32)):
        parts.append("scales")
    return parts


def _first_different_code(source: PlainLinear, output: PlainLinear, order: Order) -> str | None:
    if order.rows is None and order.columns is None and source.same_words(output):
        return None
    for rows in _blocks(output):
        meant = source.codes(order.source_rows(rows))
        meant = meant if order.columns is None else meant[:, order.columns]
        text = _first(meant, output.codes(rows), rows.start)
        if text is not None:
            return f"code {text}"
    return None


def _weight(source: PlainLinear | Weights, rows: slice, order: Order) -> Array:
    weight = source.weight(order.source_rows(rows))
    return weight if order.columns is None else weight[:, order.columns]


def _blocks(linear: PlainLinear | Weights) -> list[slice]:
    step = max(_MIN_ROWS, _BLOCK_VALUES // linear.in_features)
    return [slice(start, min(start + step, linear.out_features)) for start in range(0, linear.out_features, step)]


def _cut(values: Array, count: int) -> Iterator[Array]:
    flat = np.ascontiguousarray(values).reshape(-1)
    return (flat[start : start + count] for start in range(0, flat.size, count))


def _first(meant: Array, made: Array, start: int, dtype: str = "", *, signed: bool = True) -> str | None:
    """Where `made` is not `meant`, counted on from row or value `start`; None where all bits are equal.

    dtype: of both, where it is F16 or BF16. signed: whether 0 and -0 differ.
    """
    if np.array_equal(_bits(meant), _bits(made)):
        return None
    if dtype in _INFINITY:
        meant, made = widened(meant, dtype), widened(made, dtype)
    different = _bits(meant) != _bits(made) if signed else meant != made
    if not different.any():
        return None
    place = tuple(int(index) for index in np.unravel_index(int(np.argmax(different)), different.shape))
    where = [start + place[0], *place[1:]]
    shown = where[0] if len(where) == 1 else where
    more = int(different.sum()) - 1
    return f"{shown} is {made[place]}, must be {meant[place]}" + (f" (and {more} more near it)" if more else "")


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}") if array.dtype.kind in "fc" else array
