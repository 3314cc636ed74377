"""Frequencies and tables against transformers' own, and what cannot be put into a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgetool.errors import BadInput
from edgetool.fpga.rope import glm_rope, rope_of

BASE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic within": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, own bounds": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, not truncated": {**YARN, "truncate": False},
}


def reference(scaling: dict[str, Any] | None) -> tuple[np.ndarray, float]:
    import transformers as hf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": BASE["rope_theta"], "rope_type": "default", **(scaling or {})}
    config = hf.LlamaConfig(**{**BASE, "rope_parameters": parameters})
    if parameters["rope_type"] == "default":
        inverse = 1.0 / BASE["rope_theta"] ** (np.arange(0, 64, 2) / 64)
        return inverse, 1.0
    tensor, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    return tensor.double().numpy(), float(factor)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "old type key"])
def test_frequencies_are_those_of_transformers(name: str, spelling: str) -> None:
    scaling = SCALINGS[name]
    text: dict[str, Any] = dict(BASE)
    if spelling == "rope_parameters":
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default", **(scaling or {})}
    elif scaling is not None:
        text["rope_scaling"] = dict(scaling)
        if spelling == "old type key":
            text["rope_scaling"]["type"] = text["rope_scaling"].pop("rope_type")
    rope = rope_of(text, 64)
    inverse, factor = rope.frequencies()
    expected, expected_factor = reference(scaling)
    # transformers computes them in float32, edgetool in float64
    np.testing.assert_allclose(inverse, expected, rtol=2e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-6)
    assert (rope.style, rope.rotary_dim) == ("half", 64)


def test_tables_are_cos_and_sin_of_float32_angles_rounded_once() -> None:
    cos, sin = rope_of({**BASE, "rope_scaling": YARN}, 64).tables(300)
    inverse, factor = reference(YARN)
    assert cos.dtype == sin.dtype == np.float16 and cos.shape == (300, 32)
    for position in (0, 1, 17, 299):
        for pair in (0, 5, 31):
            angle = float(np.float32(position) * np.float32(inverse[pair]))
            # one half-unit of fp16 at values up to 1.14, and float32 frequencies off by their last bit
            assert abs(float(cos[position, pair]) - np.cos(angle) * factor) < 6e-4
            assert abs(float(sin[position, pair]) - np.sin(angle) * factor) < 6e-4


def test_glm_turns_half_of_each_head_in_neighbouring_pairs() -> None:
    rope = glm_rope({"rope_ratio": 50, "seq_length": 32768}, 128)
    assert (rope.style, rope.rotary_dim, rope.theta, rope.trained_context) == ("interleaved", 64, 500000.0, 32768)
    inverse, _ = rope.frequencies()
    assert inverse[1] == pytest.approx(500000.0 ** (-2 / 64), rel=1e-12)


def test_part_of_a_head_may_be_turned() -> None:
    assert rope_of({**BASE, "partial_rotary_factor": 0.5}, 64).rotary_dim == 32


def test_multimodal_sections_are_plain_rope_for_text() -> None:
    rope = rope_of({**BASE, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}, 64)
    assert rope.variant == "default"
    assert "text positions only" in rope.to_dict()["scaling"]["mrope"]


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "'longrope' cannot be compiled"),
        ({"type": "su"}, "'su' cannot be compiled"),
        ({"rope_type": "proportional"}, "'proportional' is not known"),
        ({"rope_type": "linear"}, "needs a positive number factor"),
        ({"rope_type": "yarn", "factor": True}, "needs a positive number factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ],
)
def test_what_a_table_cannot_hold_is_refused_by_name(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        rope_of({**BASE, "rope_scaling": scaling}, 64)


def test_dynamic_scaling_holds_up_to_the_trained_context() -> None:
    rope = rope_of({**BASE, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64)
    rope.refuse_context(4096)
    with pytest.raises(BadInput, match="'dynamic'") as refused:
        rope.refuse_context(4097)
    assert "--max-context 4096" in str(refused.value.hint)
