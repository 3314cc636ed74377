"""`et1` to the bit: every operation's every result against plain loops written from docs/image-format.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from tests.fakes.quantized_models import Made, Shape
from tests.fakes.scalar_et1 import ScalarEt1
from tests.unit.fpga.simulator.recording import Recording, bits

Compiled = Callable[..., tuple[Made, Path]]

IDS = [3, 17, 32, 30]
SMALL = Shape(layers=2, hidden=96, ffn=160, heads=3, kv_heads=1, head_dim=32, vocab=70)
LONG_ROWS = Shape(layers=1, hidden=64, ffn=576, heads=2, kv_heads=1, head_dim=32, vocab=40)
WIDE_ROWS = Shape(layers=1, hidden=256, ffn=384, heads=2, kv_heads=2, head_dim=128, vocab=33)
ALL = ("q", "k", "v", "o", "gate", "up", "down")

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, sizes that no multiple fits": ("llama", {"shape": SMALL}, {}),
    "llama, two packages in a row": ("llama", {"shape": LONG_ROWS}, {}),
    "llama, groups of 64": ("llama", {"shape": WIDE_ROWS, "group_size": 64}, {}),
    "llama, groups of 128": ("llama", {"shape": WIDE_ROWS, "group_size": 128}, {}),
    "llama, every bias": ("llama", {"shape": SMALL, "biases": ALL}, {}),
    "llama, head of fp16": ("llama", {"shape": SMALL}, {"lm_head": "fp16"}),
    "llama, wide head of fp16": ("llama", {"shape": WIDE_ROWS, "group_size": 128}, {"lm_head": "fp16"}),
    "llama, offsets": ("llama", {"shape": SMALL, "format": "awq", "sym": False}, {}),
    "llama, offsets and two packages": ("llama", {"shape": LONG_ROWS, "format": "gptq_v2", "sym": False}, {}),
    "llama, every order": ("llama", {"shape": SMALL, "desc_act": ALL, "same_order": False}, {}),
    "qwen2, biases and shared orders": ("qwen2", {"shape": SMALL, "desc_act": ALL}, {}),
    "qwen2, signmag": ("qwen2", {"shape": SMALL, "lowest_code": 1}, {"int4": "signmag"}),
    "qwen3, norms of heads": ("qwen3", {"shape": SMALL}, {}),
    "chatglm, half of a head turned in neighbours": ("chatglm", {"shape": SMALL, "tied": True}, {}),
    "qwen2_vl, its text": ("qwen2_vl", {"shape": SMALL}, {}),
}


def compare(recording: Recording, oracle: ScalarEt1, ids: list[int]) -> int:
    """Feed the oracle and compare all results of all tokens, -0 apart from 0; returns how many there were."""
    compared = 0
    for position, token in enumerate(ids):
        oracle.feed(token)
        for (part, layer, number), expected in oracle.results.items():
            key = (part, layer, number)
            if part == "epilogue" and position < len(ids) - 1:
                continue  # it ran for the last token only
            got = recording.calls[key][-1][-1] if part == "epilogue" else recording.of_token(key, position)
            label = f"{recording.kinds[key]} at {key}, token {position}"
            if recording.kinds[key] == "ARGMAX":
                assert int(got) == expected, label
            else:
                assert np.array_equal(bits(got), bits(expected)), label
            compared += 1
    return compared


@pytest.mark.parametrize("case", CASES)
def test_every_operation_is_what_plain_loops_compute(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    _, image = compiled(family, settings, **how)
    recording = Recording()
    session = Simulator(Image.open(image), trace=recording).session()
    session.feed(IDS[:3], logits="none")  # a chunk of a prompt, then one token
    session.feed(IDS[3:])
    oracle = ScalarEt1(image)
    per_token = len(oracle.program["prologue"]) + oracle.program["layers"] * len(oracle.program["layer"])
    assert compare(recording, oracle, IDS) == per_token * len(IDS) + len(oracle.program["epilogue"])
    assert session.overflows == {}
