"""Scales between a checkpoint's dtype and `QuantizedLinear`'s, without losing a bit.

Tools store scales as float16 (GPTQ, autoawq), bfloat16 (gptqmodel's AWQ) or float32 (llm-compressor); kernels want 16
bit. A reader keeps what it finds; whoever wants another dtype asks for it here and is refused where that would round.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.errors import BadInput

Array = npt.NDArray[Any]


def loaded_scales(stored: Array, name: str = "") -> tuple[Array, str]:
    """Scales as read from a file (float16, float32, or uint16 = bfloat16 bits), any shape, to (values, dtype label).

    Values are float16 for "F16" and float32 for "BF16" and "F32". Raises BadInput, naming `name`, for other dtypes.
    """
    if stored.dtype == np.float16:
        return stored, "F16"
    if stored.dtype == np.float32:
        return stored, "F32"
    if stored.dtype == np.uint16:
        return bfloat16_to_float32(stored), "BF16"
    raise BadInput(f"scales of {name or 'a layer'} are {stored.dtype}; must be F16, BF16 or F32")


def stored_scales(linear: QuantizedLinear) -> Array:
    """Scales as they go into a file: float16, float32, or uint16 = bfloat16 bits; [out_features, n_groups]."""
    return float32_to_bfloat16(linear.scales) if linear.scale_dtype == "BF16" else linear.scales


def with_scale_dtype(linear: QuantizedLinear, dtype: str, *, rounding: bool = False, name: str = "") -> QuantizedLinear:
    """The same layer with scales of `dtype` ("F16", "BF16" or "F32").

    Raises BadInput, naming `name`, when a scale overflows, or is not exactly a `dtype` value and `rounding` is not set.
    """
    if linear.scale_dtype == dtype:
        return linear
    wide = linear.scales.astype(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            scales: Array = wide.astype(np.float16)
    elif dtype == "BF16":
        scales = bfloat16_to_float32(float32_to_bfloat16(wide))
    elif dtype == "F32":
        scales = wide
    else:
        raise ValueError(f"no scale dtype {dtype!r}")
    changed = int((scales.astype(np.float32) != wide).sum())
    where = f" ({name})" if name else ""
    if not np.isfinite(scales).all():
        raise BadInput(f"a scale of {float(np.abs(wide).max()):g} overflows {dtype}{where}")
    if changed and not rounding:
        raise BadInput(f"{changed} of {wide.size} {linear.scale_dtype} scales are not exact in {dtype}{where}")
    return replace(linear, scales=scales, scale_dtype=dtype)
