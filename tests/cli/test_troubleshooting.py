"""docs/troubleshooting.md quotes edgetool: every quotation is provoked here, and every one of these is in the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

PAGE = Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md"

CASES: dict[str, str] = {
    "does not divide in_features 64": "quantize {plain} -o {out}",
    "architecture 'phi3' is not supported": "quantize {phi3} -o {out}",
    "mixture-of-experts models cannot be quantised yet": "quantize {mixtral} -o {out}",
    "is quantised already": "quantize {gptq} -o {out}",
    "no such file or directory": "quantize nowhere -o {out}",
    "needs the hub, and --offline is set": "quantize {plain} -o {out} --group-size 32 --calib hf:wikitext --offline",
    "exists already": "quantize {plain} -o {gptq} --group-size 32",
    "config.json says format gptq": "inspect {mislabelled}",
    "awq has no g_idx, and the groups are in activation order": "convert {ordered} -o {out} --to awq",
    "so it has no awq form without loss": "convert {plain} -o {out} --to awq",
    "vLLM 0.32 dropped activation order at run time": "serve-gpu {ordered} --device cpu --dry-run",
    "tensor_parallel_size 4 does not fit": "serve-gpu {gptq} --device cpu --tensor-parallel-size 4 --dry-run",
    "the environment vllm-cpu cannot be used": "serve-gpu {gptq} --device cpu",
    "head_dim 16: must be a multiple of 32": "compile-vcu128 {gptq} -o {out} --lm-head rtn4",
    "the board multiplies 4-bit weights": "compile-vcu128 {plain} -o {out}",
    "its data is gated": "eval {gptq} --tasks gpqa -o {out} --data-dir {data}",
    "no task is called 'arc'": "eval {gptq} --tasks arc -o {out}",
    "No such option: --group-sise": "quantize {plain} -o {out} --group-sise 3",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, what was made of it, and copies under other names."""
    from tests.fakes.tiny_models import make_tiny_model

    top = tmp_path_factory.mktemp("troubles")
    made = {name: top / name for name in ("plain", "gptq", "ordered", "mislabelled", "phi3", "mixtral", "data")}
    make_tiny_model(made["plain"], "llama")
    made["data"].mkdir()
    small = ("--group-size", "32", "--threads", "1")
    quantized("quantize", made["plain"], "-o", made["gptq"], "--method", "rtn", *small)
    order = ("--desc-act", "--calib-samples", "2", "--calib-seqlen", "32")
    quantized("quantize", made["plain"], "-o", made["ordered"], *order, *small)
    quantized("quantize", made["plain"], "-o", top / "asym", "--method", "rtn", "--asym", *small)
    quantized("convert", top / "asym", "-o", made["mislabelled"], "--to", "gptq_v2")
    config = made["mislabelled"] / "config.json"
    config.write_text(config.read_text().replace('"gptq_v2"', '"gptq"'))
    for name, more in (("phi3", {}), ("mixtral", {"num_local_experts": 4})):
        shutil.copytree(made["plain"], made[name])
        config = made[name] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": name, **more}))
    return made


def quantized(*arguments: str | Path) -> None:
    assert invoke(*arguments).exit_code == 0


def invoke(*arguments: str | Path) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("said", CASES)
def test_edgetool_says_it(said: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETOOL_ENVS_DIRECTORY", str(tmp_path / "no-environments"))
    monkeypatch.setenv("EDGETOOL_LOCK_DIR", str(tmp_path / "locks"))
    words = CASES[said].format(out=tmp_path / "out", **places).split()
    result = invoke(*words)
    assert said in " ".join((result.stderr + result.stdout).split())
    assert result.exit_code in ((0,) if words[0] == "inspect" else (2, 3, 4, 5, 6)), result.output


def test_the_remedy_for_mislabelled_zero_points_changes_the_label_and_nothing_else(
    places: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(places["mislabelled"], tmp_path / "copy"))
    weights = (copy / "model.safetensors").read_bytes()
    quantized("convert", "--fix-config", copy)
    assert json.loads(invoke("inspect", copy, "--json").stdout)["problems"] == []
    assert (copy / "model.safetensors").read_bytes() == weights


def test_the_page_quotes_what_is_provoked_and_nothing_else() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    symptoms, answers = ({words for row in rows for words in re.findall(r"`([^`]+)`", row[i])} for i in (0, 1))
    assert symptoms - set(CASES) == {"!!!!"}  # what a model says, not edgetool
    assert set(CASES) <= symptoms | answers
