from dataclasses import replace

import numpy as np
import pytest

from edgetool.checkpoints.bfloat16 import float32_to_bfloat16
from edgetool.checkpoints.canonical import normal_g_idx, trivial_g_idx
from edgetool.errors import BadInput
from tests.parity.test_layouts import formula, random_linear

linear = random_linear(5, 6, 64, 4, 32, sym=False)


def test_dequantised_weights_follow_the_definition_also_with_a_short_last_group():
    ragged = replace(random_linear(6, 4, 96, 4, 32, sym=False), group_size=40)  # 40 + 40 + 16 channels
    ragged.validate()
    assert ragged.ragged
    for layer in (linear, ragged, random_linear(7, 9, 66, 3, 33, sym=False, scattered=True)):
        assert np.array_equal(layer.dequantize(), formula(layer))


def test_dequantising_more_than_one_block_gives_every_row():
    wide = random_linear(8, 300, 2048, 4, 128, sym=False)
    rows = [0, 127, 128, 129, 255, 256, 299]
    few = replace(wide, codes=wide.codes[rows], scales=wide.scales[rows], zeros=wide.zeros[rows])
    assert np.array_equal(wide.dequantize()[rows], few.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["usual", "subnormal", "zero", "overflowing", "float32"])
def test_narrow_output_is_rounded_once_from_the_float32_product(kind, bits):
    layer = random_linear(9, 40, 4096, bits, 64, sym=False)
    if kind == "float32":
        layer = replace(layer, scales=layer.scales.astype(np.float32) * np.float32(1.2345678), scale_dtype="F32")
    elif kind != "usual":
        odd = {"subnormal": 3e-6, "zero": -0.0, "overflowing": 60000.0}[kind]
        layer.scales[3, 5] = odd  # in the first block of rows, not in the others
    with np.errstate(over="ignore"):
        expected = layer.dequantize().astype(np.float16)
    halves = layer.dequantize(np.empty(layer.codes.shape, dtype=np.float16))
    assert np.array_equal(halves.view(np.uint16), expected.view(np.uint16))
    assert np.isinf(halves).any() == (kind == "overflowing")
    bfloat16 = layer.dequantize(np.empty(layer.codes.shape, dtype=np.uint16))
    assert np.array_equal(bfloat16, float32_to_bfloat16(layer.dequantize()))


def test_rows_of_a_layer_are_a_layer_of_views():
    part = linear.rows(2, 5)
    part.validate()
    assert np.array_equal(part.dequantize(), formula(linear)[2:5])
    assert np.shares_memory(part.codes, linear.codes) and linear.rows(4, 100).out_features == 2


def test_output_may_be_a_strided_view():
    wide = np.zeros((6, 128), dtype=np.float16)
    linear.dequantize(wide[:, ::2])
    assert np.array_equal(wide[:, ::2], formula(linear).astype(np.float16)) and not wide[:, 1::2].any()


def test_symmetry_is_a_property_of_the_zeros():
    assert not linear.sym
    assert replace(linear, zeros=np.full_like(linear.zeros, 8)).sym
    assert not replace(linear, zeros=np.full_like(linear.zeros, 7)).sym


def with_value(array, value):
    array = array.copy()
    array[1, 1] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5-bit codes"),
        ({"codes": linear.codes.astype(np.int8)}, "codes are int8"),
        ({"codes": with_value(linear.codes, 16)}, "a code is 16"),
        ({"zeros": with_value(linear.zeros, 16)}, "a zero is 16"),
        ({"zeros": linear.zeros[:, :1]}, "zeros are uint8 (6, 1)"),
        ({"scales": with_value(linear.scales, np.nan)}, "1 scales are NaN or infinite"),
        ({"scales": with_value(linear.scales, np.inf)}, "1 scales are NaN or infinite"),
        ({"scales": linear.scales[:5]}, "scales have shape (5, 2)"),
        ({"scales": linear.scales.astype(np.float32)}, "scales are float32 for a stored dtype of F16"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 65}, "group_size 65"),
        ({"g_idx": np.zeros(63, np.int32)}, "g_idx is int32 (63,)"),
        ({"g_idx": np.full(64, 2, np.int32)}, "g_idx holds 2"),
        ({"g_idx": np.full(64, -1, np.int32)}, "g_idx holds -1"),
    ],
)
def test_a_broken_layer_is_refused_with_its_name(change, message):
    with pytest.raises(BadInput) as error:
        replace(linear, **change).validate("model.layers.3.mlp.up_proj")
    assert message in error.value.message
    assert "model.layers.3.mlp.up_proj" in error.value.message


def test_a_trivial_g_idx_is_dropped_and_another_kept():
    assert normal_g_idx(trivial_g_idx(64, 16), 64, 16) is None
    assert normal_g_idx(None, 64, 16) is None
    other = trivial_g_idx(64, 16)[::-1]
    assert np.array_equal(normal_g_idx(other, 64, 16), other)
