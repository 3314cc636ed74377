"""A second, plain reader of packed linears, against which conversions are proven.

It shares no code with the formats' own readers and writers, nor with packing.py and canonical.py: one shift and one
mask for each position in a word, written from the layouts' descriptions (gptq_format.py, awq_format.py and
compressed_tensors_format.py have them in words). An error would have to be made twice to go unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.tensor_file import TensorInfo, read_tensor
from edgetool.errors import BadInput

Array = npt.NDArray[Any]
Rows = slice | Array
"""Output channels: a slice with start and stop, or an integer array."""

SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
}
"""Kind -> the tensors of one linear, after `<module>.`."""

OPTIONAL = ("g_idx", "weight_zero_point", "weight_g_idx")
"""Those that a linear may lack."""

_AWQ_CHANNELS = (0, 2, 4, 6, 1, 3, 5, 7)  # output channel, of eight, that nibble 0, 1, ... of a word holds


@dataclass(frozen=True, eq=False)
class PlainLinear:
    """One quantised linear; its codes stay packed until they are asked for.

    zeros: uint8 [out_features, n_groups], 0 .. 2**bits - 1. scales: float32 [out_features, n_groups], the stored values
    widened, finite; scale_dtype: F16, BF16 or F32, as stored. groups: int32 [in_features], the group of each input
    channel, 0 .. n_groups - 1.
    """

    bits: int
    out_features: int
    in_features: int
    zeros: Array
    scales: Array
    scale_dtype: str
    groups: Array
    _words: Array = field(repr=False)
    _kind: str

    @property
    def n_groups(self) -> int:
        return int(self.scales.shape[1])

    @cached_property
    def trivial(self) -> bool:
        """Whether groups are of neighbouring channels, all of one size but perhaps the last."""
        size = int(np.bincount(self.groups).max())
        return np.array_equal(self.groups, np.arange(self.in_features) // size)

    def same_words(self, other: PlainLinear) -> bool:
        """Whether the codes are packed the same way and into the same words, so that all of them are equal."""
        alike = (self._kind, self.bits, self.in_features) == (other._kind, other.bits, other.in_features)
        return alike and np.array_equal(self._words, other._words)

    def codes(self, rows: Rows) -> Array:
        """uint8 [len(rows), in_features], 0 .. 2**bits - 1, in whatever memory order is cheap."""
        if self._kind == "gptq":
            return _fields(self._words[:, rows], self.bits, self.in_features).T
        if self._kind == "compressed-tensors":
            return _fields(self._words[rows].T, self.bits, self.in_features).T
        if self._kind == "compressed-tensors 0.17":
            return _fields(self._words[rows].T, self.bits, self.in_features, per_word=10).T
        if isinstance(rows, slice):
            first, last = rows.start // 8, -(-rows.stop // 8)
            wide = _fields(self._words[:, first:last].T, 4, 8 * (last - first), channels=_AWQ_CHANNELS)
            return wide[rows.start - 8 * first : rows.stop - 8 * first]
        wide = _fields(self._words[:, rows // 8].T, 4, 8 * len(rows), channels=_AWQ_CHANNELS)
        picked: Array = wide[8 * np.arange(len(rows)) + rows % 8]
        return picked

    def weight(self, rows: Rows) -> Array:
        """float32 [len(rows), in_features]: scale * (code - zero), the product rounded once."""
        steps: Array = self.codes(rows).astype(np.float32, order="C")
        if self.trivial and self.in_features % self.n_groups == 0:
            grouped = steps.reshape(len(steps), self.n_groups, self.in_features // self.n_groups)
            grouped -= self.zeros[rows][:, :, None]
            grouped *= self.scales[rows][:, :, None]
        else:
            steps -= self.zeros[rows][:, self.groups]
            steps *= self.scales[rows][:, self.groups]
        return steps


def read_stored(
    tensors: Mapping[str, TensorInfo], module: str, kind: str, bits: int, group_size: int | None = None
) -> PlainLinear:
    """`read` for a module of a checkpoint whose headers are `tensors`."""
    names = {suffix: f"{module}.{suffix}" for suffix in SUFFIXES[kind]}
    found = {suffix: read_tensor(tensors[name]) for suffix, name in names.items() if name in tensors}
    return read(found, kind, bits, group_size, module)


def read(
    tensors: Mapping[str, Array], kind: str, bits: int, group_size: int | None = None, name: str = ""
) -> PlainLinear:
    """The linear that `tensors` (suffix -> array as stored, bfloat16 as uint16) holds.

    kind: gptq, gptq_v2 (they differ in the zeros), awq or compressed-tensors. group_size: the actual number of channels
    a group, needed only where the groups do not divide in_features and no g_idx tells.
    Raises BadInput, naming the tensor, for what is missing or does not fit, NaN or infinite scales, and a g_idx that
    names groups which are not there.
    """
    parts = _Parts(tensors, name)
    for suffix in SUFFIXES[kind]:
        if suffix not in tensors and suffix not in OPTIONAL:
            raise BadInput(f"{parts.full(suffix)} is missing")
    if kind == "compressed-tensors":
        return _compressed_tensors(parts, bits, group_size)
    return _gptq_or_awq(parts, kind, bits, group_size)


def _gptq_or_awq(parts: _Parts, kind: str, bits: int, group_size: int | None) -> PlainLinear:
    words, qzeros = parts.words("qweight"), parts.words("qzeros")
    scales, scale_dtype = parts.scales("scales")
    n_groups, out_features = scales.shape
    in_features = len(words) if kind == "awq" else len(words) * 32 // bits
    if kind == "awq":
        parts.demand(bits == 4 and words.shape[1] * 8 == out_features, "qweight", f"4-bit, {out_features} / 8 columns")
    else:
        fits = words.shape[1] == out_features and len(words) * 32 % bits == 0
        parts.demand(fits, "qweight", f"[in_features * {bits} / 32, {out_features}]")
    parts.demand(qzeros.shape == (n_groups, -(-out_features * bits // 32)), "qzeros", f"{bits}-bit fields for scales")
    zeros = _fields(qzeros.T, bits, out_features, channels=_AWQ_CHANNELS if kind == "awq" else None)
    if kind == "gptq":
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    groups = parts.groups("g_idx" if kind != "awq" else None, in_features, n_groups, group_size)
    kind = "awq" if kind == "awq" else "gptq"
    wide = np.ascontiguousarray(scales.T)
    return PlainLinear(bits, out_features, in_features, zeros, wide, scale_dtype, groups, words, kind)


def _compressed_tensors(parts: _Parts, bits: int, group_size: int | None) -> PlainLinear:
    shape, words = parts.tensors["weight_shape"], parts.words("weight_packed")
    parts.demand(shape.dtype.kind == "i" and shape.shape == (2,), "weight_shape", "two integers")
    out_features, in_features = (int(size) for size in shape)
    scales, scale_dtype = parts.scales("weight_scale")
    parts.demand(len(scales) == out_features, "weight_scale", f"of {out_features} rows")
    n_groups = scales.shape[1]
    dense, sparse = -(-in_features * bits // 32), -(-in_features // 10)
    # Up to 0.17 a word held ten 3-bit codes and two idle bits. For few channels both ways take as many words.
    old = bits == 3 and words.shape[1] == sparse and (dense != sparse or not (words.view(np.uint32) >> 30).any())
    parts.demand(
        words.shape == (out_features, sparse if old else dense), "weight_packed", f"{bits}-bit codes of {shape}"
    )
    per_word = 10 if old else None
    zeros = np.full(scales.shape, 1 << (bits - 1), dtype=np.uint8)
    stored = parts.tensors.get("weight_zero_point")
    if stored is not None and stored.dtype == np.int8:
        parts.demand(stored.shape == scales.shape, "weight_zero_point", f"{list(scales.shape)}")
        zeros = (stored.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    elif stored is not None:
        rows = -(-out_features // 10) if old else -(-out_features * bits // 32)
        fits = parts.words("weight_zero_point").shape == (rows, n_groups)
        parts.demand(fits, "weight_zero_point", f"[{rows}, {n_groups}]")
        zeros = np.ascontiguousarray(_fields(stored, bits, out_features, per_word=per_word))
    groups = parts.groups("weight_g_idx", in_features, n_groups, group_size)
    kind = "compressed-tensors 0.17" if old else "compressed-tensors"
    return PlainLinear(bits, out_features, in_features, zeros, scales, scale_dtype, groups, words, kind)


@dataclass(frozen=True)
class _Parts:
    """The tensors of one linear and how to complain about them."""

    tensors: Mapping[str, Array]
    module: str

    def full(self, suffix: str) -> str:
        return f"{self.module}.{suffix}" if self.module else suffix

    def demand(self, condition: bool, suffix: str, required: str) -> None:
        if not condition:
            array = self.tensors[suffix]
            raise BadInput(f"{self.full(suffix)} is {array.dtype} {list(array.shape)}; must be {required}")

    def words(self, suffix: str) -> Array:
        array = self.tensors[suffix]
        fits = array.dtype == np.int32 and array.ndim == 2 and 0 not in array.shape
        self.demand(fits, suffix, "int32 of two dimensions")
        return array

    def scales(self, suffix: str) -> tuple[Array, str]:
        """float32 values and the stored dtype's name."""
        array = self.tensors[suffix]
        fits = array.ndim == 2 and 0 not in array.shape and array.dtype.name in ("float16", "uint16", "float32")
        self.demand(fits, suffix, "F16, BF16 or F32 of two dimensions")
        name = {"float16": "F16", "uint16": "BF16", "float32": "F32"}[array.dtype.name]
        wide = (array.astype(np.uint32) << 16).view(np.float32) if name == "BF16" else array.astype(np.float32)
        if not np.isfinite(wide).all():
            raise BadInput(f"{self.full(suffix)} holds NaN or infinity")
        return wide, name

    def groups(self, suffix: str | None, in_features: int, n_groups: int, group_size: int | None) -> Array:
        """int32 [in_features]."""
        index = None if suffix is None else self.tensors.get(suffix)
        if index is not None and index.size and not (index == -1).all():
            assert suffix is not None
            fits = index.dtype == np.int32 and index.shape == (in_features,)
            self.demand(fits, suffix, f"int32 [{in_features}]")
            if index.min() < 0 or index.max() >= n_groups:
                raise BadInput(f"{self.full(suffix)} names groups {index.min()}..{index.max()} of {n_groups}")
            return index
        size = in_features // n_groups if in_features % n_groups == 0 else group_size or 0
        if size < 1 or -(-in_features // size) != n_groups:
            raise BadInput(f"{self.module or 'a linear'} has {n_groups} groups for {in_features} input channels")
        return (np.arange(in_features) // size).astype(np.int32)


def _fields(
    words: Array, bits: int, count: int, *, per_word: int | None = None, channels: tuple[int, ...] | None = None
) -> Array:
    """The first `count` fields of `bits` bits along the first axis of int32 words [n, others]: uint8 [count, others].

    Fields follow each other from bit 0 of the first word on, crossing words where 32 is no multiple of `bits`, or lie
    `per_word` in each word with the rest idle. channels: where, in its word's fields, each field belongs.
    """
    period, together = (3, 32) if bits == 3 and per_word is None else (1, per_word or 32 // bits)
    stretches = -(-len(words) // period)
    if len(words) % period:
        words = np.concatenate([words, np.zeros((-len(words) % period, words.shape[1]), dtype=np.int32)])
    unsigned = words.view(np.uint32)
    order = "F" if abs(words.strides[0]) < abs(words.strides[1]) else "C"
    values = np.empty((stretches * together, words.shape[1]), dtype=np.uint8, order=order)  # type: ignore[call-overload]
    for position in range(together):
        word, shift = divmod(position * bits, 32)
        found = unsigned[word::period] >> np.uint32(shift)
        if shift + bits > 32:
            found |= unsigned[word + 1 :: period] << np.uint32(32 - shift)
        found &= np.uint32((1 << bits) - 1)
        values[position if channels is None else channels[position] :: together] = found
    kept: Array = values[:count]
    return kept
