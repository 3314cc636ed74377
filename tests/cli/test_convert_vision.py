"""`edgetool convert` on models with a vision tower: the text tower is converted, the vision tower copied."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes.packed_checkpoints import read_checkpoint


def convert(source: Path, output: Path, target: str) -> dict[str, Any]:
    from edgetool.cli import app

    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(output), "--to", target, "--json"])
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def left_alone(name: str, config: dict[str, Any]) -> bool:
    """Whether readers of `config` (quantization_config) leave the module `name` in 16 bit."""
    ignored = config.get("ignore") or config.get("modules_to_not_convert") or []
    rules = [rule[2:] for rule in config.get("dynamic", {}) if rule.startswith("-:")]
    return any(
        re.match(entry[3:], name) if entry.startswith("re:") else entry in (name, name.split(".")[0]) or entry in name
        for entry in ignored
    ) or any(re.match(rule, name) for rule in rules)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_text_tower_is_converted_and_the_vision_tower_copied(
    quantize: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    source = tmp_path / "source"
    assert quantize(tiny(family), source, "--method", "rtn", "--asym").exit_code == 0
    given = read_checkpoint(source)
    vision = {name for name in given if "visual" in name}
    modules = {name.removesuffix(".qweight") for name in given if name.endswith(".qweight")}
    assert len(vision) > 20 and len(modules) == 14 and not any("visual" in name for name in modules)
    for target in ("awq", "compressed-tensors", "gptq_v2", "fp16"):
        document = convert(source, tmp_path / target, target)
        made = read_checkpoint(tmp_path / target)
        assert document["quantized_modules"] == 14
        assert document["tensors_compared"] == document["tensors_equal"] == len(made)
        assert vision == {name for name in made if "visual" in name}
        assert all(made[name].tobytes() == given[name].tobytes() for name in vision)
        config = json.loads((tmp_path / target / "config.json").read_text()).get("quantization_config")
        if target != "fp16":
            linears = {name.removesuffix(".weight") for name in vision if made[name].ndim == 2}
            assert all(left_alone(name, config) for name in linears)
            assert not any(left_alone(name, config) for name in modules)
    convert(tmp_path / "awq", tmp_path / "back", "gptq")
    convert(tmp_path / "awq", tmp_path / "awq-fp16", "fp16")
    for name in modules:
        for suffix in ("qweight", "qzeros", "scales"):
            assert np.array_equal(read_checkpoint(tmp_path / "back")[f"{name}.{suffix}"], given[f"{name}.{suffix}"])
    direct, through_awq = read_checkpoint(tmp_path / "fp16"), read_checkpoint(tmp_path / "awq-fp16")
    assert all(direct[name].tobytes() == array.tobytes() for name, array in through_awq.items())
