"""The plain reader against words that the scalar oracle packed, other tools' tensors, and damage."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgetool.checkpoints import plain_reader
from edgetool.checkpoints.plain_reader import read
from edgetool.errors import BadInput
from tests.fakes.packed_checkpoints import GOLDEN_FORMATS, Layer, random_layer, read_safetensors
from tests.parity.scalar_layouts import stream

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = ("gptq", "gptq_v2", "awq", "compressed-tensors")


def assert_reads(tensors, kind: str, layer: Layer) -> None:
    linear = read(tensors, kind, layer.bits, layer.group_size, "layer")
    out_features = layer.codes.shape[0]
    for rows in (
        slice(0, out_features),
        slice(out_features // 3, out_features - 1),
        np.array([out_features - 1, 0, out_features // 2]),
    ):
        assert np.array_equal(linear.codes(rows), layer.codes[rows])
        assert linear.weight(rows).tobytes() == layer.weight()[rows].tobytes()
    assert np.array_equal(linear.zeros, layer.zeros)
    assert np.array_equal(linear.groups, layer.g_idx)
    assert linear.trivial is not layer.act_order
    stored = {"float16": "F16", "uint16": "BF16", "float32": "F32"}[layer.scales.dtype.name]
    assert linear.scale_dtype == stored


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
def test_words_of_the_scalar_packer_are_read_as_the_integers_that_went_in(
    kind: str, act_order: bool, bits: int
) -> None:
    for seed, (out_features, in_features, group_size) in enumerate(((96, 160, 32), (32, 96, -1), (64, 96, 48))):
        layer = random_layer(seed, out_features, in_features, bits, group_size, act_order=act_order)
        assert_reads(layer.tensors(kind), kind, layer)


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(8, 96, 32), (40, 66, 33), (72, 50, -1)])
def test_awq_words_of_the_scalar_packer_are_read_as_the_integers_that_went_in(
    out_features: int, in_features: int, group_size: int
) -> None:
    layer = random_layer(3, out_features, in_features, 4, group_size, lowest_zero=0)
    assert_reads(layer.tensors("awq"), "awq", layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(5, 96, 32), (33, 70, 35), (3, 41, -1)])
def test_compressed_tensors_of_any_shape_are_read(
    bits: int, out_features: int, in_features: int, group_size: int
) -> None:
    for sym in (True, False):
        layer = random_layer(bits, out_features, in_features, bits, group_size, sym=sym)
        assert_reads(layer.tensors("compressed-tensors"), "compressed-tensors", layer)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_codes_zeros_and_groups_come_back(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    bits = 4 if kind == "awq" else data.draw(st.sampled_from([2, 3, 4, 8]))
    multiple = 1 if kind == "compressed-tensors" else 32
    out_features = data.draw(st.integers(1, 3)) * (8 if kind == "awq" else multiple)
    in_features = data.draw(st.integers(2, 70 if multiple == 1 else 3)) * (1 if kind == "awq" else multiple)
    n_groups = data.draw(st.integers(1, min(4, in_features)).filter(lambda n: in_features % n == 0))
    lowest = 1 if kind == "gptq" else 0
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    g_idx = np.arange(in_features) // (in_features // n_groups)
    if kind != "awq" and data.draw(st.booleans()):
        g_idx = rng.permutation(g_idx)
    layer = Layer(
        codes=rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8),
        zeros=rng.integers(lowest, 1 << bits, (out_features, n_groups), dtype=np.uint8),
        scales=rng.normal(size=(out_features, n_groups)).astype(data.draw(st.sampled_from([np.float16, np.float32]))),
        g_idx=g_idx.astype(np.int32),
        bits=bits,
    )
    tensors = layer.tensors(kind)
    if kind == "compressed-tensors" and bits == 3 and -(-in_features * 3 // 32) == -(-in_features // 10):
        # As many words as 0.17's sparse kind would have: only a set top bit tells them apart. Widths that are a
        # multiple of 32, as all real ones are, never come here.
        assume(bool(np.any(tensors["weight_packed"].view(np.uint32) >> 30)))
    assert_reads(tensors, kind, layer)


def test_scales_of_bfloat16_keep_their_value_and_their_name() -> None:
    layer = random_layer(1, 32, 64)
    bits = np.array([0x3C00, 0xBF81, 0x0001, 0x4049], dtype=np.uint16)  # 1/128, -1.0078125, 2**-133, 3.140625
    scales = np.resize(bits, layer.scales.shape)
    tensors = layer.tensors("awq") | {"scales": np.ascontiguousarray(scales.T)}
    linear = read(tensors, "awq", 4)
    assert linear.scale_dtype == "BF16"
    assert set(linear.scales.reshape(-1).tolist()) == {1 / 128, -1.0078125, 2.0**-133, 3.140625}


def test_three_bit_words_of_compressed_tensors_0_17_are_told_from_a_dense_stream() -> None:
    # 5 channels fill one word either way; 0.17 leaves its top two bits idle, a dense stream of 40 codes does not
    for out_features, in_features in ((6, 40), (6, 50), (40, 70)):
        layer = random_layer(2, out_features, in_features, 3, in_features)

        def sparse(rows: list[list[int]]) -> np.ndarray:
            packed = []
            for row in rows:
                words = [0] * -(-len(row) // 10)
                for index, code in enumerate(row):
                    words[index // 10] |= code << (3 * (index % 10))
                packed.append(words)
            return np.array(packed, dtype=np.int32)

        tensors = layer.tensors("compressed-tensors") | {
            "weight_packed": sparse(layer.codes.tolist()),
            "weight_zero_point": np.ascontiguousarray(sparse(layer.zeros.T.tolist()).T),
        }
        assert_reads(tensors, "compressed-tensors", layer)


def test_zero_points_that_old_releases_left_as_bytes_are_read() -> None:
    layer = random_layer(4, 24, 64, 4, 32)
    stored = (layer.zeros.astype(np.int16) - 8).astype(np.int8)
    assert_reads(layer.tensors("compressed-tensors") | {"weight_zero_point": stored}, "compressed-tensors", layer)


def test_a_g_idx_of_minus_one_means_neighbouring_channels() -> None:
    layer = random_layer(5, 32, 64, 4, 32)
    for kind, suffix in (("gptq", "g_idx"), ("compressed-tensors", "weight_g_idx")):
        unset = {suffix: np.full(64, -1, dtype=np.int32)}
        assert_reads(layer.tensors(kind) | unset, kind, layer)
    without = layer.tensors("gptq")
    del without["g_idx"]
    assert_reads(without, "gptq", layer)


def test_a_short_last_group_needs_to_be_told_its_size() -> None:
    layer = random_layer(6, 16, 80, 4, 32)  # groups of 32, 32 and 16
    assert_reads(layer.tensors("compressed-tensors"), "compressed-tensors", layer)
    with pytest.raises(BadInput, match="layer has 3 groups for 80 input channels"):
        read(layer.tensors("compressed-tensors"), "compressed-tensors", 4, None, "layer")


@pytest.mark.parametrize("tool", sorted(GOLDEN_FORMATS))
def test_other_tools_tensors_are_read_to_their_expected_weights(tool: str) -> None:
    arrays = read_safetensors(GOLDEN / f"{tool}.safetensors")
    for module in ("down_proj", "k_proj"):
        tensors = {name.removeprefix(f"{module}."): array for name, array in arrays.items() if name.startswith(module)}
        linear = read(tensors, GOLDEN_FORMATS[tool], 4, 64, module)
        weight = linear.weight(slice(0, linear.out_features)).astype(np.float16)
        expected = arrays[f"expected.{module}"]
        assert np.array_equal(weight[: len(expected)].view(np.uint16), expected.view(np.uint16))
    side = json.loads((GOLDEN / f"{tool}.json").read_text())
    assert hashlib.sha256(weight.tobytes()).hexdigest() == side["expected_k_proj_sha256"]


def test_every_bit_of_every_word_decides_exactly_one_weight_or_one_groups_zero() -> None:
    layer = random_layer(7, 32, 64, 3, 32)
    tensors = layer.tensors("gptq")
    before = read(tensors, "gptq", 3)
    rng = np.random.default_rng(0)
    for suffix in ("qweight", "qzeros"):
        for place in rng.integers(0, tensors[suffix].size * 32, 40).tolist():
            words = tensors[suffix].copy()
            words.reshape(-1).view(np.uint32)[place // 32] ^= np.uint32(1 << place % 32)
            after = read(tensors | {suffix: words}, "gptq", 3)
            codes = before.codes(slice(0, 32)) != after.codes(slice(0, 32))
            zeros = before.zeros != after.zeros
            assert (int(codes.sum()), int(zeros.sum())) == ((1, 0) if suffix == "qweight" else (0, 1))


# --- what does not fit


def without(suffix: str):
    return lambda tensors: tensors.pop(suffix)


def reshaped(suffix: str, change):
    def damage(tensors) -> None:
        tensors[suffix] = np.ascontiguousarray(change(tensors[suffix]))

    return damage


def with_value(suffix: str, value: float):
    def damage(tensors) -> None:
        tensors[suffix] = tensors[suffix].copy()
        tensors[suffix].reshape(-1)[-1] = value

    return damage


def as_dtype(suffix: str, dtype: str):
    return reshaped(suffix, lambda array: array.astype(dtype))


DAMAGE = {
    "no qweight": ("gptq", without("qweight"), "layer.qweight is missing"),
    "no qzeros": ("gptq", without("qzeros"), "layer.qzeros is missing"),
    "no scales": ("awq", without("scales"), "layer.scales is missing"),
    "no weight_scale": ("compressed-tensors", without("weight_scale"), "layer.weight_scale is missing"),
    "no weight_shape": ("compressed-tensors", without("weight_shape"), "layer.weight_shape is missing"),
    "short qweight": ("gptq", reshaped("qweight", lambda a: a[:-1]), "layer.g_idx is int32 .64.; must be int32 .56."),
    "narrow qweight": ("gptq", reshaped("qweight", lambda a: a[:, :-1]), "layer.qweight is int32 .8, 31."),
    "narrow awq": ("awq", reshaped("qweight", lambda a: a[:, :-1]), "layer.qweight is int32 .64, 3."),
    "wide words": ("gptq", as_dtype("qweight", "int64"), "layer.qweight is int64"),
    "turned qzeros": ("gptq_v2", reshaped("qzeros", lambda a: a.T), "layer.qzeros is int32 .4, 2."),
    "qzeros of another": ("awq", reshaped("qzeros", lambda a: a[:1]), "layer.qzeros is int32 .1, 4."),
    "one group too few": ("compressed-tensors", reshaped("weight_scale", lambda a: a[:, :1]), "weight_zero_point"),
    "NaN scale": ("gptq", with_value("scales", np.nan), "layer.scales holds NaN or infinity"),
    "infinite scale": ("compressed-tensors", with_value("weight_scale", -np.inf), "weight_scale holds NaN or inf"),
    "integer scales": ("awq", as_dtype("scales", "int32"), "layer.scales is int32"),
    "a group too many": ("gptq", with_value("g_idx", 2), "layer.g_idx names groups 0..2 of 2"),
    "negative group": ("compressed-tensors", with_value("weight_g_idx", -2), "weight_g_idx names groups -2..1 of 2"),
    "wide g_idx": ("gptq", as_dtype("g_idx", "int64"), "layer.g_idx is int64"),
    "three sizes": ("compressed-tensors", reshaped("weight_shape", lambda a: np.append(a, 1)), "two integers"),
    "other shape": ("compressed-tensors", with_value("weight_shape", 72), "weight_packed is int32 .32, 8."),
    "other rows": ("compressed-tensors", reshaped("weight_shape", lambda a: a[::-1]), "weight_scale"),
    "zero shape": ("compressed-tensors", with_value("weight_shape", 0), "weight_packed"),
    "negative shape": ("compressed-tensors", with_value("weight_shape", -64), "weight_packed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused_by_the_tensors_name(damage: str) -> None:
    kind, change, words = DAMAGE[damage]
    layer = random_layer(8, 32, 64, act_order=kind == "compressed-tensors")
    tensors = layer.tensors(kind)
    read(tensors, kind, 4, 32, "layer")
    change(tensors)
    with pytest.raises(BadInput, match=words):
        read(tensors, kind, 4, 32, "layer")


def test_the_wrong_number_of_bits_is_refused() -> None:
    for kind in ("gptq", "compressed-tensors"):
        tensors = random_layer(9, 32, 64, 4).tensors(kind)
        for bits in (2, 3, 8):
            with pytest.raises(BadInput):
                read(tensors, kind, bits, 32, "layer")


def test_the_oracle_of_this_file_puts_fields_across_words() -> None:
    assert stream([0] * 10 + [0b101] + [0] * 10 + [0b110], 3) == [1 << 30, 1, 0b11]
    assert stream([0xA, 0xB, 0xC], 4) == [0xCBA]


def test_the_plain_reader_shares_no_code_with_the_formats() -> None:
    tree = ast.parse(Path(plain_reader.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name and name.startswith("edgetool")}
    assert ours == {"edgetool.checkpoints.tensor_file", "edgetool.errors"}
