"""What a checkpoint directory is as a source of conversions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetool.converter.source import CheckpointSource
from edgetool.errors import BadInput
from tests.fakes.packed_checkpoints import (
    PACKED,
    SIDE_FILES,
    make_checkpoint,
    other_tensors,
    quantization_config_of,
    random_layer,
    random_layers,
    read_checkpoint,
    write_safetensors,
)


@pytest.mark.parametrize("kind", PACKED)
def test_linears_are_read_as_the_integers_they_were_made_of(kind: str, tmp_path: Path) -> None:
    layers = random_layers(seed=2)
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, kind, shards=3))
    assert source.format == kind
    assert source.layouts.keys() == layers.keys()
    for module, layer in layers.items():
        linear, rest = source.linear(module), source.rest(module)
        assert np.array_equal(linear.codes, layer.codes)
        for read in (linear.zeros, rest.zeros):
            assert np.array_equal(read, layer.zeros)
        for read in (linear.scales, rest.scales):
            assert np.array_equal(read, layer.scales)
        assert np.array_equal(source.weight(module), layer.weight())
        assert (rest.bits, rest.group_size, rest.out_features, rest.in_features) == (
            layer.bits,
            layer.group_size,
            *layer.codes.shape,
        )


def test_the_rest_of_a_linear_is_read_without_its_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = random_layers(act_order=True)
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "gptq"))
    asked: list[str] = []
    read = type(source.checkpoint).read
    monkeypatch.setattr(type(source.checkpoint), "read", lambda self, name: asked.append(name) or read(self, name))
    module = next(iter(layers))
    rest = source.rest(module)
    assert np.array_equal(rest.g_idx, layers[module].g_idx)
    assert asked == [f"{module}.{suffix}" for suffix in ("qzeros", "scales", "g_idx")]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_have_a_rest_too(bits: int, tmp_path: Path) -> None:
    layers = random_layers(bits=bits)
    for kind in ("gptq_v2", "compressed-tensors"):
        source = CheckpointSource.open(make_checkpoint(tmp_path / kind, layers, kind), kind)
        for module, layer in layers.items():
            assert np.array_equal(source.rest(module).zeros, layer.zeros)


def test_order_is_that_of_the_files_with_a_linear_at_its_first_tensor(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "gptq", shards=2))
    names = sorted(read_checkpoint(tmp_path / "c"))
    modules = [name.rpartition(".")[0] if name.rpartition(".")[0] in layers else name for name in names]
    # a bias belongs to no linear
    expected = dict.fromkeys(name if name.endswith(".bias") else m for name, m in zip(names, modules, strict=True))
    assert list(source.order) == list(expected)
    assert set(source.order) == source.layouts.keys() | source.plain.keys()
    assert not source.layouts.keys() & source.plain.keys()


def test_plain_tensors_come_as_stored(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    others = other_tensors(layers) | {"model.count": np.arange(7), "model.half": np.arange(9, dtype=np.uint16)}
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "awq", others=others))
    assert source.plain.keys() == others.keys()
    assert source.plain["model.half"].dtype == "BF16"
    for name, array in others.items():
        for _ in range(2):  # from the start each time
            assert np.concatenate(list(source.plain[name].chunks())).tobytes() == array.tobytes()
        assert source.plain[name].shape == array.shape


def test_side_files_are_copied_and_configurations_are_not(tmp_path: Path) -> None:
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", random_layers(layers=1), "gptq"))
    (tmp_path / "out").mkdir()
    source.write_side_files(tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == SIDE_FILES


def test_from_overrules_the_version_that_zeros_suggest_and_nothing_else(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    path = make_checkpoint(tmp_path / "c", layers, "gptq")
    assert CheckpointSource.open(path).format == "gptq"
    forced = CheckpointSource.open(path, "gptq_v2")
    module = next(iter(layers))
    assert forced.format == "gptq_v2"
    assert np.array_equal(forced.linear(module).zeros, layers[module].zeros - 1)
    assert any("format gptq, the tensors say gptq_v2" in note for note in forced.disagreements)
    with pytest.raises(BadInput, match="--from awq was given, and the shapes of its tensors are those of gptq"):
        CheckpointSource.open(path, "awq")


@pytest.mark.parametrize(("kind", "name"), [("fp16", "fp16"), ("bf16", "bf16")])
def test_an_unquantised_checkpoint_is_called_by_what_most_of_it_is(kind: str, name: str, tmp_path: Path) -> None:
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", random_layers(), kind))
    assert (source.format, source.spec, dict(source.layouts)) == (name, None, {})
    with pytest.raises(BadInput, match="nothing in it is quantised"):
        CheckpointSource.open(tmp_path / "c", "gptq")


def test_a_section_left_over_in_an_unquantised_checkpoint_is_a_disagreement(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    wrong = quantization_config_of(layers, "awq")
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "fp16", quantization_config=wrong))
    assert source.disagreements == ("config.json says awq, the tensors are plain fp16",)


def test_weights_packed_in_an_unknown_way_are_refused_by_name(tmp_path: Path) -> None:
    layers = random_layers(layers=1)
    path = make_checkpoint(tmp_path / "c", layers, "fp16", quantization_config={"quant_method": "bitsandbytes"})
    name = "model.layers.0.mlp.up_proj.weight"
    write_safetensors(path / "model.safetensors", read_checkpoint(path) | {name: np.ones((64, 32), dtype=np.uint8)})
    with pytest.raises(BadInput, match=rf"{name} \(U8\) is packed .* does not read \(config.json says bitsandbytes"):
        CheckpointSource.open(path)


def test_modules_of_another_width_have_their_own_layout(tmp_path: Path) -> None:
    layers = random_layers(sym=True)
    odd = "model.layers.1.mlp.gate_proj"
    layers[odd] = random_layer(9, *layers[odd].codes.shape, bits=8, sym=True, group_size=64)
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "gptq"))
    assert (source.layouts[odd].bits, source.layouts[odd].group_size) == (8, 64)
    assert np.array_equal(source.weight(odd), layers[odd].weight())
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == source.config
