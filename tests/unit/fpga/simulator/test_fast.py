"""`fast`: the same model as float64 computes from the image's bytes, near enough, whatever way it is fed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from edgetool.fpga.simulator.fast_cache import DeviceKvCache
from edgetool.fpga.simulator.kv_cache import KvCache, KvGeometry
from edgetool.fpga.simulator.traffic import Traffic, check_plan, expected_decode_bytes
from tests.fakes.image_runner import Runner
from tests.fakes.quantized_models import Made, Shape
from tests.unit.fpga.simulator.recording import Recording
from tests.unit.fpga.test_checks import rewrite
from tests.unit.fpga.test_images_run import CASES

Compiled = Callable[..., tuple[Made, Path]]

IDS = [3, 77, 150, 9, 42, 200, 5, 31]
NEAR = 0.05
"""bfloat16 has 8 bits: each product is off by about 2^-9 of its row, and two layers have eight of them in a chain."""


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square difference as a share of the spread."""
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / np.std(wanted))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_float64(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    _, image = compiled(family, settings, **how)
    simulator = Simulator(Image.open(image), "fast")
    with simulator.session() as session:
        logits = session.feed(IDS, "all")
    assert logits.dtype == np.float32
    runner = Runner(image)
    wanted = np.stack([runner.feed([one]) for one in IDS])
    assert distance(logits, wanted) < NEAR


@pytest.mark.parametrize("case", ["llama", "chatglm in activation order", "qwen3", "llama, asymmetric awq"])
def test_a_prompt_in_one_piece_and_token_by_token_agree(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    simulator = Simulator(Image.open(compiled(family, settings, **how)[1]), "fast")
    with simulator.session() as whole, simulator.session() as single:
        together = whole.feed(IDS, "all")
        apart = np.concatenate([single.feed([one]) for one in IDS])
        # the cache's fp16 and bfloat16 may round to either side where float32 sums differ in their last bit
        assert distance(apart, together) < NEAR / 2
        assert whole.position == single.position == len(IDS)


@pytest.mark.parametrize("case", ["qwen2, signmag", "desc_act everywhere, orders apart", "qwen3", "llama, every bias"])
def test_fused_operations_give_what_they_give_apart(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    image = Image.open(compiled(family, settings, **how)[1])
    recording = Recording()
    apart = Simulator(image, "fast", trace=recording).session().feed(IDS, "all")
    fused = Simulator(image, "fast").session().feed(IDS, "all")
    assert distance(fused, apart) < NEAR / 2
    kinds = set(recording.kinds.values())
    assert {"QK", "SOFTMAX", "PV", "ROPE", "MVM", "ACT", "KV_WRITE"} <= kinds  # nothing was hidden in a fused step


def test_wide_groups_and_heads_work_too(compiled: Compiled) -> None:
    shape = Shape(layers=1, hidden=256, ffn=640, heads=2, kv_heads=1, head_dim=128, vocab=250)
    for group_size in (64, 128):
        _, image = compiled("llama", {}, shape=shape, group_size=group_size)
        runner = Runner(image)
        wanted = np.stack([runner.feed([one]) for one in IDS])
        assert distance(Simulator(Image.open(image), "fast").session().feed(IDS, "all"), wanted) < NEAR


@pytest.mark.parametrize("case", ["llama", "llama, head of fp16", "llama, asymmetric gptq_v2", "chatglm"])
def test_what_a_token_reads_is_what_the_manifest_plans(compiled: Compiled, case: str) -> None:
    family, how, settings = CASES[case]
    image = Image.open(compiled(family, settings, **how)[1])
    with Simulator(image, "fast").session() as session:
        session.feed(IDS)
        session.traffic.reset()
        session.feed([7])
        found = session.traffic.to_dict()
    check_plan("image", found["bytes_by_role"], expected_decode_bytes(image.manifest["memory"], len(IDS) + 1))
    assert len(set(found["bytes_per_pc"])) == 1 and found["tokens"] == 1


def test_a_prompt_that_begins_like_another_starts_behind_it(compiled: Compiled) -> None:
    simulator = Simulator(Image.open(compiled("llama")[1]), "fast")
    fresh = simulator.session().feed([*IDS, 8, 9])
    with simulator.session() as first:
        first.feed(IDS)
    with simulator.session([*IDS, 8, 9]) as second:
        assert second.position == len(IDS)
        assert distance(second.feed([8, 9]), fresh) < NEAR / 2


@pytest.mark.parametrize("table", ["table.silu", "table.exp"])
def test_another_table_is_looked_up_and_not_taken_for_the_function(
    compiled: Compiled, tmp_path: Path, table: str
) -> None:
    image = Path(shutil.copytree(compiled("llama")[1], tmp_path / "image"))
    opened = Image.open(image)
    usual = Simulator(opened, "fast").session().feed(IDS)
    record = opened.constants[table]
    start = record["addr"] - next(one for one in opened.manifest["segments"] if one["space"] == "ddr")["addr"]

    def halve(raw: np.ndarray) -> None:
        entries = raw[start : start + record["bytes"]].view("<f2")
        entries *= np.float16(0.5)

    rewrite(image, "ddr.bin", halve)
    changed = Simulator(Image.open(image), "fast").session().feed(IDS)
    if table == "table.silu":
        assert distance(changed, usual) > 4 * NEAR
    else:  # half of every exponential is half of their sum too
        assert distance(changed, usual) < NEAR
    runs = Simulator(Image.open(image), "fast", trace=Recording()).session().feed(IDS)
    assert distance(runs, changed) < NEAR / 2


def test_a_flipped_nibble_changes_the_answer(compiled: Compiled, tmp_path: Path) -> None:
    image = Path(shutil.copytree(compiled("llama")[1], tmp_path / "image"))
    usual = Simulator(Image.open(image), "fast").session().feed(IDS)
    at = int(Image.open(image).tensors["lm_head"]["addr"]) + 32

    def flip(raw: np.ndarray) -> None:
        raw[at] ^= 0x08

    rewrite(image, "hbm/pc05.bin", flip)
    changed = Simulator(Image.open(image), "fast").session().feed(IDS)
    assert np.flatnonzero(usual[0] != changed[0]).tolist() == [5]


def test_a_cache_on_a_device_holds_what_the_images_cache_holds() -> None:
    geometry = KvGeometry(layers=2, kv_heads=2, head_dim=32, base=0, capacity_tokens=48)
    plain, moved = KvCache(geometry), DeviceKvCache(geometry, torch.device("cpu"))
    traffic = {"plain": Traffic(), "moved": Traffic()}
    rows = torch.randn(5, 64).half()
    for cache in (plain, moved):
        cache.write(1, True, 3, rows)
    got = [cache.read(1, True, 9, traffic[name]) for name, cache in (("plain", plain), ("moved", moved))]
    assert torch.equal(got[0], got[1]) and got[0].shape == (2, 32, 9)
    assert torch.equal(got[1][1, 4, 3:8], rows[:, 32 + 4].float())
    assert traffic["plain"].to_dict() == traffic["moved"].to_dict()
    other = DeviceKvCache(geometry, torch.device("cpu"))
    other.restore(moved.snapshot(8), 8)
    assert torch.equal(other.read(1, True, 9, Traffic()), got[1])
    assert (moved.snapshot(8).tokens, moved.snapshot(8).nbytes) == (8, plain.snapshot(8).nbytes)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_model(compiled: Compiled) -> None:
    shape = Shape(layers=2, hidden=256, ffn=640, heads=4, kv_heads=2, head_dim=64, vocab=250)
    for how in ({"group_size": 32}, {"group_size": 64}, {"group_size": 128}, {"format": "awq", "sym": False}):
        settings: dict[str, Any] = {"shape": shape, **how}
        _, image = compiled("llama", {}, **settings)
        runner = Runner(image)
        wanted = np.stack([runner.feed([one]) for one in IDS])
        with Simulator(Image.open(image), "fast", device="cuda").session() as session:
            got = np.concatenate([session.feed(IDS[:4], "all"), session.feed(IDS[4:], "all")])
        assert distance(got, wanted) < NEAR
