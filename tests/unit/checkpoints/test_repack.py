from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.checkpoints.awq_words import from_awq, to_awq
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.repack import repack
from edgetool.checkpoints.scale_storage import with_scale_dtype
from edgetool.checkpoints.scratch import Scratch
from edgetool.errors import BadInput
from tests.parity import scalar_layouts as oracle
from tests.parity.test_layouts import formula, random_linear

PAIRS = [(source, target) for source in FORMATS for target in FORMATS]


def assert_same_bytes(tensors, expected):
    assert list(tensors) == list(expected)
    for suffix, array in expected.items():
        ours = tensors[suffix]
        assert (ours.dtype, ours.shape, ours.tobytes()) == (array.dtype, array.shape, array.tobytes()), suffix
        assert ours.flags.c_contiguous


@settings(deadline=None, max_examples=80)
@given(
    pair=st.sampled_from(PAIRS),
    bits=st.sampled_from([2, 3, 4, 8]),
    out_blocks=st.integers(1, 40),
    in_blocks=st.integers(1, 40),
    group_blocks=st.sampled_from([1, 2, 4, -1]),
    sym=st.booleans(),
    scattered=st.booleans(),
    scales=st.sampled_from(["F16", "BF16", "F32"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_moved_words_are_the_bytes_that_reading_and_writing_gives(
    pair, bits, out_blocks, in_blocks, group_blocks, sym, scattered, scales, seed
):
    source, target = pair
    if "awq" in pair:
        bits, scattered = 4, False
    step = 32 if bits == 3 else 32 // bits  # the smallest block that every format takes
    in_features = in_blocks * step
    size = group_blocks * step if group_blocks > 0 and in_blocks % group_blocks == 0 else in_features
    linear = random_linear(seed, out_blocks * step, in_features, bits, size, sym, scattered, lowest_zero=1)
    if scales != "F16":
        linear = with_scale_dtype(linear, scales, rounding=True)
    spec = Spec(bits, size, sym, desc_act=scattered)
    tensors = FORMATS[source].write(linear, spec)
    before = {suffix: array.copy() for suffix, array in tensors.items()}
    moved = repack(tensors, source, target, spec, spec)
    assert moved is not None
    assert_same_bytes(moved, FORMATS[target].write(FORMATS[source].read(tensors, spec), spec))
    assert_same_bytes(tensors, before)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_the_scalar_reader_sees_the_same_weights_after_the_move(source, target, sym):
    linear = random_linear(5, 40, 96, 4, 32, sym, lowest_zero=1)
    spec = Spec(4, 32, sym)
    moved = repack(FORMATS[source].write(linear, spec), source, target, spec, spec)
    readers = {
        "gptq": lambda o, i: oracle.gptq_weight(moved, 4, 1, o, i),
        "gptq_v2": lambda o, i: oracle.gptq_weight(moved, 4, 2, o, i),
        "awq": lambda o, i: oracle.awq_weight(moved, 32, o, i),
        "compressed-tensors": lambda o, i: oracle.compressed_weight(moved, 4, 32, o, i),
    }
    assert np.array_equal(oracle.whole(readers[target], 40, 96), formula(linear))


# Several tiles each way with short ones at the ends; one column of words; one row of them.
@pytest.mark.parametrize(("out_features", "in_features"), [(2200, 1104), (8, 4096), (4096, 8), (1032, 1032)])
def test_layers_of_many_tiles_keep_every_word(out_features, in_features):
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (in_features // 8, out_features), dtype=np.int32)
    awq = np.empty((in_features, out_features // 8), dtype=np.int32)
    to_awq(words, awq)
    # Code by code: nibble j of words[r, n] is input 8 r + j, output n.
    codes = np.stack([words >> (4 * j) & 15 for j in range(8)], axis=1).reshape(in_features, out_features)
    expected = np.zeros(awq.shape, dtype=np.int64)
    for place, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        expected |= codes[:, channel::8].astype(np.int64) << (4 * place)
    assert np.array_equal(awq.view(np.uint32), expected)
    lying = np.empty(words.T.shape, dtype=np.int32)
    lying[...] = words.T
    other, back, back_lying = np.empty_like(awq), np.empty_like(words), np.empty_like(lying)
    to_awq(lying.T, other)
    from_awq(awq, back)
    from_awq(awq, back_lying.T)
    assert np.array_equal(other, awq) and np.array_equal(back, words) and np.array_equal(back_lying, lying)


def test_one_changed_nibble_changes_exactly_one_code():
    linear = random_linear(6, 64, 96, 4, 32, sym=False, lowest_zero=1)
    spec = Spec(4, 32, False)
    tensors = FORMATS["gptq"].write(linear, spec)
    tensors["qweight"][3, 21] ^= 1 << 8  # nibble 2: input 8 * 3 + 2
    moved = repack(tensors, "gptq", "awq", spec, spec)
    different = np.argwhere(FORMATS["awq"].read(moved, spec).codes != linear.codes)
    assert different.tolist() == [[21, 26]]


def test_an_array_whose_bytes_stay_is_handed_through():
    linear = random_linear(7, 32, 64, 4, 32, sym=False, lowest_zero=1)
    spec = Spec(4, 32, False)
    tensors = FORMATS["gptq"].write(linear, spec)
    moved = repack(tensors, "gptq", "gptq_v2", spec, spec)
    assert moved["qweight"] is tensors["qweight"]
    assert not np.array_equal(moved["qzeros"], tensors["qzeros"])


def sparse_three_bits(linear):
    """weight_packed as compressed-tensors 0.17 has it: ten codes a word."""
    tensors = FORMATS["compressed-tensors"].write(linear, Spec(3, 32, True))
    padded = np.zeros((linear.out_features, -(-linear.in_features // 10) * 10), dtype=np.int64)
    padded[:, : linear.in_features] = linear.codes
    fields = padded.reshape(linear.out_features, -1, 10) << (3 * np.arange(10))
    return {**tensors, "weight_packed": fields.sum(axis=2).astype(np.int32)}


def test_words_that_would_have_to_change_are_left_to_the_canonical_way():
    spec = Spec(3, 32, True)
    tensors = sparse_three_bits(random_linear(8, 32, 96, 3, 32, sym=True))
    assert np.array_equal(
        FORMATS["compressed-tensors"].read(tensors, spec).codes, random_linear(8, 32, 96, 3, 32, True).codes
    )
    assert repack(tensors, "compressed-tensors", "gptq", spec, spec) is None

    spec = Spec(4, 33, False)  # 66 input channels do not fill blocks of eight
    tensors = FORMATS["awq"].write(random_linear(9, 64, 66, 4, 33, sym=False), spec)
    assert repack(tensors, "awq", "compressed-tensors", spec, spec) is None
    assert repack(tensors, "awq", "awq", spec, spec) is not None


def test_idle_bits_behind_a_row_are_not_passed_on():
    linear = random_linear(10, 8, 36, 4, 36, sym=True)
    spec = Spec(4, 36, True)
    tensors = FORMATS["compressed-tensors"].write(linear, spec)
    tensors["weight_packed"][:, -1] |= 0x7FF << 20
    assert repack(tensors, "compressed-tensors", "compressed-tensors", spec, spec) is None


def test_what_no_format_can_hold_is_refused_as_writing_refuses_it():
    spec = Spec(4, 32, False)
    zero = random_linear(11, 64, 96, 4, 32, sym=False)
    assert (zero.zeros == 0).any()
    tensors = FORMATS["gptq_v2"].write(zero, spec)
    scattered = FORMATS["gptq"].write(random_linear(12, 64, 96, 4, 32, False, scattered=True, lowest_zero=1), spec)
    cases = [
        (tensors, "gptq_v2", "gptq", spec, "GPTQ version 1 cannot store unambiguously"),
        (tensors, "gptq_v2", "compressed-tensors", Spec(4, 32, True), "asymmetric"),
        (scattered, "gptq", "awq", spec, "AWQ has no g_idx"),
        ({**tensors, "scales": tensors["scales"] * np.float16(np.inf)}, "gptq_v2", "awq", spec, "NaN or infinite"),
        ({**tensors, "qzeros": tensors["qzeros"][:2]}, "gptq_v2", "awq", spec, "qzeros have shape"),
    ]
    for given_tensors, source, target, target_spec, reason in cases:
        with pytest.raises(BadInput, match=f"{reason}.*down_proj"):
            repack(given_tensors, source, target, spec, target_spec, "down_proj")


def test_scales_can_be_adapted_on_the_way_and_codes_cannot():
    spec = Spec(4, 32, False)
    linear = with_scale_dtype(random_linear(13, 64, 96, 4, 32, sym=False, lowest_zero=1), "F32")
    tensors = FORMATS["compressed-tensors"].write(linear, spec)

    def narrow(layer):
        return with_scale_dtype(layer, "F16")

    moved = repack(tensors, "compressed-tensors", "gptq", spec, spec, adapt=narrow)
    assert_same_bytes(moved, FORMATS["gptq"].write(narrow(linear), spec))
    assert repack(tensors, "compressed-tensors", "gptq", spec, spec, adapt=lambda layer: None) is None


def test_two_threads_do_not_disturb_each_other():
    spec = Spec(4, 64, False)
    layers = [random_linear(seed, 512, 2048, 4, 64, False, lowest_zero=1) for seed in range(2)]
    stored = [FORMATS["gptq"].write(layer, spec) for layer in layers]
    with ThreadPoolExecutor(2) as pool:
        moved = list(pool.map(lambda tensors: repack(tensors, "gptq", "awq", spec, spec), stored * 8))
    for index, tensors in enumerate(moved):
        assert_same_bytes(tensors, FORMATS["awq"].write(layers[index % 2], spec))


def whole(tensors):
    """With the codes in one array; each block has to be used before the next is asked for."""
    blocks = {k: v for k, v in tensors.items() if not isinstance(v, np.ndarray)}
    return {**tensors, **{name: np.concatenate([block.copy() for block in parts]) for name, parts in blocks.items()}}


@pytest.mark.parametrize(
    ("source", "target", "bits"),
    [(*pair, bits) for pair in PAIRS for bits in (3, 4) if bits == 4 or "awq" not in pair],
)
def test_words_made_a_few_rows_at_a_time_are_the_same(source, target, bits, monkeypatch):
    monkeypatch.setattr("edgetool.checkpoints.repack._BLOCK_WORDS", 640)  # 8 to 48 rows of these layers, and a rest
    spec = Spec(bits, 32, False)
    linear = random_linear(15, 224, 416, bits, 32, sym=False, lowest_zero=1)
    moved = repack(FORMATS[source].write(linear, spec), source, target, spec, spec, scratch=Scratch())
    assert_same_bytes(whole(moved), FORMATS[target].write(linear, spec))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_memory_that_is_used_again_holds_the_same_words(source, target):
    spec, scratch = Spec(4, 32, True), Scratch()
    large, small = (random_linear(seed, size, size, 4, 32, True) for seed, size in enumerate((256, 96)))
    for linear in (small, large, small, large):
        tensors = FORMATS[source].write(linear, spec)
        assert_same_bytes(
            whole(repack(tensors, source, target, spec, spec, scratch=scratch)), FORMATS[target].write(linear, spec)
        )


def test_scratch_memory_is_used_again_by_its_thread_for_its_purpose_and_by_nothing_else():
    scratch = Scratch()
    first = scratch.empty("a", (100, 7), np.int32)
    first[:] = 1
    assert first.shape == (100, 7) and first.dtype == np.int32 and first.flags.c_contiguous
    other = scratch.empty("b", (50,), np.uint16)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(scratch.empty, "a", (100, 7), np.int32).result()
    assert not np.shares_memory(first, other) and not np.shares_memory(first, elsewhere)
    assert np.shares_memory(scratch.empty("a", (5, 5), np.uint8), first)
    assert scratch.empty("a", (1000,), np.int32).size == 1000  # larger than what is held
    assert (first == 1).all()


def test_shapes_that_do_not_fit_each_other_are_a_bug_and_say_so():
    with pytest.raises(ValueError, match="do not fill"):
        to_awq(np.zeros((2, 16), np.int32), np.zeros((8, 2), np.int32))
    with pytest.raises(ValueError, match="must be int32"):
        to_awq(np.zeros((2, 16), np.int64), np.zeros((16, 2), np.int32))


def test_the_stand_in_for_codes_is_never_written():
    linear = random_linear(14, 64, 96, 4, 32, sym=True)
    spec = Spec(4, 32, True)
    for name in FORMATS:
        tensors = FORMATS[name].write(linear, spec)
        rest = FORMATS[name].read_rest(tensors, spec)
        assert not rest.codes.any() and rest.codes.shape == linear.codes.shape
        assert FORMATS[name].suffixes[0] not in FORMATS[name].write_rest(rest, spec)
        assert FORMATS[name].write_rest(rest, spec).keys() == tensors.keys() - {FORMATS[name].suffixes[0]}
        assert_same_bytes(FORMATS[name].write(replace(rest, codes=linear.codes), spec), tensors)
