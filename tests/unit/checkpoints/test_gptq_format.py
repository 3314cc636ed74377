import json
import re
from dataclasses import replace

import numpy as np
import pytest

from edgetool.checkpoints import gptq_format
from edgetool.errors import BadInput
from tests.parity.test_layouts import assert_same, random_linear

linear = random_linear(1, 64, 96, 4, 32, sym=False, lowest_zero=1)
stored = gptq_format.write(linear)


def test_symmetric_zeros_are_sevens_in_version_1_and_eights_in_version_2():
    sym = random_linear(2, 64, 96, 4, 32, sym=True)
    assert np.all(gptq_format.write(sym, 1)["qzeros"].view(np.uint32) == 0x77777777)
    assert np.all(gptq_format.write(sym, 2)["qzeros"].view(np.uint32) == 0x88888888)


def test_reading_with_the_wrong_version_shifts_every_weight_by_one_scale():
    wrong = gptq_format.read(stored, 4, zero_offset=0)
    shift = wrong.dequantize() - linear.dequantize()
    # float32 holds both products exactly (11-bit scale times 5-bit integer), so the difference is exact
    assert np.array_equal(shift, linear.scales.astype(np.float32)[:, np.arange(96) // 32])


def test_swapped_qzeros_rows_change_the_weights():
    qzeros = stored["qzeros"][[1, 0, 2]]
    assert not np.array_equal(gptq_format.read({**stored, "qzeros": qzeros}, 4, 1).zeros, linear.zeros)


def test_a_zero_of_0_is_refused_by_version_1_and_kept_by_version_2():
    zeros = linear.zeros.copy()
    zeros[3, 1] = 0
    layer = replace(linear, zeros=zeros)
    with pytest.raises(BadInput, match=r"1 zeros are 0.*gptq_v2 can.*\(mlp.up_proj\)"):
        gptq_format.write(layer, 1, "mlp.up_proj")
    assert_same(gptq_format.read(gptq_format.write(layer, 2), 4, 0), layer)


def test_a_stored_zero_of_all_ones_reads_as_0_in_version_1():
    qzeros = stored["qzeros"].copy()
    qzeros.view(np.uint32)[0, 0] |= 0xF
    assert gptq_format.read({**stored, "qzeros": qzeros}, 4, 1).zeros[0, 0] == 0


def test_g_idx_may_be_missing_or_empty_when_groups_are_neighbours():
    for g_idx in ({}, {"g_idx": np.zeros(0, np.int32)}):
        tensors = {suffix: array for suffix, array in stored.items() if suffix != "g_idx"} | g_idx
        assert_same(gptq_format.read(tensors, 4, 1), linear)


def test_a_short_last_group_is_read_as_found_and_not_written():
    layer = replace(linear, group_size=40)
    tensors = {**stored, "g_idx": (np.arange(96) // 40).astype(np.int32)}
    assert_same(gptq_format.read(tensors, 4, 1), layer)
    with pytest.raises(BadInput, match="group_size 40 does not divide in_features 96"):
        gptq_format.write(layer)


@pytest.mark.parametrize(
    ("suffix", "array", "message"),
    [
        ("qweight", None, "no qweight"),
        ("qzeros", None, "no qzeros"),
        ("scales", None, "no scales"),
        ("qweight", stored["qweight"][:, :32], "qweight has 32 output channels"),
        ("qweight", stored["qweight"][:11], "g_idx is int32 (96,); must be int32 (88,)"),
        ("qweight", stored["qweight"].astype(np.int64), "qweight is int64"),
        ("qzeros", stored["qzeros"].T.copy(), "qzeros have shape (8, 3); must be (3, 8)"),
        ("qzeros", stored["qzeros"][:2], "qzeros have shape (2, 8); must be (3, 8)"),
        ("scales", stored["scales"].T.copy(), "scales have shape (64, 3)"),
        ("scales", stored["scales"][0], "scales have shape (64,)"),
        ("scales", np.full_like(stored["scales"], np.nan), "192 scales are NaN or infinite"),
        ("g_idx", stored["g_idx"][:95], "g_idx is int32 (95,)"),
        ("g_idx", stored["g_idx"].astype(np.int64), "g_idx is int64"),
        ("g_idx", np.where(stored["g_idx"] == 2, 9, stored["g_idx"]).astype(np.int32), "g_idx holds 9"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_with_the_layers_name(suffix, array, message):
    tensors = {**stored, suffix: array}
    if array is None:
        del tensors[suffix]
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        gptq_format.read(tensors, 4, 1, name="self_attn.o_proj")
    assert "self_attn.o_proj" in error.value.message


def test_three_bits_need_whole_words_of_32_codes():
    with pytest.raises(BadInput, match="multiple of 3"):
        gptq_format.read({**stored, "qweight": stored["qweight"][:10]}, 3, 1)
    with pytest.raises(BadInput, match="in_features 80 is not a multiple of 32"):
        gptq_format.write(random_linear(3, 64, 80, 3, 40, sym=True))
    with pytest.raises(BadInput, match="out_features 12 is not a multiple of 8"):
        gptq_format.write(random_linear(3, 12, 64, 4, 32, sym=True))


def test_config_has_what_each_reader_asks_for():
    config = gptq_format.quantization_config(
        bits=4, group_size=-1, sym=True, desc_act=False, ignore=["lm_head", "model.visual"]
    )
    assert json.loads(json.dumps(config)) == config
    for key, value in {
        "quant_method": "gptq",  # transformers, vLLM
        "bits": 4,
        "group_size": -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",  # vLLM until 0.31, transformers
        "format": "gptq",  # gptqmodel 7
        "method": "gptq",
    }.items():
        assert config[key] == value
    (rule,) = config["dynamic"]
    assert rule.startswith("-:")
    for name, skipped in (("model.visual.blocks.0.attn.qkv", True), ("model.layers.0.self_attn.q_proj", False)):
        assert bool(re.match(rule.removeprefix("-:"), name)) == skipped
    assert gptq_format.quantization_config(bits=4, group_size=64, sym=False, desc_act=True, version=2)["format"] == (
        "gptq_v2"
    )
