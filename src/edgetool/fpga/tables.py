"""Functions of one fp16 number as tables of all 65,536 of them: entry i is f of the number with bit pattern i.

Computed in float64 and rounded once to float16, so that an image has no room for another's idea of exp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ENTRIES = 1 << 16


def silu_table() -> Array:
    """float16 [65536] of x / (1 + exp(-x)); NaN stays NaN, -inf gives 0."""
    x = _all_halves()
    with np.errstate(over="ignore", invalid="ignore"):
        values = x / (1.0 + np.exp(-x))
        values[np.isneginf(x)] = -0.0
        return values.astype(np.float16)


def exp_table() -> Array:
    """float16 [65536] of exp(x): softmax looks up x - max, so entries above 0 are there for completeness."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return np.exp(_all_halves()).astype(np.float16)


def _all_halves() -> Array:
    return np.arange(ENTRIES, dtype=np.uint16).view(np.float16).astype(np.float64)
