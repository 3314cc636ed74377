"""Floating-point tensors in another dtype: exactly, or rounded once where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from edgetool.converter.source import FLOAT_NAMES, PlainTensor
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

DTYPE_OF = {name: dtype for dtype, name in FLOAT_NAMES.items() if name in ("fp16", "bf16")}
"""fp16 -> F16, bf16 -> BF16: the targets that are not quantised."""


_TABLES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "masked_bias")
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}


@dataclass(frozen=True)
class Misfit:
    """How many of a tensor's values another dtype does not have, and how many lie beyond its largest."""

    values: int
    rounded: int
    overflowing: int


def delivered_dtype(tensor: PlainTensor, target: str) -> str:
    """The dtype a tensor gets in a checkpoint of `target` (F16 or BF16).

    Integers and the F8 kinds keep theirs, and so do the tables that old checkpoints hold and programs compute anew.
    """
    return target if tensor.dtype in FLOAT_NAMES and not tensor.name.endswith(_TABLES) else tensor.dtype


def misfit(tensor: PlainTensor, target: str) -> Misfit:
    """Read the whole tensor and count what `target` (F16 or BF16) cannot hold."""
    values = rounded = overflowing = 0
    for chunk in tensor.chunks():
        wide = _wide(chunk, tensor.dtype)
        back = _wide(narrowed(wide, target), target)
        different = (back != wide) & ~np.isnan(wide)
        beyond = different & np.isinf(back)
        values += wide.size
        rounded += int(different.sum())
        overflowing += int(beyond.sum())
    return Misfit(values, rounded, overflowing)


def delivered(tensor: PlainTensor, target: str) -> PlainTensor:
    """The same tensor with its values rounded to `target`; see `misfit` for whether that changes any."""
    if delivered_dtype(tensor, target) == tensor.dtype:
        return tensor

    def pieces() -> Iterator[Array]:
        for chunk in tensor.chunks():
            yield narrowed(_wide(chunk, tensor.dtype), target)

    return PlainTensor(tensor.name, target, tensor.shape, pieces)


def narrowed(values: Array, target: str) -> Array:
    """float32 or float64 rounded to F16 or BF16 (uint16 bits); what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return float32_to_bfloat16(values) if target == "BF16" else values.astype(np.float16)


def infinite(weights: Array, target: str) -> int:
    """How many weights in F16 or BF16 (uint16 bits) are NaN or infinite."""
    mask = np.uint16(_EXPONENT[target])
    return int(np.count_nonzero((weights.view(np.uint16) & mask) == mask))


def beyond(target: str, name: str, count: int, size: int) -> BadInput:
    """The error for `count` of the `size` weights of `name` that are infinite in F16 or BF16."""
    return BadInput(
        f"{name}: {count} of its {size} dequantised weights do not fit {FLOAT_NAMES[target]}",
        "--to bf16 has a wider range" if target == "F16" else None,
    )


def _wide(values: Array, dtype: str) -> Array:
    """float32, or float64 for F64; exact."""
    if dtype == "BF16":
        return bfloat16_to_float32(values)
    return values if dtype == "F64" else values.astype(np.float32, copy=False)
