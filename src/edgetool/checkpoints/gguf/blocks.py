"""GGUF's blocks of 32 weights and the canonical form: Q4_0, Q4_1, Q5_0 and Q8_0, byte for byte.

Source: ggml's block_q4_0 ... block_q8_0 (ggml-common.h) and their dequantize_row_... (ggml-quants.c). A row of a tensor
is a sequence of blocks; d and m are little-endian float16. A block of 32 values x is, in this order:

    Q4_0  18 bytes  d, qs[16]           x = d * (q - 8),    q 0..15
    Q4_1  20 bytes  d, m, qs[16]        x = d * q + m,      q 0..15
    Q5_0  22 bytes  d, qh[4], qs[16]    x = d * (q - 16),   q 0..31
    Q8_0  34 bytes  d, qs[32]           x = d * q,          q int8

Byte j of the 16 in qs holds value j in its low and value j + 16 in its high nibble. qh is a little-endian uint32 whose
bit i is bit 4 of value i. All products are exact in float32, as is d * q + m where m is -d times a small integer, so
values are equal to the canonical form's bit for bit. (For that, Q4_1 is used with positive scales only: with a negative
d, where the canonical form has a weight of -0, d * q + m is +0.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.scale_storage import with_scale_dtype
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

BLOCK = 32
"""Weights a block."""

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}
"""Type -> bytes a block."""

CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""The types that `read` understands -> bits of their canonical codes."""

_SIGNED = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}  # what code - zero may be
_CHUNK_BLOCKS = 1 << 14  # blocks worked on at a time, so that temporaries stay in the cache


def read(kind: str, stored: Array, name: str = "") -> QuantizedLinear:
    """Rows of blocks, uint8 [out_features, row_bytes] of a type in CODE_BITS, to canonical form with groups of 32.

    Q4_0: zeros are 8. Q8_0: codes are q + 128, zeros 128. Q4_1: the zero is -m / d; BadInput is raised where that is
    no integer in 0..15 or d is negative (see `inexact_minima`), as for a scale that is NaN or infinite.
    """
    rows = stored.shape[0]
    blocks = stored.reshape(-1, BLOCK_BYTES[kind])
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float16, copy=False)
    codes = np.empty((len(blocks), BLOCK), dtype=np.uint8)
    if kind == "Q8_0":
        np.bitwise_xor(blocks[:, 2:], 0x80, out=codes)  # two's complement plus 128
        zeros = np.full(scales.shape, 128, dtype=np.uint8)
    else:
        packed = blocks[:, BLOCK_BYTES[kind] - 16 :]
        np.bitwise_and(packed, 15, out=codes[:, :16])
        np.right_shift(packed, 4, out=codes[:, 16:])
        zeros = np.full(scales.shape, 8, dtype=np.uint8) if kind == "Q4_0" else _zeros_of_minima(blocks, name)
    linear = QuantizedLinear(
        codes=codes.reshape(rows, -1),
        scales=scales.reshape(rows, -1),
        zeros=zeros.reshape(rows, -1),
        g_idx=None,
        bits=CODE_BITS[kind],
        group_size=BLOCK,
    )
    linear.validate(name)
    return linear


def inexact_minima(stored: Array) -> int:
    """How many of the Q4_1 blocks in uint8 [rows, row_bytes] are not -d * z, z of 0..15 and d > 0, in their minimum."""
    return int((_zero_candidates(stored.reshape(-1, BLOCK_BYTES["Q4_1"])) < 0).sum())


def _zeros_of_minima(blocks: Array, name: str) -> Array:
    zeros = _zero_candidates(blocks)
    if (wrong := int((zeros < 0).sum())) > 0:
        raise BadInput(f"{wrong} of {zeros.size} minima are no multiple of their scale{f' ({name})' if name else ''}")
    return zeros.astype(np.uint8)


def _zero_candidates(blocks: Array) -> npt.NDArray[np.int16]:
    """For each Q4_1 block the z of 0..15 with m == -d * z and d > 0, or -1; 0 for a block of zeros (d and m are 0)."""
    # float64 holds float16 times a small integer exactly
    pairs = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float64)
    d, m = pairs[:, 0], pairs[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.rint(-m / d)
        exact = (d > 0) & (d * z == -m) & (z >= 0) & (z <= 15)
    nothing = (d == 0) & ~np.signbit(d) & (m == 0)
    return np.where(exact, z, np.where(nothing, 0, -1)).astype(np.int16)


def kind_for(linear: QuantizedLinear) -> str | None:
    """The smallest type that holds every weight of `linear` exactly, or None (`refusal` says why).

    8-bit codes go into Q8_0. Narrower ones into Q4_0 where code - zero is in -8..7 (symmetric 4 bit, all of 2 and 3
    bits), else into Q4_1 where scales are positive and every -scale * zero is a float16, else into Q5_0, which holds
    any difference of two 4-bit numbers.
    """
    half = _half_scales(linear)
    if half is None or _misaligned(linear) is not None:
        return None
    if linear.bits == 8:
        return "Q8_0" if _in_range(linear, "Q8_0") else None
    if _in_range(linear, "Q4_0"):
        return "Q4_0"
    return "Q4_1" if _minima_are_exact(half, linear.zeros) else "Q5_0"


def refusal(linear: QuantizedLinear) -> str | None:
    """Why no type of GGUF holds `linear` exactly, or None."""
    reason = _misaligned(linear)
    if reason is None and _half_scales(linear) is None:
        reason = f"its {linear.scale_dtype} scales are not exact in float16, the only dtype of scales in GGUF"
    if reason is None and kind_for(linear) is None:
        reason = "a code minus its zero is outside -128..127, which Q8_0 cannot hold (asymmetric 8 bit)"
    return reason


def write(kind: str, linear: QuantizedLinear) -> Array:
    """`linear` as rows of blocks of `kind`, uint8 [out_features, row_bytes]. `kind` must come from `kind_for`."""
    half = _half_scales(linear)
    if half is None:
        raise ValueError(f"scales are not exact in float16 ({linear.scale_dtype})")
    stored = np.empty((linear.out_features, linear.in_features // BLOCK, BLOCK_BYTES[kind]), dtype=np.uint8)
    groups = _group_of_block(linear)
    for rows in _row_chunks(linear):
        scales, part = half[rows][:, groups], stored[rows]
        part[:, :, :2] = _bytes(scales)
        if kind == "Q4_1":
            zeros = linear.zeros[rows][:, groups]
            # exact, says kind_for; the sum makes a minimum of -0 the +0 that llama.cpp writes
            part[:, :, 2:4] = _bytes(-scales * zeros.astype(np.float16) + np.float16(0))
            codes = linear.codes[rows].reshape(*zeros.shape, BLOCK)
        elif kind == "Q4_0" and linear.bits == 4 and linear.sym:
            codes = linear.codes[rows].reshape(*scales.shape, BLOCK)
        else:
            low, high = _SIGNED[kind]
            signed = _signed(linear, rows, groups)
            if int(signed.min()) < low or int(signed.max()) > high:
                raise ValueError(f"code - zero reaches {signed.min()}..{signed.max()}; {kind} holds {low}..{high}")
            if kind == "Q8_0":
                part[:, :, 2:] = signed.astype(np.int8).view(np.uint8)
                continue
            codes = (signed - low).astype(np.uint8)
        if kind == "Q5_0":
            part[:, :, 2:6] = np.packbits(codes >> 4, axis=-1, bitorder="little")
            codes &= 15
        part[:, :, -16:] = codes[:, :, :16] | codes[:, :, 16:] << 4
    return stored.reshape(linear.out_features, -1)


def _misaligned(linear: QuantizedLinear) -> str | None:
    if linear.g_idx is not None:
        return "its groups follow an activation order (g_idx), and GGUF's blocks are 32 neighbouring channels"
    if linear.in_features % BLOCK:
        return f"in_features {linear.in_features} is no multiple of {BLOCK}, the size of GGUF's blocks"
    if linear.group_size % BLOCK and linear.group_size < linear.in_features:
        return f"group_size {linear.group_size} is no multiple of {BLOCK}, the size of GGUF's blocks"
    return None


def _half_scales(linear: QuantizedLinear) -> Array | None:
    """Scales as float16 [out_features, n_groups], or None where that would round."""
    try:
        return with_scale_dtype(linear, "F16").scales
    except BadInput:
        return None


def _minima_are_exact(scales: Array, zeros: Array) -> bool:
    signs = (scales > 0) | ((scales == 0) & ~np.signbit(scales) & (zeros == 0))
    exact = scales.astype(np.float64) * zeros
    with np.errstate(over="ignore"):
        return bool(signs.all()) and np.array_equal(exact.astype(np.float16), exact)


def _group_of_block(linear: QuantizedLinear) -> Array:
    return np.arange(linear.in_features // BLOCK) * BLOCK // linear.group_size


def _row_chunks(linear: QuantizedLinear) -> Iterator[slice]:
    step = max(1, _CHUNK_BLOCKS * BLOCK // linear.in_features)
    return (slice(start, start + step) for start in range(0, linear.out_features, step))


def _in_range(linear: QuantizedLinear, kind: str) -> bool:
    low, high = _SIGNED[kind]
    top = (1 << linear.bits) - 1
    if -int(linear.zeros.max()) >= low and top - int(linear.zeros.min()) <= high:
        return True  # whatever the codes are
    groups = _group_of_block(linear)
    differences = (_signed(linear, rows, groups) for rows in _row_chunks(linear))
    return all(int(signed.min()) >= low and int(signed.max()) <= high for signed in differences)


def _signed(linear: QuantizedLinear, rows: slice, groups: Array) -> npt.NDArray[np.int16]:
    """code - zero as int16 [rows, blocks, 32]."""
    zeros = linear.zeros[rows][:, groups].astype(np.int16)
    signed = linear.codes[rows].reshape(*zeros.shape, BLOCK).astype(np.int16)
    signed -= zeros[:, :, None]
    return signed


def _bytes(halves: Array) -> Array:
    """float16 [rows, blocks] as its little-endian bytes, uint8 [rows, blocks, 2]."""
    return np.ascontiguousarray(halves, dtype="<f2").view(np.uint8).reshape(*halves.shape, 2)
