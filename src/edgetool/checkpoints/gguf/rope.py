"""Llama 3's scaled rotation, which config.json gives as parameters and GGUF as a tensor of divisors.

Formula: transformers' modeling_rope_utils, rope_type "llama3" (the Llama 3.1 release): frequencies whose wavelength is
beyond what the model was first trained on are divided by `factor`, short ones are kept, and between the two the
divisors go over smoothly. GGUF's rope_freqs.weight holds the divisor of each frequency (llama.cpp's freq_factors).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

TENSOR = "rope_freqs.weight"
"""Name of the divisors in a GGUF file: F32 [head_dim / 2]."""

_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_parameters(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The four parameters from rope_scaling or rope_parameters of config.json, or None where they are not all there."""
    found: dict[str, Any] = {name: rope.get(name) for name in _PARAMETERS}
    if not all(isinstance(value, (int, float)) and value > 0 for value in found.values()):
        return None
    return found if found["high_freq_factor"] > found["low_freq_factor"] else None


def divisors(parameters: Mapping[str, Any], rope_theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    """float32 [head_dim / 2]: what each frequency rope_theta ** (-2 i / head_dim) is divided by, 1 .. factor."""
    factor, low, high, trained = (float(parameters[name]) for name in _PARAMETERS)
    frequencies = rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = trained * frequencies / (2 * math.pi)  # of each frequency in the context trained on
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def parameters_of(found: npt.NDArray[np.float32], rope_theta: float, head_dim: int) -> dict[str, Any] | None:
    """The parameters whose divisors are `found`, or None. Known are Llama 3's published ones, with any factor."""
    if found.shape != (head_dim // 2,) or not np.isfinite(found).all():
        return None
    parameters = {"factor": float(found.max()), **_PUBLISHED}
    # float32 in other orders of computation: a few units in the last of 24 bits
    same = np.allclose(found, divisors(parameters, rope_theta, head_dim), rtol=1e-5, atol=0)
    return parameters if same else None
