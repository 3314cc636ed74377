"""What a conversion will write, known before the first byte is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.converter.plan import NoLosslessForm, Plan, entry_bytes, make_plan
from edgetool.converter.source import CheckpointSource
from edgetool.errors import BadInput
from edgetool.progress import NullProgress, RecordingProgress
from tests.fakes.packed_checkpoints import make_checkpoint, other_tensors, random_layer, random_layers, read_checkpoint

UP = "model.layers.0.mlp.up_proj"


def plan(path: Path, target: str, **options: Any) -> Plan:
    return make_plan(CheckpointSource.open(path), target, progress=NullProgress(), **options)


def refused(path: Path, target: str, **options: Any) -> NoLosslessForm:
    with pytest.raises(NoLosslessForm) as refusal:
        plan(path, target, **options)
    return refusal.value


@pytest.mark.parametrize("threads", [1, 3])
def test_units_follow_the_sources_order_whatever_the_threads(threads: int, tmp_path: Path) -> None:
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", random_layers(), "gptq", shards=2))
    progress = RecordingProgress()
    made = make_plan(source, "awq", threads=threads, progress=progress)
    assert [unit.name for unit in made.units] == list(source.order)
    assert sum(value for kind, _, value in progress.events if kind == "advance") == len(source.order)


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "awq", "compressed-tensors", "fp16", "bf16"])
@pytest.mark.parametrize("sym", [False, True])
def test_entries_are_the_tensors_that_the_oracle_packs(target: str, sym: bool, tmp_path: Path) -> None:
    layers = random_layers(sym=sym)
    made = plan(make_checkpoint(tmp_path / "c", layers, "gptq"), target)
    expected = read_checkpoint(make_checkpoint(tmp_path / "expected", layers, target))
    dtypes = {"F16": np.float16, "BF16": np.uint16, "I32": np.int32, "I64": np.int64}
    entries = {name: (dtypes[dtype], shape) for unit in made.units for name, dtype, shape in unit.entries}
    if target == "bf16":  # the oracle leaves all others as they are
        others = {name for name, (dtype, _) in entries.items() if dtype is np.uint16 and name in other_tensors(layers)}
        assert others == other_tensors(layers).keys()
        entries |= {name: (np.float16, entries[name][1]) for name in others}
    assert entries == {name: (array.dtype.type, array.shape) for name, array in expected.items()}
    sizes = {name: array.nbytes for name, array in expected.items()}
    assert made.output_bytes == sum(sizes.values()) == sum(entry_bytes(e) for unit in made.units for e in unit.entries)
    assert made.tensors == len(expected)


def test_an_output_is_symmetric_when_all_zeros_are_the_middle(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    symmetric = make_checkpoint(tmp_path / "sym", layers, "awq")
    assert plan(symmetric, "gptq").spec.sym
    layers[UP].zeros[3, 1] = 7
    one_is_not = make_checkpoint(tmp_path / "asym", layers, "awq")
    assert not plan(one_is_not, "gptq").spec.sym


def test_asymmetric_zeros_that_detection_did_not_look_at_are_a_warning(tmp_path: Path) -> None:
    layers = random_layers(layers=4, sym=True)
    hidden = sorted(layers)[1]  # every second of 28 linears is looked at
    layers[hidden].zeros[0, 0] = 9
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}}
    path = make_checkpoint(tmp_path / "c", layers, "gptq", **config)
    made = plan(path, "compressed-tensors")
    assert not made.spec.sym
    assert len([w for w in made.warnings if w.startswith(f"{hidden} (1 of 28 linears) has zeros besides")]) == 1


def test_asking_for_sym_moves_codes_or_refuses(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    layers[UP].zeros[0, 0], layers[UP].codes[0, :32] = 7, 7
    path = make_checkpoint(tmp_path / "c", layers, "gptq_v2")
    assert plan(path, "gptq", sym=True).spec.sym
    layers[UP].codes[0, 3] = 15
    error = refused(make_checkpoint(tmp_path / "no", layers, "gptq_v2"), "gptq", sym=True)
    assert error.modules == (UP,)
    assert "--requant" in str(error.hint)


def test_every_refusal_is_collected_in_the_order_of_the_source(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    wrong = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    for name in wrong:
        layers[name] = random_layer(3, *layers[name].codes.shape, sym=True, act_order=True)
    error = refused(make_checkpoint(tmp_path / "c", layers, "gptq"), "awq")
    assert error.type_name == "BadInput"
    assert error.modules == tuple(wrong)
    assert [entry["module"] for entry in error.details["refused"]] == wrong
    assert error.message.startswith(f"{wrong[0]} has no lossless form in awq: ")


def test_a_linear_of_one_short_group_is_no_other_group_size(tmp_path: Path) -> None:
    layers = random_layers(sym=True, group_size=128, inner=256, hidden=256)
    for name, layer in layers.items():
        if name.endswith("v_proj"):
            layers[name] = random_layer(1, layer.codes.shape[0], 64, group_size=64, sym=True)
    made = plan(make_checkpoint(tmp_path / "c", layers, "gptq"), "compressed-tensors")
    assert made.spec.group_size == 128


def test_nothing_quantised_has_no_packed_form(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(layers=1), "bf16")
    with pytest.raises(BadInput, match="nothing in this bf16 model is quantised") as refusal:
        plan(path, "awq")
    assert "edgetool quantize" in str(refusal.value.hint)


def test_float_tensors_are_refused_for_what_the_target_cannot_hold(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    others = other_tensors(layers, np.float32)
    others["model.norm.weight"][:3] = 1e6, 1 / 3, np.inf
    path = make_checkpoint(tmp_path / "c", layers, "gptq", others=others)
    error = refused(path, "fp16")
    assert error.details["refused"] == [
        {"module": "model.norm.weight", "reason": "1 of 64 values are beyond the range of fp16"}
    ]
    assert refused(path, "fp16", rounding=True).details == error.details
    others["model.norm.weight"][0] = 0
    path = make_checkpoint(tmp_path / "d", layers, "gptq", others=others)
    assert "1 of its 64 F32 values do not exist in fp16" in refused(path, "fp16").message
    made = plan(path, "fp16", rounding=True)
    assert made.warnings == ("1 values of 1 tensors (model.norm.weight ...) are rounded to fp16",)


def test_whole_numbers_and_unquantised_targets_leave_integers_alone(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    others = other_tensors(layers) | {"model.steps": np.arange(5)}
    path = make_checkpoint(tmp_path / "c", layers, "gptq", others=others)
    entries = {name: dtype for unit in plan(path, "bf16").units for name, dtype, _ in unit.entries}
    assert entries["model.steps"] == "I64"


def test_tables_that_programs_compute_anew_keep_their_dtype(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    others = other_tensors(layers) | {name: np.float32(1) / np.arange(1, 9, dtype=np.float32)}
    path = make_checkpoint(tmp_path / "c", layers, "gptq", others=others)
    entries = {name: dtype for unit in plan(path, "fp16").units for name, dtype, _ in unit.entries}
    assert entries[name] == "F32"


def test_a_name_that_would_be_written_twice_is_refused(tmp_path: Path) -> None:
    layers = random_layers(layers=1, sym=True)
    others = other_tensors(layers) | {f"{UP}.weight": np.zeros((3, 3), np.float16)}
    path = make_checkpoint(tmp_path / "c", layers, "gptq", others=others)
    with pytest.raises(BadInput, match=rf"{UP}\.weight would be written twice"):
        plan(path, "fp16")
    assert plan(path, "compressed-tensors").tensors > 0


def test_activations_that_were_quantised_too_are_not_passed_over(tmp_path: Path) -> None:
    layers = random_layers(layers=1, sym=True)
    path = make_checkpoint(tmp_path / "c", layers, "compressed-tensors")
    source = CheckpointSource.open(path)
    groups = source.config["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    made = make_plan(replace(source), "gptq", progress=NullProgress())
    assert any("quantises activations too" in warning for warning in made.warnings)


def test_act_order_in_compressed_tensors_is_written_with_a_warning(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", random_layers(sym=True, act_order=True), "gptq")
    made = plan(path, "compressed-tensors")
    assert made.spec.desc_act
    assert any("no longer read groups in activation order" in warning for warning in made.warnings)
