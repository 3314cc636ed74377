import re

import numpy as np
import pytest

from edgetool.checkpoints import awq_format
from edgetool.errors import BadInput
from tests.parity.test_layouts import assert_same, random_linear

linear = random_linear(1, 64, 96, 4, 32, sym=False)
stored = awq_format.write(linear)


def test_output_channels_sit_in_the_nibbles_of_the_gemm_order():
    layer = random_linear(2, 8, 32, 4, 32, sym=True)
    layer.codes[:, 0] = range(8)
    # nibbles from the low end: channels 0, 2, 4, 6, 1, 3, 5, 7
    assert awq_format.write(layer)["qweight"].view(np.uint32)[0, 0] == 0x75316420


def test_writing_does_not_touch_the_layer_nor_reading_the_tensors():
    codes, before = linear.codes.copy(), {suffix: array.copy() for suffix, array in stored.items()}
    assert_same(awq_format.read(stored), linear)
    awq_format.write(linear)
    assert np.array_equal(linear.codes, codes)
    assert all(np.array_equal(stored[suffix], array) for suffix, array in before.items())


def test_swapped_qzeros_rows_change_the_weights():
    assert not np.array_equal(awq_format.read({**stored, "qzeros": stored["qzeros"][[1, 0, 2]]}).zeros, linear.zeros)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (random_linear(3, 64, 96, 8, 32, sym=False), "4-bit codes only; these have 8"),
        (random_linear(3, 64, 96, 4, 32, sym=False, scattered=True), "AWQ has no g_idx"),
        (random_linear(3, 12, 96, 4, 32, sym=False), "out_features 12 is not a multiple of 8"),
    ],
)
def test_layers_without_an_awq_form_are_refused_with_the_reason(layer, message):
    with pytest.raises(BadInput, match=message) as error:
        awq_format.write(layer, "model.layers.0.mlp.down_proj")
    assert "model.layers.0.mlp.down_proj" in error.value.message


@pytest.mark.parametrize(
    ("suffix", "array", "message"),
    [
        ("qzeros", None, "no qzeros"),
        ("qweight", stored["qweight"][:, :7], "scales have shape (3, 64); qweight has 56 output channels"),
        ("qweight", stored["qweight"].view(np.float32), "qweight is float32"),
        ("qzeros", stored["qzeros"].T.copy(), "qzeros have shape (8, 3)"),
        ("scales", stored["scales"].T.copy(), "scales have shape (64, 3)"),
        ("scales", stored["scales"][0], "scales has shape (64,)"),
        ("scales", np.full_like(stored["scales"], np.inf), "192 scales are NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(suffix, array, message):
    tensors = {**stored, suffix: array}
    if array is None:
        del tensors[suffix]
    with pytest.raises(BadInput, match=re.escape(message)):
        awq_format.read(tensors)


def test_a_group_size_that_contradicts_the_number_of_groups_is_refused():
    with pytest.raises(BadInput, match="3 groups for in_features 96 and group_size 64"):
        awq_format.read(stored, group_size=64)


def test_a_quantised_lm_head_is_said_to_be_one():
    # without the key vLLM 0.32 looks for lm_head.weight and fails
    assert awq_format.quantization_config(group_size=64, ignore=[])["lm_head"] is True
    assert "lm_head" not in awq_format.quantization_config(group_size=64, ignore=["lm_head"])
