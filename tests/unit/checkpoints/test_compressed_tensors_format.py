import re

import numpy as np
import pytest

from edgetool.checkpoints import compressed_tensors_format
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.errors import BadInput
from tests.parity.test_layouts import assert_same, random_linear

# What compressed-tensors 0.19.0's pack_to_int32 makes of codes (5 o + 3 i + o i) mod 2**bits, [5, 40], and of zeros
# (3 o + g + 1) mod 2**bits, [5, 2] along dimension 0 (both counted from -2**(bits - 1)), little-endian bytes.
UPSTREAM = {
    2: (
        "6c6c6c6c6c6c6c6c6c6c00005555555555555555555500004e4e4e4e4e4e4e4e4e4e00007777777777777777777700006c6c6c6c6c6c6c6c"
        "6c6c0000",
        "b1010000c6020000",
    ),
    3: (
        "98c3ab98c3ab98c3ab98c3ab98c3ab004dd3344dd3344dd3344dd3344dd334003ae3a13ae3a13ae3a13ae3a13ae3a100eff22eeff22eeff2"
        "2eeff22eeff22e009c82bb9c82bb9c82bb9c82bb9c82bb00",
        "e15500002a660000",
    ),
    4: (
        "3096fc52b81e74da3096fc52b81e74da3096fc52951d951d951d951d951d951d951d951d951d951dfa943ed8721cb650fa943ed8721cb650"
        "fa943ed85f1bd7935f1bd7935f1bd7935f1bd7935f1bd793b492705e3c1af8d6b492705e3c1af8d6b492705e",
        "41a70d0052b80e00",
    ),
    8: (
        "000306090c0f1215181b1e2124272a2d303336393c3f4245484b4e5154575a5d606366696c6f727505090d1115191d2125292d3135393d41"
        "45494d5155595d6165696d7175797d8185898d9195999da10a0f14191e23282d32373c41464b50555a5f64696e73787d82878c91969ba0a5"
        "aaafb4b9bec3c8cd0f151b21272d33393f454b51575d63696f757b81878d93999fa5abb1b7bdc3c9cfd5dbe1e7edf3f9141b222930373e45"
        "4c535a61686f767d848b9299a0a7aeb5bcc3cad1d8dfe6edf4fb020910171e25",
        "0104070a0205080b0d0000000e000000",
    ),
}
# The same codes by 0.17.0, whose 3-bit words hold ten whole codes.
UPSTREAM_3_BITS_SPARSE = (
    "98c3ab180eaf620ebc8a393c2ae6f02a4dd3340d4dd3340d4dd3340d4dd3340d3ae3a13a8c87ea0c1eaa331ea8ce7828eff22e2fcbbbbc0b"
    "eff22e2fcbbbbc0b9c82bb1c0aee720ab8cb29382ea7e02e"
)


def upstream_layer(bits):
    o, i, g = np.arange(5)[:, None], np.arange(40)[None], np.arange(2)[None]
    return QuantizedLinear(
        codes=((5 * o + 3 * i + o * i) % (1 << bits)).astype(np.uint8),
        scales=np.ones((5, 2), np.float16),
        zeros=((3 * o + g + 1) % (1 << bits)).astype(np.uint8),
        g_idx=None,
        bits=bits,
        group_size=20,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_the_package_itself(bits):
    written = compressed_tensors_format.write(upstream_layer(bits))
    assert (written["weight_packed"].tobytes().hex(), written["weight_zero_point"].tobytes().hex()) == UPSTREAM[bits]
    assert written["weight_shape"].tolist() == [5, 40]
    assert written["weight_shape"].dtype == np.int64


def test_sparse_3_bit_words_of_version_0_17_are_recognised_even_when_there_are_as_many():
    layer = upstream_layer(3)
    words = np.frombuffer(bytes.fromhex(UPSTREAM_3_BITS_SPARSE), np.int32).reshape(5, 4)
    tensors = compressed_tensors_format.write(layer)
    assert tensors["weight_packed"].shape == words.shape
    assert_same(compressed_tensors_format.read({**tensors, "weight_packed": words}, 3), layer)


def test_sparse_3_bit_words_are_recognised_by_their_number():
    layer = random_linear(1, 40, 192, 3, 64, sym=False)
    tensors = compressed_tensors_format.write(layer)
    for suffix, codes in (("weight_packed", layer.codes), ("weight_zero_point", layer.zeros.T)):
        count = -(-codes.shape[1] // 10)
        words = np.zeros((codes.shape[0], count), np.uint32)
        for (row, column), code in np.ndenumerate(codes):
            words[row, column // 10] |= np.uint32(int(code) << (3 * (column % 10)))
        tensors[suffix] = words.view(np.int32) if suffix == "weight_packed" else words.view(np.int32).T.copy()
    assert tensors["weight_packed"].shape == (40, 20)  # dense: 18
    assert_same(compressed_tensors_format.read(tensors, 3), layer)


def test_symmetric_layers_have_no_zero_point_unless_the_checkpoint_is_asymmetric():
    layer = random_linear(2, 16, 64, 4, 32, sym=True)
    assert "weight_zero_point" not in compressed_tensors_format.write(layer)
    tensors = compressed_tensors_format.write(layer, sym=False)
    assert np.all(tensors["weight_zero_point"].view(np.uint32) == 0x88888888)
    assert_same(compressed_tensors_format.read(tensors, 4), layer)


def test_an_asymmetric_layer_does_not_pass_as_symmetric():
    with pytest.raises(BadInput, match=r"asymmetric: not every zero is 8 \(mlp.gate_proj\)"):
        compressed_tensors_format.write(random_linear(2, 16, 64, 4, 32, sym=False), sym=True, name="mlp.gate_proj")


def test_unpacked_int8_zero_points_of_old_releases_are_read():
    layer = random_linear(3, 16, 64, 4, 32, sym=False)
    tensors = compressed_tensors_format.write(layer)
    tensors["weight_zero_point"] = layer.zeros.astype(np.int8) - np.int8(8)
    assert_same(compressed_tensors_format.read(tensors, 4), layer)


def test_a_g_idx_that_was_never_set_means_neighbouring_channels():
    layer = random_linear(3, 16, 64, 4, 32, sym=True)
    tensors = compressed_tensors_format.write(layer) | {"weight_g_idx": np.full(64, -1, np.int32)}
    assert_same(compressed_tensors_format.read(tensors, 4), layer)


linear = random_linear(4, 24, 96, 4, 32, sym=False)
stored = compressed_tensors_format.write(linear)


@pytest.mark.parametrize(
    ("suffix", "array", "message"),
    [
        ("weight_shape", None, "no weight_shape"),
        ("weight_shape", np.array([24, 104]), "weight_packed is int32 (24, 12); must be int32 (24, 13)"),
        ("weight_shape", np.array([96, 24]), "weight_scale has shape (24, 3); must be [96, n_groups]"),
        ("weight_shape", np.array([24, -96]), "must be two positive integers"),
        ("weight_shape", np.array([24, 96, 1]), "must be two positive integers"),
        ("weight_packed", stored["weight_packed"].T.copy(), "weight_packed is int32 (12, 24)"),
        ("weight_packed", stored["weight_packed"].view(np.float32), "weight_packed is float32"),
        ("weight_scale", stored["weight_scale"].T.copy(), "weight_scale has shape (3, 24)"),
        ("weight_scale", np.full_like(stored["weight_scale"], np.nan), "72 scales are NaN or infinite"),
        ("weight_zero_point", stored["weight_zero_point"].T[:2].copy(), "weight_zero_point transposed is int32 (3, 2)"),
        ("weight_g_idx", np.zeros(95, np.int32), "weight_g_idx is int32 (95,)"),
        ("weight_g_idx", np.full(96, 3, np.int32), "g_idx holds 3"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(suffix, array, message):
    tensors = {**stored, suffix: array}
    if array is None:
        del tensors[suffix]
    with pytest.raises(BadInput, match=re.escape(message)):
        compressed_tensors_format.read(tensors, 4)


def test_config_names_the_strategy_of_its_group_size():
    config = compressed_tensors_format.quantization_config(bits=4, group_size=64, sym=True, ignore=["lm_head"])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("group", 64, True)
    assert (config["quantization_status"], config["ignore"]) == ("compressed", ["lm_head"])
    channel = compressed_tensors_format.quantization_config(bits=8, group_size=-1, sym=False)
    weights = channel["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["num_bits"]) == ("channel", None, 8)


def test_a_quantised_lm_head_is_a_target_of_its_own():
    # vLLM 0.32 does not take its lm_head for a Linear, and looks for lm_head.weight otherwise
    def targets(ignore):
        config = compressed_tensors_format.quantization_config(bits=4, group_size=64, sym=True, ignore=ignore)
        return config["config_groups"]["group_0"]["targets"]

    assert targets(["lm_head"]) == ["Linear"]
    name, pattern = targets([])
    assert (name, pattern[:3]) == ("Linear", "re:")
    assert re.match(pattern[3:], "lm_head") and re.match(pattern[3:], "language_model.lm_head")
    assert not re.match(pattern[3:], "model.lm_head_norm")
