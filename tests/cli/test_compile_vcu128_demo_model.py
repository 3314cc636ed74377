"""The real road once more: the quantised SmolLM2-135M into an image, and a word of English out of its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.cli.test_quantize_demo_model import DemoRun, demo_cache, demo_run  # noqa: F401
from tests.fakes.image_runner import Runner

pytestmark = [pytest.mark.demo, pytest.mark.slow]

PROMPT = "The capital of France is"
SLOWEST_TOKENS_PER_S = 5.0


def edgetool(*arguments: Any) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, ["compile-vcu128", *map(str, arguments), "--json"])


@pytest.fixture(scope="module")
def image(demo_run: DemoRun, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    output = tmp_path_factory.mktemp("demo-image") / "image"
    result = edgetool(demo_run.output, "-o", output, "--profile", "sim", "--max-context", 2048, "--lm-head", "rtn4")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "edgetool.compile-vcu128/1"
    # 30 layers of q, o 576 x 576, k, v 192 x 576, gate, up 1536 x 576, down 576 x 1536; then 49152 x 576, groups of 64
    row = 640 // 2 + 32
    layer = 2 * 0x4000 + 2 * 0x4000 + 2 * 0x8000 + 0x4000 * -(-18 * (768 + 64) // 0x4000)
    assert [18 * row, 6 * row, 48 * row] == [6336, 2112, 16896]
    head = 0x4000 * -(-1536 * row // 0x4000)
    assert document["kv_base"] == 30 * layer + head
    cache = 30 * 2 * 2048 * 64 * 2 * 3 // 32
    assert document["hbm_bytes_per_pc"] == [document["kv_base"] + cache] * 32
    return output


def test_the_image_verifies_weight_by_weight(demo_run: DemoRun, image: Path) -> None:  # noqa: F811
    result = edgetool(image, "--verify", demo_run.output)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["weights_compared"] == 134_479_872  # 30 layers and the output matrix
    assert document["tensors_equal"] == document["tensors_compared"]


@pytest.mark.parametrize(("numerics", "share"), [("et1", 0.01), ("fast", 0.03)])
def test_the_image_computes_what_float32_computes(
    demo_run: DemoRun,  # noqa: F811
    image: Path,
    numerics: str,
    share: float,
) -> None:
    """Greedy tokens are the reference's wherever its margin allows, and it allows many of them."""
    result = edgetool(image, "--verify-run", demo_run.output, "--numerics", numerics, "--jobs", 1)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    greedy, logits = found["greedy"], found["logits"]
    assert found["reference"] == "transformers"
    assert greedy["equal_of_these"] == greedy["margin_allows"] >= greedy["tokens"] // 3
    # fp16 has 11 bits and bfloat16 8; thirty layers add up what they round
    assert 0 < logits["rms_difference"] < share * logits["spread"]


def test_the_boards_own_format_cannot_hold_it(demo_run: DemoRun, tmp_path: Path) -> None:  # noqa: F811
    result = edgetool(demo_run.output, "-o", tmp_path / "tree", "--profile", "edgellm", "--lm-head", "rtn4")
    assert result.exit_code == 4
    message = json.loads(result.stdout)["message"]
    assert "group_size 64" in message and "head_dim 64" in message
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_speak_english(image: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(image / "tokenizer" / "tokenizer.json"))
    runner = Runner(image, np.float32)
    ids = tokenizer.encode(PROMPT).ids
    logits = runner.feed(ids)
    words = []
    for _ in range(4):
        words.append(int(np.argmax(logits)))
        logits = runner.feed([words[-1]])
    assert "Paris" in tokenizer.decode(words)


def test_the_simulated_board_speaks_english_by_its_own_numerics(image: Path) -> None:
    import time

    from tokenizers import Tokenizer

    from edgetool.fpga.image import Image
    from edgetool.fpga.simulator.engine import Simulator

    tokenizer = Tokenizer.from_file(str(image / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    simulator = Simulator(Image.open(image), "et1")
    session = simulator.session()
    logits = session.feed(ids)
    one_by_one = simulator.session()
    for token in ids:
        last = one_by_one.feed([token])
    assert np.array_equal(last.view(np.uint16), logits.view(np.uint16))
    words: list[int] = []
    start = time.process_time()
    while len(words) < 8:
        words.append(int(np.argmax(logits)))
        logits = session.feed(words[-1:])
    assert len(words) / (time.process_time() - start) > SLOWEST_TOKENS_PER_S  # of the processor's time: CI is busy
    assert "Paris" in tokenizer.decode(words)
    assert session.overflows == {}
