"""bfloat16 on numpy, which has no such type: carried as uint16 bit patterns, the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_QUIET_BIT = 0x0040
_BLOCK = 1 << 16  # elements converted at a time: 256 KiB, so that the intermediate array stays in the L2 cache


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns, any shape, to float32 of the same shape. Exact, NaN payloads included."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def float32_to_bfloat16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Round float32 values (any shape; other floats are cast to float32 first) to bfloat16 bit patterns, uint16.

    Round to nearest, ties to even, as IEEE 754 section 4.3.1 and as torch does; values beyond the largest bfloat16
    become infinity; a NaN stays a NaN of the same sign (its quiet bit is set, so that cutting the payload cannot turn
    it into infinity).
    """
    source = np.ascontiguousarray(values, dtype=np.float32)
    result = np.empty(source.shape, dtype=np.uint16)
    flat_source, flat_result = source.reshape(-1), result.reshape(-1)
    spare = np.empty(min(source.size, _BLOCK), dtype=np.uint32)
    for start in range(0, source.size, _BLOCK):
        block = flat_source[start : start + _BLOCK]
        bits, rounded, out = block.view(np.uint32), spare[: block.size], flat_result[start : start + _BLOCK]
        np.right_shift(bits, np.uint32(16), out=rounded)
        rounded &= np.uint32(1)  # ties go up only where the last bit kept is odd
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        np.copyto(out, rounded, casting="unsafe")
        is_nan = np.isnan(block)
        if is_nan.any():
            out[is_nan] = (bits[is_nan] >> 16) | _QUIET_BIT
    return result.reshape(np.shape(values))
