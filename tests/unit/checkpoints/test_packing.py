import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.checkpoints.packing import pack_rows, unpack_rows, words_per_row


def packed_by_hand(row, bits):
    """The row as one little-endian number, code k at bit k * bits, cut into 32-bit words."""
    number = sum(int(code) << (bits * k) for k, code in enumerate(row))
    count = (len(row) * bits + 31) // 32
    return [(number >> (32 * k)) & 0xFFFFFFFF for k in range(count)]


matrices = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 150), st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=150)
@given(matrices, st.booleans())
def test_words_are_the_rows_bit_stream_and_unpack_to_the_codes(matrix, transposed):
    bits, rows, count, seed = matrix
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    given_codes = np.ascontiguousarray(codes.T).T if transposed else codes
    words = pack_rows(given_codes, bits)
    assert words.dtype == np.int32
    assert [[int(word) & 0xFFFFFFFF for word in row] for row in words] == [packed_by_hand(row, bits) for row in codes]
    given_words = np.ascontiguousarray(words.T).T if transposed else words
    assert np.array_equal(unpack_rows(given_words, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_blocks_into_a_transposed_output_equal_row_by_row(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (700, 416), dtype=np.uint8)
    out = np.empty((words_per_row(416, bits), 700), dtype=np.int32)
    pack_rows(codes, bits, out=out.T)
    assert np.array_equal(out.T, np.concatenate([pack_rows(row[None], bits) for row in codes]))
    back = np.empty((416, 700), dtype=np.uint8)
    unpack_rows(out.T, bits, 416, out=back.T)
    assert np.array_equal(back.T, codes)


def test_three_bits_follow_autogptqs_words():
    # Codes 10 and 21 cross words: bits 30, 31 | 0 and 31 | 0, 1.
    for position, words in ((10, (0xC0000000, 0x1, 0)), (21, (0, 0x80000000, 0x3)), (22, (0, 0, 0x1C))):
        codes = np.zeros((1, 32), dtype=np.uint8)
        codes[0, position] = 7
        assert tuple(pack_rows(codes, 3).view(np.uint32)[0].tolist()) == words


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused_not_spilled(bits):
    codes = np.zeros((3, 40), dtype=np.uint8)
    codes[2, 39] = 1 << bits
    with pytest.raises(ValueError, match=f"does not fit {bits} bits"):
        pack_rows(codes, bits)


def test_a_wrong_number_of_words_or_a_wrong_output_is_refused():
    with pytest.raises(ValueError, match="5 words a row"):
        unpack_rows(np.zeros((2, 5), np.int32), 4, 48)
    with pytest.raises(ValueError, match="must be int32"):
        pack_rows(np.zeros((2, 48), np.uint8), 4, out=np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match="must be uint8"):
        unpack_rows(np.zeros((2, 6), np.int32), 4, 48, out=np.zeros((2, 48), np.int8))


def test_packing_is_not_done_a_code_at_a_time():
    # 16 million codes; a Python loop would need tens of seconds, the present code 0.05 s. Generous for a busy machine.
    codes = np.zeros((4096, 4096), dtype=np.uint8)
    start = time.process_time()
    unpack_rows(pack_rows(codes, 4), 4, 4096)
    assert time.process_time() - start < 2.0
