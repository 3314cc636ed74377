"""What is read from each pseudo-channel, and where keys and values lie: by the plan, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.errors import VerificationFailed
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from edgetool.fpga.simulator.kv_cache import KvCache
from edgetool.fpga.simulator.traffic import expected_decode_bytes
from tests.fakes.quantized_models import Made
from tests.unit.fpga.simulator.damage import with_manifest
from tests.unit.fpga.simulator.recording import Recording, bits
from tests.unit.fpga.simulator.shapes import LONG_ROWS, SMALL, WIDE_ROWS

Compiled = Callable[..., tuple[Made, Path]]

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"shape": SMALL}, {}),
    ("llama", {"shape": LONG_ROWS, "format": "gptq_v2", "sym": False}, {}),
    ("qwen3", {"shape": WIDE_ROWS, "group_size": 128}, {"lm_head": "fp16"}),
]


@pytest.mark.parametrize(("family", "how", "settings"), CASES)
def test_a_token_reads_what_the_plan_says(
    compiled: Compiled, family: str, how: dict[str, Any], settings: dict[str, Any]
) -> None:
    image = Image.open(compiled(family, settings, **how)[1])
    session = Simulator(image).session()
    session.feed([1, 2, 3, 4, 5])
    session.traffic.reset()
    session.feed([6])
    found = session.traffic.to_dict()
    assert found["bytes_by_role"] == expected_decode_bytes(image.manifest["memory"], 6)
    shape = how["shape"]
    assert session.traffic.kv_bytes == 6 * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    assert session.traffic.weight_bytes == image.manifest["memory"]["weight_read_bytes_per_token"]
    one = sum(record["bytes_per_pc"] for record in image.manifest["tensors"])
    assert found["bytes_per_pc"] == [one + session.traffic.kv_bytes // 32] * 32
    assert (found["tokens"], found["calls"]) == (1, 1)


def test_a_chunk_reads_the_weights_once(compiled: Compiled) -> None:
    image = Image.open(compiled("llama", shape=SMALL)[1])
    session = Simulator(image).session()
    session.feed(list(range(9)), logits="none")
    by_role = session.traffic.to_dict()["bytes_by_role"]
    plan = image.manifest["memory"]["read_bytes_by_role"]
    assert by_role.pop("kv") == 9 * image.manifest["memory"]["kv_bytes_per_token"]
    assert by_role == {role: count for role, count in plan.items() if role != "lm_head"}


def test_a_plan_that_is_not_that_of_the_weights_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    image = Path(shutil.copytree(compiled("llama", shape=SMALL)[1], tmp_path / "image"))
    with_manifest(image, lambda manifest: manifest["memory"]["read_bytes_by_role"].update(gate=12345))
    with pytest.raises(VerificationFailed, match="12,345 B a token for gate"):
        Simulator(Image.open(image))


def test_keys_and_values_lie_where_the_document_says(compiled: Compiled) -> None:
    directory = compiled("chatglm", {"max_context": 40}, shape=WIDE_ROWS, group_size=64)[1]
    image, recording = Image.open(directory), Recording()
    session = Simulator(image, trace=recording).session()
    session.feed([3, 1, 4, 1, 5], logits="none")
    session.feed([9], logits="none")
    kv = json.loads((directory / "manifest.json").read_text())["kv"]
    assert isinstance(session.cache, KvCache)
    ports = [session.cache.port(pc) for pc in range(32)]
    layer = 0
    for key, kind in recording.kinds.items():
        if kind != "KV_WRITE":
            continue
        values = image.program["layer"][key[2]]["cache"] == "v"
        region = kv["bytes_per_pc_region"] if values else 0
        for token in range(6):
            row = bits(recording.of_token(key, token))
            for channel, expected in enumerate(row):
                at = layer * kv["bytes_per_pc_layer"] + region
                at += (channel // 32 * kv["capacity_tokens"] + token) * 2
                assert ports[channel % 32][at : at + 2].view("<u2")[0] == expected
    assert all(port.size == kv["bytes_per_pc_layer"] * WIDE_ROWS.layers for port in ports)
    written = sum(int(np.count_nonzero(port.view("<u2"))) for port in ports)
    assert 0 < written <= 6 * 2 * WIDE_ROWS.kv_heads * WIDE_ROWS.head_dim  # and nowhere else
