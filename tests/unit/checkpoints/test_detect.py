from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.formats import FORMATS, Spec, stored_dtype
from edgetool.checkpoints.tensor_file import TensorInfo
from edgetool.errors import BadInput
from tests.parity.test_layouts import assert_same

SHAPES = {"q_proj": (64, 128), "k_proj": (32, 128), "down_proj": (128, 256)}


class Memory:
    """A checkpoint in memory, with what `detect` and `read_linear` ask of one."""

    def __init__(self, config):
        self.config, self.arrays, self.tensors = config, {}, {}
        self.put("norm.weight", np.ones(128, np.float16))

    def put(self, name, array):
        self.arrays[name] = array
        self.tensors[name] = TensorInfo(name, stored_dtype(array), array.shape, Path("x"), 0, array.nbytes)

    def drop(self, name):
        del self.arrays[name], self.tensors[name]

    def read(self, name):
        return self.arrays[name]

    def detect(self):
        return detect(self.tensors, self.read, self.config)


def quantised(seed, shape, spec):
    """Round-to-nearest of random weights with mean zero, as trained ones nearly have."""
    rng = np.random.default_rng(seed)
    out_features, in_features = shape
    size = in_features if spec.group_size == -1 else spec.group_size
    top = (1 << spec.bits) - 1
    weights = rng.normal(0, 0.02, shape).reshape(out_features, -1, size)
    if spec.sym:
        scales = (np.abs(weights).max(axis=2) * 2 / top).astype(np.float16)
        zeros = np.full(scales.shape, 1 << (spec.bits - 1))
    else:
        scales = ((weights.max(axis=2) - weights.min(axis=2)) / top).astype(np.float16)
        zeros = np.clip(np.rint(-weights.min(axis=2) / scales), 1, top)
    codes = np.clip(np.rint(weights / scales[..., None]) + zeros[..., None], 0, top).astype(np.uint8)
    g_idx = rng.permutation(np.arange(in_features) // size).astype(np.int32) if spec.desc_act else None
    layer = QuantizedLinear(codes.reshape(shape), scales, zeros.astype(np.uint8), g_idx, spec.bits, size)
    layer.validate()
    return layer


def checkpoint(name, spec, config=None):
    config = {"quantization_config": FORMATS[name].quantization_config(spec, ["lm_head"])} if config is None else config
    memory, layers = Memory(config), {}
    for layer in range(3):
        for module, shape in SHAPES.items():
            full = f"model.layers.{layer}.{module}"
            layers[full] = quantised(len(layers), shape, spec)
            for suffix, array in FORMATS[name].write(layers[full], spec, full).items():
                memory.put(f"{full}.{suffix}", array)
    return memory, layers


CASES = [
    *(
        (name, Spec(bits, group, sym))
        for name in ("gptq", "gptq_v2")
        for bits in (2, 3, 4, 8)
        for group in (32, -1)
        for sym in (True, False)
    ),
    *((name, Spec(4, 64, sym, desc_act=True)) for name in ("gptq", "gptq_v2") for sym in (True, False)),
    *(("awq", Spec(4, group, sym)) for group in (32, 128, -1) for sym in (True, False)),
    *(
        ("compressed-tensors", Spec(bits, group, sym))
        for bits in (2, 3, 4, 8)
        for group in (64, -1)
        for sym in (True, False)
    ),
    ("compressed-tensors", Spec(4, 64, True, desc_act=True)),
]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_every_kind_of_checkpoint_is_found_and_read_back(name, spec):
    memory, layers = checkpoint(name, spec)
    found = memory.detect()
    assert (found.format, found.spec) == (name, spec)
    assert found.disagreements == ()
    assert set(found.modules) == set(layers)
    for module, layer in layers.items():
        assert_same(read_linear(memory, module, found), layer)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("truth", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_a_version_under_the_wrong_label_is_found_out(truth, label, sym):
    spec = Spec(4, 32, sym)
    memory, layers = checkpoint(truth, spec, {"quantization_config": FORMATS[label].quantization_config(spec, [])})
    found = memory.detect()
    assert found.format == truth
    (note,) = found.disagreements
    assert f"says format {label}, the tensors say {truth}" in note
    for module, layer in layers.items():
        assert_same(read_linear(memory, module, found), layer)


def test_an_undecidable_version_follows_the_config_and_says_so():
    spec = Spec(4, 32, False)
    memory, layers = checkpoint("gptq_v2", spec)
    for module, layer in layers.items():
        codes = np.clip(layer.codes.astype(int) + (np.arange(layer.in_features) % 2), 0, 15).astype(np.uint8)
        memory.put(f"{module}.qweight", FORMATS["gptq_v2"].write(replace(layer, codes=codes), spec)["qweight"])
    found = memory.detect()
    assert found.format == "gptq_v2"
    assert "do not tell GPTQ version 1" in found.disagreements[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 8}, "says bits 8, the tensors say 4"),
        ({"group_size": 128}, "says group_size 128, the tensors say 32"),
        ({"sym": False}, "says sym False, the tensors say True"),
        ({"desc_act": True}, "says desc_act True, the tensors say False; g_idx is trivial"),
        ({"quant_method": "awq"}, "says format awq gptq, the tensors say gptq"),
        ({"quant_method": "bitsandbytes"}, "says format bitsandbytes, the tensors say gptq"),
    ],
)
def test_a_config_that_says_something_else_is_reported(change, said):
    memory, _ = checkpoint("gptq", Spec(4, 32, True))
    memory.config["quantization_config"] |= change
    assert any(said in note for note in memory.detect().disagreements)


@pytest.mark.parametrize("weights", [5, 2.5, ["num_bits"], "num_bits", None])
def test_a_config_whose_groups_say_nothing_is_no_finding(weights):
    memory, _ = checkpoint("compressed-tensors", Spec(4, 32, True))
    memory.config["quantization_config"]["config_groups"] = {"group_0": {"weights": weights}}
    assert memory.detect().bits == 4


def test_a_missing_config_is_reported_and_one_in_the_text_part_is_found():
    memory, _ = checkpoint("awq", Spec(4, 32, False), {})
    assert memory.detect().disagreements == ("config.json has no quantization_config, the tensors are quantised",)
    memory.config = {"text_config": {"quantization_config": FORMATS["awq"].quantization_config(Spec(4, 32, False), [])}}
    assert memory.detect().disagreements == ()


def test_asymmetric_zeros_under_a_symmetric_config_are_reported():
    memory, _ = checkpoint("gptq", Spec(4, 32, False))
    memory.config["quantization_config"]["sym"] = True
    (note,) = memory.detect().disagreements
    assert "kernels that believe it ignore the zeros" in note


def test_modules_of_another_width_or_group_size_keep_their_own_layout():
    memory, layers = checkpoint("gptq", Spec(4, 32, True))
    module = "model.layers.1.q_proj"
    other = Spec(8, 64, True)
    layers[module] = quantised(99, SHAPES["q_proj"], other)
    for suffix, array in FORMATS["gptq"].write(layers[module], other, module).items():
        memory.put(f"{module}.{suffix}", array)
    found = memory.detect()
    assert (found.bits, found.group_size) == (4, 32)
    assert [note.split(" in ")[0] for note in found.disagreements] == ["bits is 8", "group_size is 64"]
    assert_same(read_linear(memory, module, found), layers[module])


def test_a_short_last_group_is_reported():
    memory, _ = checkpoint("gptq", Spec(4, 32, True))
    module = "model.layers.0.k_proj"
    layer = replace(quantised(1, SHAPES["k_proj"], Spec(4, 32, True)), group_size=40)
    memory.put(f"{module}.g_idx", layer.group_index())
    assert any("group_size 40 does not divide in_features 128" in note for note in memory.detect().disagreements)


def test_an_unquantised_checkpoint_has_no_quantisation():
    assert Memory({"quantization_config": {"quant_method": "gptq"}}).detect() is None


def test_a_layer_without_its_other_tensors_is_refused_by_name():
    memory, _ = checkpoint("gptq", Spec(4, 32, True))
    memory.drop("model.layers.1.k_proj.scales")
    with pytest.raises(BadInput, match=r"model.layers.1.k_proj has qweight but no scales"):
        memory.detect()


@pytest.mark.parametrize(
    ("name", "suffix", "cut"),
    [
        ("gptq", "qzeros", np.s_[:, :1]),
        ("gptq", "qweight", np.s_[:, :8]),
        ("gptq", "g_idx", np.s_[:5]),
        ("awq", "qweight", np.s_[:, :1]),
        ("awq", "scales", np.s_[:, :8]),
        ("compressed-tensors", "weight_packed", np.s_[:, :1]),
        ("compressed-tensors", "weight_scale", np.s_[:3]),
    ],
)
def test_shapes_of_no_known_layout_are_refused_by_name(name, suffix, cut):
    memory, _ = checkpoint(name, Spec(4, 32, False))
    full = f"model.layers.2.k_proj.{suffix}"
    memory.put(full, np.ascontiguousarray(memory.read(full)[cut]))
    with pytest.raises(BadInput, match=r"model.layers.2.k_proj"):
        memory.detect()


@pytest.mark.parametrize(
    ("name", "suffix", "change", "said"),
    [
        ("gptq", "g_idx", lambda a: a.astype(np.float32), "g_idx is stored as F32, not as whole numbers"),
        ("compressed-tensors", "weight_shape", lambda a: a.astype(np.float32), "must be two whole numbers"),
        ("compressed-tensors", "weight_shape", lambda a: np.append(a, 1), "must be two whole numbers"),
        ("compressed-tensors", "weight_shape", lambda a: a[:, None], "must be two whole numbers"),
    ],
)
def test_positions_and_sizes_that_are_no_whole_numbers_are_refused_by_name(name, suffix, change, said):
    memory, _ = checkpoint(name, Spec(4, 32, False))
    full = f"model.layers.2.k_proj.{suffix}"
    memory.put(full, change(memory.read(full)))
    with pytest.raises(BadInput, match=said):
        memory.detect()


def test_the_summary_for_reports_is_plain_data():
    memory, _ = checkpoint("awq", Spec(4, 32, True))
    assert memory.detect().to_dict() == {
        "format": "awq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "modules": 9,
        "disagreements": [],
    }


@pytest.mark.parametrize("out_features", [8, 16, 24, 40])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_few_output_channels_are_not_taken_for_fewer_bits(name, out_features):
    # 24 zeros of 4 bits fill three words, and so do 24 of 3 bits with some bits idle
    spec = Spec(4, 32, False)
    memory = Memory({"quantization_config": FORMATS[name].quantization_config(spec, ["lm_head"])})
    layer = quantised(3, (out_features, 128), spec)
    for suffix, array in FORMATS[name].write(layer, spec, "layer").items():
        memory.put(f"layer.{suffix}", array)
    found = memory.detect()
    assert (found.format.removesuffix("_v2"), found.bits, found.group_size) == (name, 4, 32)
    assert_same(read_linear(memory, "layer", replace(found, format=name)), layer)
