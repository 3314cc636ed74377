"""Tensors that other tools stored (tests/golden): read to the expected weights, written back to the same bytes."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgetool.checkpoints import awq_format, gptq_format
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.formats import FORMATS
from edgetool.checkpoints.tensor_file import TensorInfo
from edgetool.errors import BadInput

GOLDEN = Path(__file__).parent.parent / "golden"
FOUND = {
    "autoawq-0.2.9-gemm": ("awq", False, "F16"),
    "autoround-0.16-awq": ("awq", False, "F16"),
    "gptqmodel-7.6.0-awq": ("awq", False, "BF16"),
    "autoround-0.16-gptq": ("gptq", True, "F16"),
    "gptqmodel-7.6.0-gptq": ("gptq", True, "F16"),
    "llmcompressor-0.14-awq-asym": ("compressed-tensors", False, "F32"),
    "llmcompressor-0.14-gptq-sym": ("compressed-tensors", True, "F32"),
}
_DTYPES = {"I32": "<i4", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}
tools = pytest.mark.parametrize("tool", sorted(FOUND))


class Golden:
    """A golden file, read without edgetool's own file reader."""

    def __init__(self, tool: str) -> None:
        path = GOLDEN / f"{tool}.safetensors"
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        self.arrays, self.tensors = {}, {}
        for name, entry in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            array = np.frombuffer(raw, _DTYPES[entry["dtype"]], math.prod(shape), start + begin).reshape(shape)
            self.arrays[name] = array.copy()
            if not name.startswith("expected."):
                self.tensors[name] = TensorInfo(name, entry["dtype"], shape, path, start + begin, end - begin)
        side = json.loads((GOLDEN / f"{tool}.json").read_text())
        self.k_proj_sha256 = side["expected_k_proj_sha256"]
        self.config = {"quantization_config": side["quantization_config"]}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def detect(self):
        return detect(self.tensors, self.read, self.config)

    def layer(self, module: str):
        return {name.removeprefix(f"{module}."): self.arrays[name] for name in self.tensors if name.startswith(module)}


@tools
def test_format_is_found_in_the_tensors_and_agrees_with_the_tools_own_config(tool):
    found = Golden(tool).detect()
    name, sym, _ = FOUND[tool]
    assert (found.format, found.bits, found.group_size, found.sym) == (name, 4, 64, sym)
    assert found.modules == ("down_proj", "k_proj")
    assert not found.desc_act
    assert found.disagreements == ()


@tools
def test_reading_and_dequantising_gives_the_expected_weights_bit_for_bit(tool):
    golden = Golden(tool)
    found = golden.detect()
    for module in found.modules:
        linear = read_linear(golden, module, found)
        assert linear.scale_dtype == FOUND[tool][2]
        expected = golden.arrays[f"expected.{module}"]
        halves = linear.dequantize(np.empty(linear.codes.shape, dtype=np.float16))
        assert np.array_equal(halves[: len(expected)].view(np.uint16), expected.view(np.uint16))
    assert hashlib.sha256(halves.tobytes()).hexdigest() == golden.k_proj_sha256  # k_proj is the last module


@tools
def test_writing_the_layer_again_gives_the_tools_own_bytes(tool):
    golden = Golden(tool)
    found = golden.detect()
    for module in found.modules:
        written = FORMATS[found.format].write(read_linear(golden, module, found), found.spec, module)
        stored = golden.layer(module)
        assert written.keys() == stored.keys()
        for suffix, array in stored.items():
            assert written[suffix].dtype == array.dtype, suffix
            assert written[suffix].shape == array.shape, suffix
            assert written[suffix].tobytes() == array.tobytes(), suffix


@tools
def test_one_flipped_nibble_changes_exactly_one_weight(tool):
    golden = Golden(tool)
    found = golden.detect()
    before = read_linear(golden, "k_proj", found).dequantize()
    suffix = "weight_packed" if found.format == "compressed-tensors" else "qweight"
    golden.arrays[f"k_proj.{suffix}"].view(np.uint32)[3, 5] ^= 0x00300000
    after = read_linear(golden, "k_proj", found).dequantize()
    assert int((before != after).sum()) == 1
    assert hashlib.sha256(after.astype(np.float16).tobytes()).hexdigest() != golden.k_proj_sha256


@pytest.mark.parametrize("tool", [tool for tool in sorted(FOUND) if not FOUND[tool][1]])
def test_swapped_zeros_are_seen_in_the_weights(tool):
    golden = Golden(tool)
    found = golden.detect()
    suffix = "weight_zero_point" if found.format == "compressed-tensors" else "qzeros"
    zeros = golden.arrays[f"k_proj.{suffix}"]
    zeros[[0, 1]] = zeros[[1, 0]]
    wrong = read_linear(golden, "k_proj", found).dequantize().astype(np.float16)
    assert hashlib.sha256(wrong.tobytes()).hexdigest() != golden.k_proj_sha256


@tools
def test_zeros_of_another_layer_are_refused_by_their_shape(tool):
    golden = Golden(tool)
    found = golden.detect()
    suffix = {"awq": "qzeros", "gptq": "qzeros"}.get(found.format, "weight_packed")
    golden.arrays[f"k_proj.{suffix}"] = golden.arrays[f"down_proj.{suffix}"]
    with pytest.raises(BadInput, match="k_proj"):
        read_linear(golden, "k_proj", found)


@pytest.mark.parametrize("tool", ["autoround-0.16-gptq", "gptqmodel-7.6.0-gptq"])
def test_version_2_zeros_under_a_version_1_label_are_found_out(tool):
    golden = Golden(tool)
    found = golden.detect()
    for module in found.modules:
        written = gptq_format.write(read_linear(golden, module, found), version=2)
        assert np.all(written["qzeros"].view(np.uint32) == 0x88888888)
        golden.arrays[f"{module}.qzeros"] = written["qzeros"]
    relabelled = golden.detect()
    assert relabelled.format == "gptq_v2"
    assert any("says format gptq, the tensors say gptq_v2" in note for note in relabelled.disagreements)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tool", [tool for tool in sorted(FOUND) if FOUND[tool][0] == "awq"])
def test_versions_of_asymmetric_gptq_are_told_apart_by_real_codes(tool, version):
    golden = Golden(tool)
    found = golden.detect()
    other = Golden(tool)
    other.arrays, other.tensors = {}, {}
    for module in found.modules:
        for suffix, array in gptq_format.write(read_linear(golden, module, found), version, module).items():
            name = f"{module}.{suffix}"
            dtype = {"int32": "I32", "float16": "F16", "uint16": "BF16"}[str(array.dtype)]
            other.arrays[name] = array
            other.tensors[name] = TensorInfo(name, dtype, array.shape, GOLDEN, 0, array.nbytes)
    again = other.detect()
    assert again.format == ("gptq" if version == 1 else "gptq_v2")
    assert not again.sym


def test_awq_words_in_plain_nibble_order_do_not_give_the_expected_weights():
    golden = Golden("autoawq-0.2.9-gemm")
    tensors = golden.layer("k_proj")
    linear = awq_format.read(tensors)
    shuffled = awq_format.write(linear)["qweight"].view(np.uint32)
    plain = np.zeros_like(shuffled)
    for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        plain |= ((shuffled >> (4 * nibble)) & 15) << (4 * channel)
    wrong = awq_format.read({**tensors, "qweight": plain.view(np.int32)}).dequantize().astype(np.float16)
    assert hashlib.sha256(wrong.tobytes()).hexdigest() != golden.k_proj_sha256
