"""Rotary position embeddings: the variants that a table can hold, and that table.

A table [positions, rotary_dim / 2] of cos and sin decides everything but how channels pair up, so every variant that
does not depend on the length of the text at hand is supported. Angles are computed as transformers does (frequencies
and products rounded to float32), cos and sin in float64, rounded once to float16.
Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071, section 3); Llama 3.1's scaling as in transformers'
`modeling_rope_utils`; ChatGLM's half-rotary, interleaved form as in its `modeling_chatglm.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.errors import BadInput

Array = npt.NDArray[Any]

_REFUSED = {
    "longrope": "its frequencies change with the length of the text",
    "su": "its frequencies change with the length of the text",
}


@dataclass(frozen=True)
class Rope:
    """How queries and keys are turned.

    variant: default, linear, dynamic, yarn, llama3 or glm. style: `half` pairs channel i with i + rotary_dim / 2,
    `interleaved` pairs 2i with 2i + 1 (GLM). rotary_dim: channels of a head that are turned; the rest pass through.
    scaling: the variant's parameters as config.json gives them. trained_context: positions the model was trained for.
    """

    variant: str
    style: str
    rotary_dim: int
    theta: float
    trained_context: int
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def frequencies(self) -> tuple[Array, float]:
        """float64 [rotary_dim / 2] radians a position, and the factor on cos and sin."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        inverse = 1.0 / self.theta**exponents
        if self.variant == "linear":
            return inverse / float(self.scaling["factor"]), 1.0
        if self.variant == "yarn":
            return _yarn(inverse, self)
        if self.variant == "llama3":
            return _llama3(inverse, self.scaling), 1.0
        return inverse, 1.0

    def tables(self, positions: int) -> tuple[Array, Array]:
        """cos and sin for positions 0 .. positions - 1: float16 [positions, rotary_dim / 2] each."""
        inverse, factor = self.frequencies()
        angles = np.arange(positions, dtype=np.float32)[:, None] * inverse.astype(np.float32)[None, :]
        wide = angles.astype(np.float64)
        return (np.cos(wide) * factor).astype(np.float16), (np.sin(wide) * factor).astype(np.float16)

    def refuse_context(self, max_context: int) -> None:
        """Raise BadInput where `max_context` positions cannot be put into one table."""
        if self.variant == "dynamic" and max_context > self.trained_context:
            raise BadInput(
                f"RoPE scaling 'dynamic' changes its frequencies beyond {self.trained_context} positions, which a table"
                f" cannot hold, and max_context is {max_context}",
                f"use --max-context {self.trained_context} or less",
            )

    def to_dict(self) -> dict[str, Any]:
        """For the program."""
        return {
            "variant": self.variant,
            "style": self.style,
            "rotary_dim": self.rotary_dim,
            "theta": self.theta,
            "trained_context": self.trained_context,
            "scaling": dict(self.scaling),
        }


def rope_of(text: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of a Llama-like model from the text part of config.json (keys of transformers 4 and 5).

    Raises BadInput naming a variant that cannot be compiled.
    """
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), Mapping):
            parameters |= {name: value for name, value in text[key].items() if value is not None}
    variant = str(parameters.pop("rope_type", parameters.pop("type", "default")))
    parameters.pop("type", None)
    theta = float(parameters.pop("rope_theta", None) or text.get("rope_theta") or 10000.0)
    partial = float(parameters.pop("partial_rotary_factor", None) or text.get("partial_rotary_factor") or 1.0)
    trained = int(text.get("max_position_embeddings") or 2048)
    if variant == "mrope":  # three coordinates that are all the same for text
        variant = "default"
    if variant in _REFUSED:
        raise BadInput(f"RoPE scaling {variant!r} cannot be compiled: {_REFUSED[variant]}")
    needed = {"linear": ["factor"], "yarn": ["factor"], "llama3": ["factor", *_LLAMA3_KEYS]}
    if variant not in ("default", "dynamic", *needed):
        known = "default, linear, dynamic, yarn, llama3, mrope"
        raise BadInput(f"RoPE scaling {variant!r} is not known here; supported are {known}")
    for name in needed.get(variant, []):
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadInput(f"config.json: RoPE scaling {variant!r} needs a positive number {name}, and it is {value!r}")
    if "mrope_section" in parameters:
        parameters["mrope"] = "text positions only: all three coordinates are the same"
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise BadInput(
            f"config.json: partial_rotary_factor {partial} of head_dim {head_dim} is no even number of channels"
        )
    return Rope(variant, "half", rotary_dim, theta, trained, parameters)


def glm_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """ChatGLM's: the first half of each head is turned, neighbouring channels pair up, theta is 10000 x rope_ratio."""
    ratio = float(config.get("rope_ratio") or 1.0)
    trained = int(config.get("seq_length") or 2048)
    return Rope("glm", "interleaved", head_dim // 2, 10000.0 * ratio, trained, {"rope_ratio": ratio})


_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _llama3(inverse: Array, scaling: Mapping[str, Any]) -> Array:
    factor = float(scaling["factor"])
    low, high, trained = (float(scaling[key]) for key in _LLAMA3_KEYS)
    wavelength = 2 * math.pi / inverse
    smooth = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled: Array = np.where(wavelength > trained / low, inverse / factor, blended)
    return np.where(wavelength < trained / high, inverse, scaled)


def _yarn(inverse: Array, rope: Rope) -> tuple[Array, float]:
    scaling = rope.scaling
    factor, dim = float(scaling["factor"]), rope.rotary_dim
    trained = float(scaling.get("original_max_position_embeddings") or rope.trained_context)

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = (dimension(float(scaling.get(key) or other)) for key, other in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_attention(scaling, factor)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(float(scaling["mscale"])) / mscale(float(scaling["mscale_all_dim"]))
    return mscale(1.0)
