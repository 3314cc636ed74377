"""bfloat16 on numpy, which has no such type: carried as uint16 bit patterns, the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_QUIET_BIT = 0x0040
_BLOCK = 1 << 20  # elements converted at a time, so that the intermediate uint32 arrays stay small


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
    flat_source = source.reshape(-1).view(np.uint32)
    flat_result = result.reshape(-1)
    for start in range(0, flat_source.size, _BLOCK):
        bits = flat_source[start : start + _BLOCK]
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        flat_result[start : start + _BLOCK] = np.where(is_nan, (bits >> 16) | _QUIET_BIT, rounded)
    return result.reshape(np.shape(values))
