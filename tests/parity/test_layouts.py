"""Every format, width, group size and symmetry, written by edgetool and read by the scalar oracle."""

import numpy as np
import pytest

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import FORMATS, Spec, stored_dtype
from tests.parity import scalar_layouts as oracle


def random_linear(seed, out_features, in_features, bits, group_size, sym, scattered=False, lowest_zero=0):
    """A layer with random codes, signed scales, and groups that are scattered over the channels if asked."""
    rng = np.random.default_rng(seed)
    size = in_features if group_size == -1 else group_size
    groups = in_features // size
    zeros = rng.integers(lowest_zero, 1 << bits, (out_features, groups), dtype=np.uint8)
    if sym:
        zeros[:] = 1 << (bits - 1)
    g_idx = rng.permutation(np.arange(in_features) // size).astype(np.int32) if scattered else None
    linear = QuantizedLinear(
        codes=rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8),
        scales=rng.normal(0, 0.02, (out_features, groups)).astype(np.float16),
        zeros=zeros,
        g_idx=g_idx,
        bits=bits,
        group_size=size,
    )
    linear.validate("random layer")
    return linear


def assert_same(ours, other):
    assert np.array_equal(ours.codes, other.codes)
    assert np.array_equal(ours.zeros, other.zeros)
    assert np.array_equal(ours.scales.view(np.uint16), other.scales.view(np.uint16))
    assert np.array_equal(ours.group_index(), other.group_index())
    assert (ours.g_idx is None) == (other.g_idx is None)
    assert (ours.bits, ours.group_size, ours.scale_dtype) == (other.bits, other.group_size, other.scale_dtype)


def formula(linear):
    """The weights by the definition, one at a time."""
    groups = linear.group_index()
    return oracle.whole(
        lambda o, i: (
            np.float32(linear.scales[o, groups[i]])
            * np.float32(int(linear.codes[o, i]) - int(linear.zeros[o, groups[i]]))
        ),
        linear.out_features,
        linear.in_features,
    )


def check(name, linear, spec, weight):
    tensors = FORMATS[name].write(linear, spec, "layer")
    expected = formula(linear)
    assert np.array_equal(linear.dequantize(), expected)
    read_by_oracle = oracle.whole(lambda o, i: weight(tensors, o, i), linear.out_features, linear.in_features)
    assert np.array_equal(read_by_oracle, expected)
    assert_same(FORMATS[name].read(tensors, spec, "layer"), linear)
    layout = FORMATS[name].layout(linear.out_features, linear.in_features, spec)
    assert {suffix: (stored_dtype(array), array.shape) for suffix, array in tensors.items()} == layout
    assert all(array.flags.c_contiguous for array in tensors.values())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group_size", "scattered"), [(32, False), (32, True), (-1, False)])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_means_what_the_scalar_reader_sees(bits, group_size, sym, scattered, version):
    linear = random_linear(bits, 32, 96, bits, group_size, sym, scattered, lowest_zero=2 - version)
    spec = Spec(bits, group_size, sym, desc_act=scattered)
    name = "gptq" if version == 1 else "gptq_v2"
    check(name, linear, spec, lambda t, o, i: oracle.gptq_weight(t, bits, version, o, i))


@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(8, 96, 32), (40, 66, 33), (24, 50, -1)])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_awq_means_what_the_scalar_reader_sees(out_features, in_features, group_size, sym):
    linear = random_linear(7, out_features, in_features, 4, group_size, sym)
    size = linear.group_size
    check("awq", linear, Spec(4, group_size, sym), lambda t, o, i: oracle.awq_weight(t, size, o, i))


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "scattered"),
    [(5, 96, 32, False), (5, 96, 32, True), (33, 70, 35, False), (33, 70, 35, True), (1, 41, -1, False)],
)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_mean_what_the_scalar_reader_sees(
    bits, sym, scattered, out_features, in_features, group_size
):
    linear = random_linear(bits, out_features, in_features, bits, group_size, sym, scattered)
    spec = Spec(bits, group_size, sym, desc_act=scattered)
    size = linear.group_size
    check("compressed-tensors", linear, spec, lambda t, o, i: oracle.compressed_weight(t, bits, size, o, i))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_four_formats_give_back_the_same_layer_one_after_another(sym):
    linear = random_linear(11, 64, 192, 4, 64, sym, lowest_zero=1)
    spec = Spec(4, 64, sym)
    now = linear
    for name in ("gptq", "awq", "compressed-tensors", "gptq_v2", "gptq"):
        now = FORMATS[name].read(FORMATS[name].write(now, spec, "layer"), spec, "layer")
        assert_same(now, linear)
