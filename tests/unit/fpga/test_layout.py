"""Port bytes against a packer of plain loops, on shapes that fill nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.checkpoints.packing import pack_rows
from edgetool.fpga.layout import (
    MatrixLayout,
    bias_words,
    count_unrepresentable,
    pack_fp16,
    pack_int4,
    unpack_fp16,
    unpack_int4,
)
from tests.fakes import naive_board


def draw(seed: int, n: int, k: int, group: int, lowest: int = -8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(lowest, 8, (n, k))
    groups = -(-k // group)
    scales, offsets = (rng.normal(0, 1, (n, groups)).astype(np.float16) for _ in range(2))
    return weights, scales, offsets


def words_of(weights: np.ndarray) -> np.ndarray:
    return pack_rows((weights + 8).astype(np.uint8), 4).view(np.uint32)


SHAPES = [
    (1, 1, 128),
    (32, 128, 128),
    (33, 129, 128),
    (70, 2048, 128),  # one whole package
    (65, 2176, 128),  # 17 groups: the second package is short and odd
    (40, 4100, 128),  # K no multiple of 8, 128 or 2048
    (31, 1031, 64),
    (64, 576, 64),
    (96, 515, 32),
    (33, 640, 32),
]


@pytest.mark.parametrize("encoding", ["twos", "signmag"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_bytes_are_those_of_the_formulas(n: int, k: int, group: int, zeros: bool, encoding: str) -> None:
    weights, scales, offsets = draw(n * k, n, k, group, -8 if encoding == "twos" else -7)
    layout = MatrixLayout(n, k, group, zeros)
    packed = pack_int4(words_of(weights), scales, offsets if zeros else None, layout, encoding)
    expected = naive_board.ports_of(weights, scales, group, encoding, offsets if zeros else None)
    assert packed.shape == (32, layout.rows, layout.row_bytes)
    assert [port.tobytes() for port in packed] == expected


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 700),
    group=st.sampled_from([32, 64, 128]),
    zeros=st.booleans(),
    encoding=st.sampled_from(["twos", "signmag"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_packs_as_the_formulas_say_and_unpacks_to_itself(
    n: int, k: int, group: int, zeros: bool, encoding: str, seed: int
) -> None:
    weights, scales, offsets = draw(seed, n, k, group, -8 if encoding == "twos" else -7)
    layout = MatrixLayout(n, k, group, zeros)
    packed = pack_int4(words_of(weights), scales, offsets if zeros else None, layout, encoding)
    expected = naive_board.ports_of(weights, scales, group, encoding, offsets if zeros else None)
    assert [port.tobytes() for port in packed] == expected
    codes, back, back_offsets = unpack_int4(packed, layout, encoding)
    assert np.array_equal(codes[:n], weights)
    assert np.array_equal(back[:n].view(np.uint16), scales.view(np.uint16))
    assert (back_offsets is None) == (not zeros)
    if back_offsets is not None:
        assert np.array_equal(back_offsets[:n].view(np.uint16), offsets.view(np.uint16))
    assert not codes[n:].any() and not back[n:].any()  # rows of padding


def test_a_transposed_view_of_words_gives_the_same_bytes() -> None:
    weights, scales, _ = draw(5, 100, 1024, 128)
    words, layout = words_of(weights), MatrixLayout(100, 1024, 128)
    gptq = np.ascontiguousarray(words.T)  # as GPTQ stores them
    assert np.array_equal(
        pack_int4(gptq.T, scales, None, layout, "twos"), pack_int4(words, scales, None, layout, "twos")
    )


@pytest.mark.parametrize("rows", [64, 40, 33])
def test_memory_that_is_used_again_leaves_no_trace(rows: int) -> None:
    weights, scales, offsets = draw(10, 64, 300, 32)
    layout = MatrixLayout(64, 300, 32, zeros=True)
    used = pack_int4(words_of(weights), scales, offsets, layout, "twos")
    weights, scales, offsets = (array[:rows] for array in draw(11, 64, 300, 32))
    again = pack_int4(words_of(weights), scales, offsets, layout, "twos", used)
    assert [port.tobytes() for port in again] == naive_board.ports_of(weights, scales, 32, "twos", offsets)


def test_blocks_of_rows_are_parts_of_the_whole() -> None:
    weights, scales, _ = draw(6, 100, 300, 32)
    words, layout = words_of(weights), MatrixLayout(100, 300, 32)
    whole = pack_int4(words, scales, None, layout, "twos")
    parts = [pack_int4(words[i : i + 64], scales[i : i + 64], None, layout, "twos") for i in (0, 64)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 130), (64, 128), (40, 700)])
def test_fp16_rows_are_dealt_out_to_the_ports(n: int, k: int) -> None:
    values = np.random.default_rng(n).normal(0, 1, (n, k)).astype(np.float16)
    layout = MatrixLayout(n, k, 0)
    packed = pack_fp16(values, layout)
    assert [port.tobytes() for port in packed] == naive_board.half_ports(values)
    assert np.array_equal(unpack_fp16(packed, layout)[:n], values)


def test_stray_bits_behind_the_last_code_do_not_reach_the_image() -> None:
    weights, scales, _ = draw(7, 32, 13, 32)
    words = words_of(weights)
    words[:, -1] |= np.uint32(0xFFF00000)  # three nibbles beyond k
    packed = pack_int4(words, scales, None, MatrixLayout(32, 13, 32), "twos")
    assert [port.tobytes() for port in packed] == naive_board.ports_of(weights, scales, 32)


def test_signmag_counts_what_it_cannot_hold_and_never_stores_zero_for_it() -> None:
    weights, scales, _ = draw(8, 64, 70, 32, -7)
    weights[3, 5] = weights[63, 69] = -8
    assert count_unrepresentable(words_of(weights), 70) == 2
    with pytest.raises(ValueError, match="2 weights are -8"):
        pack_int4(words_of(weights), scales, None, MatrixLayout(64, 70, 32), "signmag")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoding": "gray"}, "encoding"),
        ({"offsets": np.zeros((4, 2), np.float16)}, "offsets"),
        ({"scales": np.zeros((4, 3), np.float16)}, "do not fit"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict, words: str) -> None:
    weights, scales, _ = draw(9, 4, 64, 32)
    given = {"words": words_of(weights), "scales": scales, "offsets": None, "encoding": "twos"} | change
    with pytest.raises(ValueError, match=words):
        pack_int4(layout=MatrixLayout(4, 64, 32), **given)


@pytest.mark.parametrize("n", [1, 32, 70])
def test_bias_words_hold_one_and_the_bias(n: int) -> None:
    bias = np.random.default_rng(n).normal(0, 1, n).astype(np.float16)
    layout = MatrixLayout(n, 64, 32)
    assert bias_words(bias, layout).tobytes() == naive_board.bias_file(bias, n)
    assert bias_words(None, layout).tobytes() == naive_board.bias_file(None, n)


def test_effective_bits_of_a_weight() -> None:
    for group, zeros, bits in [(128, False, 4.125), (64, False, 4.25), (32, False, 4.5), (128, True, 4.25)]:
        layout = MatrixLayout(4096, 16 * group * 8, group, zeros)
        assert 8 * layout.read_bytes / (layout.n * layout.k) == bits
