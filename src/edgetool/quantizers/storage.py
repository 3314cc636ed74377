"""How tensors that are not quantised are stored: 16 bit, never silently out of range."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from edgetool.checkpoints.bfloat16 import float32_to_bfloat16
from edgetool.checkpoints.tensor_file import TensorInfo, iter_chunks
from edgetool.errors import BadInput
from edgetool.progress import Progress

_FLOATS = {"F32", "F64"}
_EXPONENT_BITS = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
"""All of them set = infinity or NaN."""
_CONFIG_NAMES = {"float16": "F16", "bfloat16": "BF16"}
_FP16_MAX = 65504.0
_BF16_MAX = float.fromhex("0x1.fep127")


def model_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """ "F16" or "BF16": what config.json says, else what most of the weights' bytes are, else "F16"."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for section in (config, text or {}):
        for key in ("dtype", "torch_dtype"):
            if str(section.get(key)) in _CONFIG_NAMES:
                return _CONFIG_NAMES[section[key]]
    sizes = {"F16": 0, "BF16": 0}
    for info in tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return "BF16" if sizes["BF16"] > sizes["F16"] else "F16"


def stored_dtype_of(dtype: str, target: str) -> str:
    """16-bit floats and everything that is no float stay as they are; wider floats become `target`."""
    return target if dtype in ("F32", "F64") else dtype


def to_storage(array: Any, dtype: str, target: str, name: str) -> tuple[str, Any]:
    """(dtype, array) as stored; `array` has dtype `dtype` (BF16 as uint16). Raises BadInput for what does not fit."""
    _check_finite(array, dtype, name)
    if dtype not in ("F32", "F64"):
        return dtype, array
    largest = float(np.abs(array).max(initial=0.0))
    if target == "BF16":
        if largest > _BF16_MAX:
            raise BadInput(f"{name} holds {largest:g}, which does not fit bfloat16")
        return target, float32_to_bfloat16(np.asarray(array, dtype=np.float32))
    if largest > _FP16_MAX:
        raise BadInput(
            f"{name} holds {largest:g}, which does not fit float16",
            'set "dtype": "bfloat16" in the model\'s config.json',
        )
    return target, np.asarray(array).astype(np.float16)


def storage_chunks(info: TensorInfo, target: str) -> Iterator[Any]:
    """A stored tensor's bytes as `to_storage` gives them, a few MiB at a time."""
    for chunk in iter_chunks(info):
        yield to_storage(chunk, info.dtype, target, info.name)[1]


def check_weights(tensors: Mapping[str, TensorInfo], target: str, linears: Collection[str], progress: Progress) -> None:
    """Read everything once before hours are spent on it: nothing may be NaN, infinite, or too large to be stored.

    linears: names of the tensors that will be quantised, which need not fit 16 bit. Raises BadInput naming the tensor.
    """
    with progress.task("check", sum(info.nbytes for info in tensors.values()), "B") as task:
        for name, info in tensors.items():
            for chunk in iter_chunks(info):
                if name in linears:
                    _check_finite(chunk, info.dtype, name)
                else:
                    to_storage(chunk, info.dtype, target, name)
            task.advance(info.nbytes)


def _check_finite(array: Any, dtype: str, name: str) -> None:
    if dtype in _EXPONENT_BITS:  # on the bits: many times faster than widening to float32 first
        mask = _EXPONENT_BITS[dtype]
        bad = bool(((array.view(np.uint16) & mask) == mask).any())
    else:
        bad = dtype in _FLOATS and not bool(np.isfinite(array).all())
    if bad:
        raise BadInput(f"{name} holds NaN or infinite values")
