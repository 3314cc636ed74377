from dataclasses import replace

import numpy as np
import pytest

from edgetool.checkpoints.scale_storage import loaded_scales, stored_scales, with_scale_dtype
from edgetool.errors import BadInput
from tests.parity.test_layouts import random_linear

linear = random_linear(1, 4, 64, 4, 32, sym=True)


def of(values):
    return replace(linear, scales=np.full((4, 2), values, dtype=np.float32), scale_dtype="F32")


def test_bfloat16_bits_are_kept_exactly_on_the_way_in_and_out():
    bits = np.array([[0x3DFE, 0xBC00], [0x0001, 0x7F7F]], dtype=np.uint16)
    values, dtype = loaded_scales(bits)
    assert (values.dtype, dtype) == (np.float32, "BF16")
    assert values[0, 0] == np.float32(0.1240234375)
    layer = replace(random_linear(1, 2, 64, 4, 32, sym=True), scales=values, scale_dtype=dtype)
    assert np.array_equal(stored_scales(layer), bits)


def test_an_exact_change_of_dtype_is_made():
    half = with_scale_dtype(of(0.125), "F16")
    assert half.scales.dtype == np.float16
    assert np.array_equal(half.dequantize(), of(0.125).dequantize())
    assert with_scale_dtype(linear, "F16") is linear


def test_a_rounding_change_is_refused_unless_allowed():
    with pytest.raises(BadInput, match=r"8 of 8 F32 scales are not exact in F16 \(layer\)"):
        with_scale_dtype(of(0.1), "F16", name="layer")
    assert with_scale_dtype(of(0.1), "F16", rounding=True).scales[0, 0] == np.float16(0.1)


def test_an_overflow_is_refused_even_when_rounding_is_allowed():
    with pytest.raises(BadInput, match="overflows F16"):
        with_scale_dtype(of(1e6), "F16", rounding=True)


def test_other_dtypes_are_refused():
    with pytest.raises(BadInput, match="q_proj are int8"):
        loaded_scales(np.zeros((2, 2), np.int8), "q_proj")
