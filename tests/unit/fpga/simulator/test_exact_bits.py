"""`et1` to the bit: every operation's every result against plain loops written from docs/image-format.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from tests.fakes.quantized_models import Made
from tests.fakes.scalar_et1 import ScalarEt1
from tests.unit.fpga.simulator.damage import with_constant
from tests.unit.fpga.simulator.recording import Recording, bits
from tests.unit.fpga.simulator.shapes import LONG_ROWS, SMALL, SMALLEST, WIDE_ROWS

Compiled = Callable[..., tuple[Made, Path]]

IDS = [3, 17, 32, 30]
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


def test_a_context_of_several_blocks_of_lanes_is_what_plain_loops_compute(compiled: Compiled) -> None:
    _, image = compiled("llama", {"max_context": 144}, shape=SMALLEST)
    ids = [(7 * number) % 34 for number in range(140)]
    recording = Recording()
    session = Simulator(Image.open(image), trace=recording).session()
    session.feed(ids[:131], logits="none")
    session.feed(ids[131:])
    assert compare(recording, ScalarEt1(image), ids) > 140 * 10


def test_numbers_beyond_fp16_become_what_ieee_says_and_are_flagged(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama", shape=SMALL)
    damaged = Path(shutil.copytree(image, tmp_path / "image"))
    with_constant(damaged, "layers.0.post_norm", lambda gamma: gamma * 0 + np.float16(6e4))
    recording = Recording()
    session = Simulator(Image.open(damaged), trace=recording).session()
    session.feed(IDS[:3], logits="none")
    session.feed(IDS[3:])
    assert compare(recording, ScalarEt1(damaged), IDS) > 100
    assert session.overflows["layers.0.RMSNORM normed"] > 0
    assert session.overflows["layers.1.MVM v"] > 0


def test_a_token_that_is_infinite_does_not_reach_those_before_it_in_its_chunk(
    compiled: Compiled, tmp_path: Path
) -> None:
    _, image = compiled("llama", shape=SMALL)
    damaged = Path(shutil.copytree(image, tmp_path / "image"))
    embedding = np.fromfile(damaged / "host" / "embed.f16.bin", dtype="<f2").reshape(SMALL.vocab, SMALL.hidden)
    embedding[IDS[2], 7] = np.inf
    embedding.tofile(damaged / "host" / "embed.f16.bin")
    recording = Recording()
    session = Simulator(Image.open(damaged), trace=recording).session()
    session.feed(IDS)
    compare(recording, ScalarEt1(damaged), IDS)
    (last,) = recording.calls["layer", 1, 16]
    assert [bool(np.isfinite(row).all()) for row in last] == [True, True, False, False]
