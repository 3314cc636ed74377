"""config.json of a converted checkpoint, and of one that is put right in place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.converter.config_repair import left_alone, repair, write_new_config
from edgetool.converter.plan import make_plan
from edgetool.converter.source import CheckpointSource
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from tests.fakes.packed_checkpoints import (
    make_checkpoint,
    other_tensors,
    quantization_config_of,
    random_layers,
    read_checkpoint,
    write_safetensors,
)

EXPERT_GATE = "model.layers.0.mlp.gate"
VISION = "model.visual.blocks.0.attn.qkv"


def source_of(path: Path, kind: str = "gptq", extra: dict[str, Any] | None = None, **options: Any) -> CheckpointSource:
    layers = random_layers(sym=True)
    others = other_tensors(layers) | (extra or {})
    return CheckpointSource.open(make_checkpoint(path, layers, kind, others=others, **options))


def matrix() -> np.ndarray:
    return np.ones((8, 16), np.float16)


def new_config(source: CheckpointSource, target: str, out: Path) -> dict[str, Any]:
    out.mkdir()
    write_new_config(source, make_plan(source, target, progress=NullProgress()), out)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


# --- of an output


def test_what_is_not_about_quantisation_is_carried_over(tmp_path: Path) -> None:
    source = source_of(tmp_path / "c", transformers_version="5.1", custom={"a": [1, None]})
    before = {k: v for k, v in source.config.items() if k != "quantization_config"}
    after = new_config(source, "awq", tmp_path / "out")
    assert after.pop("quantization_config")["quant_method"] == "awq"
    assert after == before


def test_a_section_in_the_text_part_moves_to_the_top(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    section = quantization_config_of(layers, "gptq")
    path = make_checkpoint(tmp_path / "c", layers, "gptq")
    config = json.loads((path / "config.json").read_text())
    config["text_config"] = {"hidden_size": 64, "quantization_config": config.pop("quantization_config")}
    (path / "config.json").write_text(json.dumps(config))
    source = CheckpointSource.open(path)
    assert source.disagreements == ()
    after = new_config(source, "compressed-tensors", tmp_path / "out")
    assert after["text_config"] == {"hidden_size": 64}
    assert after["quantization_config"]["quant_method"] == "compressed-tensors"
    assert section["quant_method"] == "gptq"


def test_rope_is_spelled_for_old_and_new_readers(tmp_path: Path) -> None:
    source = source_of(tmp_path / "c", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0})
    source.config.pop("rope_theta")
    after = new_config(source, "awq", tmp_path / "out")
    assert (after["rope_theta"], after["rope_scaling"]) == (5e5, {"rope_type": "yarn", "factor": 4.0})


@pytest.mark.parametrize(("target", "side"), [("gptq", True), ("gptq_v2", True), ("awq", False), ("bf16", False)])
def test_the_sidecar_is_there_for_gptq_alone(target: str, side: bool, tmp_path: Path) -> None:
    config = new_config(source_of(tmp_path / "c", "awq"), target, tmp_path / "out")
    path = tmp_path / "out" / "quantize_config.json"
    assert path.exists() == side
    if side:
        assert json.loads(path.read_text()) == config["quantization_config"]


# --- what stays in 16 bit


def test_a_part_without_quantised_linears_is_one_name(tmp_path: Path) -> None:
    extra = {f"{VISION}.weight": matrix(), "model.visual.merger.mlp.0.weight": matrix()}
    source = source_of(tmp_path / "c", extra=extra)
    assert left_alone(source, "gptq") == ["lm_head", "visual"]


def test_a_single_linear_is_named_so_that_no_quantised_one_is_meant(tmp_path: Path) -> None:
    source = source_of(tmp_path / "c", extra={f"{EXPERT_GATE}.weight": matrix()})
    names = left_alone(source, "gptq")
    assert names[0] == "lm_head"
    pattern = re.compile(rf"(.*\.)?{re.escape(names[1])}(\..*)?$")
    assert pattern.match(EXPERT_GATE)
    assert not [name for name in source.layouts if pattern.match(name)]


def test_awq_readers_look_for_parts_of_names_so_gate_must_not_mean_gate_proj(tmp_path: Path) -> None:
    source = source_of(tmp_path / "c", "awq", extra={f"{EXPERT_GATE}.weight": matrix(), f"{VISION}.weight": matrix()})
    names = left_alone(source, "awq")
    assert names == ["lm_head", "visual"]
    assert not [name for name in names for module in source.layouts if name in module]


def test_a_layer_in_16_bit_is_not_mistaken_for_the_tenth(tmp_path: Path) -> None:
    layers = random_layers(layers=12, sym=True)
    plain = {name: layers.pop(name) for name in list(layers) if ".layers.1." in name}
    others = other_tensors(layers) | {f"{name}.weight": matrix() for name in plain}
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "awq", others=others))
    for target in ("awq", "gptq"):
        names = left_alone(source, target)
        regular = [re.compile(rf"(.*\.)?{re.escape(name)}(\..*)?$") for name in names]
        for module in plain:
            assert any(pattern.match(module) for pattern in regular)
            assert target != "awq" or any(name in module for name in names)
        for module in layers:
            assert not any(pattern.match(module) for pattern in regular)
            assert target != "awq" or not any(name in module for name in names)


def test_a_quantised_head_is_not_left_alone(tmp_path: Path) -> None:
    layers = random_layers(layers=1, sym=True)
    layers["lm_head"] = layers["model.layers.0.mlp.up_proj"]
    others = {name: array for name, array in other_tensors(layers).items() if not name.startswith("lm_head")}
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "gptq", others=others))
    assert left_alone(source, "gptq") == []


def test_norms_embeddings_and_vectors_are_no_linears(tmp_path: Path) -> None:
    extra = {"model.wte.weight": matrix(), "model.layers.0.q_norm.weight": matrix()}
    assert left_alone(source_of(tmp_path / "c", extra=extra), "gptq") == ["lm_head"]


# --- in place


def claims(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("kind", "wrong", "key"),
    [
        ("gptq", {"checkpoint_format": "gptq_v2"}, "format"),
        ("gptq_v2", {"checkpoint_format": "gptq"}, "format"),
        ("gptq", {"bits": 8}, "bits"),
        ("gptq", {"group_size": 128}, "group_size"),
        ("gptq", {"sym": False}, "sym"),
        ("gptq", {"desc_act": True}, "desc_act"),
        ("gptq", {"quant_method": "awq", "version": "gemm"}, "format"),
        ("awq", {"group_size": -1}, "group_size"),
        ("awq", {"version": "gemv"}, "format"),
        ("compressed-tensors", {"format": "dense"}, "format"),
    ],
)
def test_each_wrong_claim_is_repaired_and_nothing_else_changes(
    kind: str, wrong: dict[str, Any], key: str, tmp_path: Path
) -> None:
    layers = random_layers(sym=True)
    path = claims(make_checkpoint(tmp_path / "c", layers, kind), **wrong, meta={"quantizer": "somebody"})
    weights = (path / "model.safetensors").read_bytes()
    _, fixed = repair(path)
    assert any(note.startswith(f"config.json says {key} ") for note in fixed)
    assert CheckpointSource.open(path).disagreements == ()
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    if "quant_method" not in wrong:
        assert section["meta"] == {"quantizer": "somebody"}
    right = quantization_config_of(layers, kind)
    for name in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "version"):
        if name in right:
            assert section[name] == right[name]
    assert (path / "model.safetensors").read_bytes() == weights


def test_a_right_configuration_is_not_touched(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(), "gptq")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()}
    source, fixed = repair(path)
    assert (source.format, fixed) == ("gptq", [])
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()} == before


def test_a_missing_section_is_written(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(sym=True), "awq")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    _, fixed = repair(path)
    assert fixed == ["config.json has no quantization_config, the tensors are quantised"]
    assert json.loads((path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"] == [
        "lm_head"
    ]


def test_a_sidecar_that_says_otherwise_is_repaired_and_a_missing_one_is_no_fault(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(sym=True), "gptq")
    side = path / "quantize_config.json"
    side.write_text(json.dumps(json.loads(side.read_text()) | {"desc_act": True}))
    _, fixed = repair(path)
    assert fixed == ["quantize_config.json says desc_act True, the tensors say False"]
    assert json.loads(side.read_text())["desc_act"] is False
    side.unlink()
    assert repair(path)[1] == []
    assert not side.exists()


def test_sym_is_decided_by_all_zeros_when_it_is_written_down(tmp_path: Path) -> None:
    layers = random_layers(layers=4, sym=True)
    hidden = sorted(layers)[1]  # detection looks at every second of 28 linears
    layers[hidden].zeros[0, 0] = 9
    path = make_checkpoint(tmp_path / "c", layers, "gptq", quantization_config={"quant_method": "gptq", "bits": 8})
    repair(path)
    assert json.loads((path / "config.json").read_text())["quantization_config"]["sym"] is False


def test_one_asymmetric_linear_among_many_is_found_where_sym_is_claimed(tmp_path: Path) -> None:
    layers = random_layers(layers=4, sym=True)
    hidden = sorted(layers)[1]
    layers[hidden].zeros[0, 0] = 9
    claim = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    path = make_checkpoint(tmp_path / "c", layers, "gptq", quantization_config=claim)
    assert repair(path)[1] == [
        f"config.json says sym True, the zeros of {hidden} (1 linears) say False",
        "quantize_config.json says sym True, the tensors say False",
    ]
    assert json.loads((path / "config.json").read_text())["quantization_config"]["sym"] is False


def test_what_no_configuration_can_put_right_is_not_called_fixed(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    for layer in layers.values():
        layer.codes[:] = np.maximum(layer.codes, 1) - 1  # weights with a mean of minus one step
    path = make_checkpoint(tmp_path / "c", layers, "gptq")
    source, fixed = repair(path)
    assert any("which is usual for version 2" in note for note in source.disagreements)
    assert fixed == []


def test_from_decides_the_version_of_the_repair(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(seed=4), "gptq")
    repair(path, "gptq_v2")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"


def test_links_are_refused_whichever_file_is_one(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(sym=True), "gptq")
    claims(path, bits=8)
    (path / "quantize_config.json").rename(tmp_path / "elsewhere.json")
    (path / "quantize_config.json").symlink_to(tmp_path / "elsewhere.json")
    before = (path / "config.json").read_bytes()
    with pytest.raises(BadInput, match=r"quantize_config\.json is a link"):
        repair(path)
    assert (path / "config.json").read_bytes() == before


def test_damage_in_the_tensors_is_no_matter_of_configuration(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(sym=True), "gptq")
    tensors = read_checkpoint(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    write_safetensors(path / "model.safetensors", tensors)
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj has qweight but no scales"):
        repair(path)
