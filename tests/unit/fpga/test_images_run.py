"""An image is the model: what its files alone compute is what the dequantised checkpoint computes, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.image_runner import Runner
from tests.fakes.quantized_models import Made
from tests.unit.fpga import reference

IDS = [3, 77, 150, 9, 42, 200, 5, 31]
Compiled = Callable[..., tuple[Made, Path]]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, tied": ("llama", {"tied": True}, {}),
    "llama, every bias": ("llama", {"biases": ("q", "k", "v", "o", "gate", "up", "down"), "desc_act": ("down",)}, {}),
    "llama, head of fp16": ("llama", {}, {"lm_head": "fp16"}),
    "llama, bf16": ("llama", {"plain_dtype": "BF16", "desc_act": ("down",)}, {"lm_head": "fp16"}),
    "llama, quantised head": ("llama", {"quantized_head": True}, {"lm_head": None}),
    "llama, asymmetric awq": ("llama", {"format": "awq", "sym": False}, {}),
    "llama, asymmetric gptq_v2": ("llama", {"format": "gptq_v2", "sym": False}, {}),
    "qwen2, compressed-tensors": ("qwen2", {"format": "compressed-tensors", "group_size": 64}, {}),
    "qwen2, signmag": ("qwen2", {"lowest_code": 1}, {"int4": "signmag"}),
    "qwen3": ("qwen3", {}, {}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "qwen2_vl": ("qwen2_vl", {}, {}),
    "qwen2_5_vl": ("qwen2_5_vl", {"format": "compressed-tensors", "sym": False}, {}),
    "chatglm": ("chatglm", {}, {}),
    "chatglm, tied, longer": ("chatglm", {"tied": True, "rope_ratio": 50.0}, {}),
    "desc_act everywhere, orders shared": ("qwen2", {"desc_act": ("q", "k", "v", "o", "gate", "up", "down")}, {}),
    "desc_act everywhere, orders apart": (
        "llama",
        {"desc_act": ("q", "k", "v", "o", "gate", "up", "down"), "same_order": False},
        {},
    ),
    "desc_act in k and up alone": ("llama", {"desc_act": ("k", "up"), "same_order": False}, {}),
    "chatglm in activation order": ("chatglm", {"desc_act": ("q", "k", "v", "o", "gate", "up", "down")}, {}),
    "llama3 rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_image_computes_what_its_checkpoint_computes(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    made, image = compiled(family, settings, **how)
    runner = Runner(image)
    got = [runner.feed(IDS[:5]), *(runner.feed([one]) for one in IDS[5:])]  # a chunk of a prompt, then token by token
    head = runner.image.tensors["lm_head"]["source"]["module"]
    stored = {head: runner.weight("lm_head")}
    for number, logits in enumerate(got):
        expected = reference.logits(made, IDS[: 5 + number], stored)
        # Tables of cos and sin are fp16: each of 2 layers adds about 2^-11 of a value; wrong weights give 100 %.
        # Offsets of asymmetric weights are fp16 too.
        assert np.abs(logits - expected).max() < 5e-3 * np.abs(expected).max()
        assert np.argmax(logits) == np.argmax(expected)
        assert runner.buffers["token"].shape == (1,)


def test_the_comparison_would_notice_a_wrong_order(compiled: Compiled) -> None:
    made, image = compiled("llama", desc_act=("q", "k", "v", "o", "gate", "up", "down"), same_order=False)
    runner = Runner(image)
    constant = runner.image.constant
    shifted = {"layers.1.o.order"}
    runner.image.__dict__["constant"] = lambda name: np.roll(constant(name), 1) if name in shifted else constant(name)
    logits = runner.feed(IDS)
    expected = reference.logits(made, IDS, {"lm_head": runner.weight("lm_head")})
    assert np.abs(logits - expected).max() > 5e-2 * np.abs(expected).max()
