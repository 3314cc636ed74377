"""The one internal form of a quantised linear layer, whatever format it came from or goes to.

Every format in this package reads to and writes from `QuantizedLinear`; no format knows another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints import float16
from edgetool.checkpoints.bfloat16 import float32_to_bfloat16
from edgetool.errors import BadInput

BITS = (2, 3, 4, 8)
"""Code widths that any part of edgetool handles."""

_BLOCK_ELEMENTS = 1 << 16  # values worked on at a time: 256 KiB of float32, so temporaries stay in the L2 cache

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """Weights W [out_features, in_features] as small integers with a scale and a zero per group of input channels.

        W[o, i] = float32(scales[o, g]) * (codes[o, i] - zeros[o, g]),   g = g_idx[i], or i // group_size

    codes: uint8 [out_features, in_features], values 0 .. 2**bits - 1, one code a byte (not packed).
    scales: float16 [out_features, n_groups], finite; may be negative (signed scale grids) and zero (groups of zeros).
        Readers keep a checkpoint's wider scales as float32, so that nothing is lost; see `scale_dtype`.
    zeros: uint8 [out_features, n_groups], values 0 .. 2**bits - 1; 2**(bits - 1) everywhere means symmetric.
    g_idx: int32 [in_features], the group of each input channel, or None for the trivial i // group_size.
    group_size: the actual number of channels a group; `in_features` where a format's configuration says -1.
    scale_dtype: "F16", "BF16" or "F32", how a checkpoint stores the scales. BF16 values are held exactly in float32.
    """

    codes: Array
    scales: Array
    zeros: Array
    g_idx: Array | None
    bits: int
    group_size: int
    scale_dtype: str = "F16"

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def n_groups(self) -> int:
        return int(self.scales.shape[1])

    @property
    def sym(self) -> bool:
        """Whether every zero is the middle code, so that a symmetric-only format or kernel holds the same values."""
        return bool(np.all(self.zeros == 1 << (self.bits - 1)))

    @property
    def ragged(self) -> bool:
        """Whether the last group is short (in_features % group_size != 0): found in the wild, run by no kernel."""
        return self.in_features % self.group_size != 0

    def group_index(self) -> Array:
        """int32 [in_features]: the group of each input channel, trivial or not."""
        if self.g_idx is not None:
            return self.g_idx
        return trivial_g_idx(self.in_features, self.group_size)

    def rows(self, start: int, stop: int) -> QuantizedLinear:
        """Output channels `start` to `stop`, as views of this layer's arrays."""
        part = slice(start, stop)
        return replace(self, codes=self.codes[part], scales=self.scales[part], zeros=self.zeros[part])

    def dequantize(self, out: Array | None = None) -> Array:
        """The weights as float32 [out_features, in_features], written into `out` where given.

        out: float32, float16 or uint16 (bfloat16 bit patterns). The product is taken in float32, so the narrow ones
        round once; what is too large for them becomes infinite. Needs about 1 MiB beside the result.
        """
        if out is None:
            out = np.empty(self.codes.shape, dtype=np.float32)
        step = max(1, _BLOCK_ELEMENTS // max(1, self.in_features))
        in_place = out.dtype == np.float32 and out.flags.c_contiguous
        buffer = np.empty((0 if in_place else step, self.in_features), dtype=np.float32)
        spare = np.empty_like(buffer, dtype=np.uint32)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            scales = self.scales[rows].astype(np.float32, copy=False)
            block = out[rows] if in_place else buffer[: len(scales)]
            if out.dtype == np.float16 and float16.can_shrink(scales, (1 << self.bits) - 1):
                self._multiply(rows, scales * float16.SHRINK, block)
                float16.round_shrunk(block, out[rows], spare[: len(scales)])
                continue
            self._multiply(rows, scales, block)
            if out.dtype == np.uint16:
                out[rows] = float32_to_bfloat16(block)
            elif not in_place:
                with np.errstate(over="ignore"):
                    out[rows] = block
        return out

    def _multiply(self, rows: slice, scales: Array, block: Array) -> None:
        """Fill `block`, float32, with (code - zero) * scale of `rows`."""
        zeros = self.zeros[rows].astype(np.float32)
        np.copyto(block, self.codes[rows])
        if self.g_idx is None and not self.ragged:
            grouped = block.reshape(len(block), self.n_groups, self.group_size)
            grouped -= zeros[:, :, None]
            grouped *= scales[:, :, None]
        else:
            g_idx = self.group_index()
            block -= zeros[:, g_idx]
            block *= scales[:, g_idx]

    def validate(self, name: str = "") -> None:
        """Raise BadInput, naming `name`, at the first shape, dtype or value that breaks the contract of this class."""
        where = f" ({name})" if name else ""

        def refuse(what: str) -> BadInput:
            return BadInput(f"{what}{where}")

        if self.bits not in BITS:
            raise refuse(f"{self.bits}-bit codes; must be one of {', '.join(map(str, BITS))}")
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8 or 0 in self.codes.shape:
            raise refuse(f"codes are {self.codes.dtype} {self.codes.shape}; must be uint8 [out_features, in_features]")
        if not 1 <= self.group_size <= self.in_features:
            raise refuse(f"group_size {self.group_size}; must lie in 1..in_features {self.in_features}")
        groups = -(-self.in_features // self.group_size)
        if self.scales.shape != (self.out_features, groups):
            raise refuse(f"scales have shape {self.scales.shape}; must be {(self.out_features, groups)}")
        if self.zeros.shape != self.scales.shape or self.zeros.dtype != np.uint8:
            raise refuse(f"zeros are {self.zeros.dtype} {self.zeros.shape}; must be uint8 {self.scales.shape}")
        expected = np.float16 if self.scale_dtype == "F16" else np.float32
        if self.scale_dtype not in ("F16", "BF16", "F32") or self.scales.dtype != expected:
            raise refuse(f"scales are {self.scales.dtype} for a stored dtype of {self.scale_dtype}")
        if not np.isfinite(self.scales).all():
            raise refuse(f"{int((~np.isfinite(self.scales)).sum())} scales are NaN or infinite")
        top = (1 << self.bits) - 1
        codes = self.codes if any(self.codes.strides) else self.codes[:1, :1]
        for label, array in (("code", codes), ("zero", self.zeros)):
            if int(array.max()) > top:
                raise refuse(f"a {label} is {int(array.max())}; {self.bits}-bit values end at {top}")
        if self.g_idx is not None:
            if self.g_idx.shape != (self.in_features,) or self.g_idx.dtype != np.int32:
                raise refuse(f"g_idx is {self.g_idx.dtype} {self.g_idx.shape}; must be int32 {(self.in_features,)}")
            low, high = int(self.g_idx.min()), int(self.g_idx.max())
            if low < 0 or high >= groups:
                raise refuse(f"g_idx holds {low if low < 0 else high}; there are groups 0..{groups - 1}")


def absent_codes(out_features: int, in_features: int) -> Array:
    """Stands for the codes of a layer that is read or written beside them: uint8 zeros that take one byte in all."""
    return np.broadcast_to(np.zeros((), dtype=np.uint8), (out_features, in_features))


def trivial_g_idx(in_features: int, group_size: int) -> Array:
    """int32 [in_features] with i // group_size: groups of neighbouring channels."""
    return (np.arange(in_features, dtype=np.int64) // group_size).astype(np.int32)


def normal_g_idx(g_idx: Array | None, in_features: int, group_size: int) -> Array | None:
    """`g_idx` as canonical form wants it: None where it is trivial, else int32."""
    if g_idx is None:
        return None
    if g_idx.shape == (in_features,) and np.array_equal(g_idx, trivial_g_idx(in_features, group_size)):
        return None
    return np.ascontiguousarray(g_idx, dtype=np.int32)
