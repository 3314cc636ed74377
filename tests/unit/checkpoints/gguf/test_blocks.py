"""GGUF blocks: bytes written by hand from ggml's structures, and the gguf package's own quantisation as oracle."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.gguf.blocks import BLOCK_BYTES, inexact_minima, kind_for, read, refusal, write
from edgetool.errors import BadInput

Kind = gguf.GGMLQuantizationType
RNG = np.random.default_rng(5)


def _theirs(kind: str, stored: np.ndarray) -> np.ndarray:
    return gguf.dequantize(stored, Kind[kind])


def _same_bits(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


def _linear(
    bits: int = 4,
    group_size: int = 32,
    *,
    shape: tuple[int, int] = (6, 256),
    sym: bool = True,
    scales: np.ndarray | None = None,
    seed: int = 0,
    **changes: object,
) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    groups = -(-shape[1] // group_size)
    zeros = np.full((shape[0], groups), 1 << (bits - 1), dtype=np.uint8)
    if not sym:
        zeros = rng.integers(0, 1 << bits, zeros.shape, dtype=np.uint8)
    fields: dict[str, object] = {
        "codes": rng.integers(0, 1 << bits, shape, dtype=np.uint8),
        "scales": rng.normal(0, 0.01, zeros.shape).astype(np.float16) if scales is None else scales,
        "zeros": zeros,
        "g_idx": None,
        "bits": bits,
        "group_size": group_size,
    }
    return QuantizedLinear(**(fields | changes))  # type: ignore[arg-type]


def test_q4_0_by_hand() -> None:
    # value j in the low nibble of byte j, value j + 16 in the high one; d = 0.5
    block = struct.pack("<e16B", 0.5, *(low | (15 - low) << 4 for low in range(16)))
    linear = read("Q4_0", np.frombuffer(block, np.uint8).reshape(1, -1))
    assert linear.codes.tolist() == [[*range(16), *range(15, -1, -1)]]
    assert (linear.scales.tolist(), linear.zeros.tolist(), linear.bits, linear.group_size) == ([[0.5]], [[8]], 4, 32)
    assert linear.dequantize()[0, :3].tolist() == [-4.0, -3.5, -3.0]
    assert write("Q4_0", linear).tobytes() == block


def test_q4_1_by_hand() -> None:
    block = struct.pack("<ee16B", 0.25, -0.75, *(j | j << 4 for j in range(16)))
    linear = read("Q4_1", np.frombuffer(block, np.uint8).reshape(1, -1))
    assert linear.codes.tolist() == [[*range(16), *range(16)]]
    assert (linear.scales.tolist(), linear.zeros.tolist()) == ([[0.25]], [[3]])
    assert linear.dequantize()[0, :4].tolist() == [-0.75, -0.5, -0.25, 0.0]
    assert write("Q4_1", linear).tobytes() == block


def test_q5_0_by_hand() -> None:
    # differences -15 .. 15 and once more -15, as q = difference + 16, whose bit 4 lies in qh
    zeros = np.array([[15]], dtype=np.uint8)
    codes = np.array([[0] * 16 + list(range(16))], dtype=np.uint8)
    linear = _linear(shape=(1, 32), codes=codes, zeros=zeros, scales=np.array([[2.0]], np.float16))
    quants = [1] * 16 + list(range(1, 17))
    high = sum((q >> 4) << i for i, q in enumerate(quants))
    packed = (quants[j] & 15 | (quants[j + 16] & 15) << 4 for j in range(16))
    assert write("Q5_0", linear).tobytes() == struct.pack("<eI16B", 2.0, high, *packed)


def test_q8_0_by_hand() -> None:
    block = struct.pack("<e32b", -0.5, *range(-128, -96))
    linear = read("Q8_0", np.frombuffer(block, np.uint8).reshape(1, -1))
    assert linear.codes.tolist() == [list(range(32))]
    assert (linear.zeros.tolist(), linear.bits) == ([[128]], 8)
    assert linear.dequantize()[0, :2].tolist() == [64.0, 63.5]
    assert write("Q8_0", linear).tobytes() == block


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_what_the_gguf_package_quantised_has_the_values_it_gives_it_and_comes_back(kind: str) -> None:
    weights = RNG.normal(0, 0.02, (24, 320)).astype(np.float32)
    weights[3] = 0  # blocks of scale 0
    stored = gguf.quantize(weights, Kind[kind])
    linear = read(kind, stored)
    _same_bits(linear.dequantize(), _theirs(kind, stored))
    assert linear.sym
    assert kind_for(linear) == kind
    np.testing.assert_array_equal(write(kind, linear), stored)


@given(st.binary(min_size=34 * 4, max_size=34 * 4), st.sampled_from(["Q4_0", "Q8_0"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_with_finite_scales_are_read_as_the_gguf_package_reads_them(data: bytes, kind: str) -> None:
    size = BLOCK_BYTES[kind]
    stored = np.frombuffer(data[: 4 * size], np.uint8).reshape(2, -1)
    scales = np.ascontiguousarray(stored.reshape(-1, size)[:, :2]).view(np.float16)
    if np.isfinite(scales).all():
        linear = read(kind, stored)
        _same_bits(linear.dequantize(), _theirs(kind, stored))
        np.testing.assert_array_equal(write(kind, linear), stored)
    else:
        with pytest.raises(BadInput, match="NaN or infinite"):
            read(kind, stored)


@pytest.mark.parametrize(
    ("bits", "sym", "kind"),
    [
        (4, True, "Q4_0"),
        (4, False, "Q5_0"),
        (2, True, "Q4_0"),
        (2, False, "Q4_0"),
        (3, False, "Q4_0"),
        (8, True, "Q8_0"),
    ],
)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_every_width_and_group_is_written_with_the_very_same_values(
    bits: int, sym: bool, kind: str, group_size: int
) -> None:
    linear = _linear(bits, group_size, sym=sym)
    assert kind_for(linear) == kind
    assert refusal(linear) is None
    _same_bits(_theirs(kind, write(kind, linear)), linear.dequantize())


def test_a_short_last_group_keeps_its_scale() -> None:
    linear = _linear(4, 128, shape=(4, 160))
    _same_bits(_theirs("Q4_0", write("Q4_0", linear)), linear.dequantize())


def test_asymmetric_four_bits_take_q4_1_only_where_every_minimum_is_a_float16() -> None:
    scales = (2.0 ** RNG.integers(-9, -5, (6, 8))).astype(np.float16)
    linear = _linear(4, 32, sym=False, scales=scales)
    assert kind_for(linear) == "Q4_1"
    stored = write("Q4_1", linear)
    _same_bits(_theirs("Q4_1", stored), linear.dequantize())
    again = read("Q4_1", stored)
    for field in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(again, field), getattr(linear, field))
    # one scale of eleven significant bits, times 7: 14 bits, which a float16 has not
    scales[2, 3], linear.zeros[2, 3] = np.float16(1.0 + 2.0**-10), 7
    assert kind_for(linear) == "Q5_0"


def test_a_minimum_that_overflows_float16_is_not_written_as_infinity() -> None:
    linear = _linear(4, 32, sym=False, scales=np.full((6, 8), 32768.0, np.float16))
    assert kind_for(linear) == "Q5_0"
    _same_bits(_theirs("Q5_0", write("Q5_0", linear)), linear.dequantize())


def test_zeros_beside_the_middle_are_symmetric_enough_where_no_code_reaches_the_end() -> None:
    linear = _linear(4, 32)
    np.clip(linear.codes, 2, 13, out=linear.codes)
    linear.zeros[:, ::2] = 7
    assert kind_for(linear) == "Q4_0"
    _same_bits(_theirs("Q4_0", write("Q4_0", linear)), linear.dequantize())
    linear.zeros[-1, -1], linear.codes[-1, -1] = 7, 15  # a difference of 8
    assert kind_for(linear) == "Q5_0"


def test_eight_bits_are_refused_only_where_a_difference_leaves_an_int8() -> None:
    linear = _linear(8, 32, sym=False)
    linear.zeros[:] = 120
    linear.codes[:] = np.clip(linear.codes, 0, 247)
    assert kind_for(linear) == "Q8_0"
    _same_bits(_theirs("Q8_0", write("Q8_0", linear)), linear.dequantize())
    linear.codes[-1, -1] = 248
    assert kind_for(linear) is None
    assert "asymmetric 8 bit" in str(refusal(linear))


REFUSED = {
    "multiple of 32": {"group_size": 48, "shape": (2, 96)},
    "in_features 48": {"group_size": 48, "shape": (2, 48)},
    "g_idx": {"shape": (2, 64), "g_idx": np.array([1] * 32 + [0] * 32, np.int32)},
    "F32 scales": {"shape": (1, 32), "scales": np.array([[0.1]], np.float32), "scale_dtype": "F32"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_block_holds_is_refused_with_the_reason(reason: str) -> None:
    linear = _linear(**REFUSED[reason])  # type: ignore[arg-type]
    assert kind_for(linear) is None
    assert reason in str(refusal(linear))


def test_float32_scales_that_are_float16_values_are_no_obstacle() -> None:
    half = _linear()
    wide = _linear(scales=half.scales.astype(np.float32), scale_dtype="F32")
    np.testing.assert_array_equal(write("Q4_0", wide), write("Q4_0", half))


def test_minima_beside_the_grid_are_counted_and_refused() -> None:
    good = struct.pack("<ee16B", 0.25, -0.75, *range(16))
    cases = {
        "between two codes": (0.25, -0.7),
        "above zero": (0.25, 0.25),
        "beyond fifteen": (0.25, -4.0),
        "no scale": (0.0, -0.75),
        "negative scale": (-0.25, 0.75),
        "negative nothing": (-0.0, 0.0),
        "not a number": (0.25, float("nan")),
        "infinite": (float("inf"), float("-inf")),
    }
    bad = [struct.pack("<ee16B", d, m, *range(16)) for d, m in cases.values()]
    stored = np.frombuffer(good + b"".join(bad), np.uint8).reshape(1, -1)
    assert inexact_minima(stored) == len(cases)
    with pytest.raises(BadInput, match=r"8 of 9 minima are no multiple of their scale \(x\.y\)"):
        read("Q4_1", stored, "x.y")


def test_a_block_of_zeros_holds_positive_zeros_whatever_its_codes() -> None:
    stored = np.frombuffer(struct.pack("<ee16B", 0.0, 0.0, *range(16)), np.uint8).reshape(1, -1)
    linear = read("Q4_1", stored)
    _same_bits(linear.dequantize(), np.zeros((1, 32), np.float32))
    _same_bits(linear.dequantize(), _theirs("Q4_1", stored))
    assert write("Q4_1", linear).tobytes() == stored.tobytes()


@pytest.mark.parametrize(("scale", "zero"), [(-0.5, 3), (0.0, 3), (-0.0, 0)])
def test_q4_1_is_not_taken_where_it_would_change_the_sign_of_a_zero(scale: float, zero: int) -> None:
    linear = _linear(4, 32, sym=False, scales=np.full((6, 8), 0.5, np.float16))
    assert kind_for(linear) == "Q4_1"
    linear.scales[1, 1], linear.zeros[1, 1] = scale, zero
    linear.codes[1, 32:64] = np.arange(32) // 2
    assert kind_for(linear) == "Q5_0"
    _same_bits(_theirs("Q5_0", write("Q5_0", linear)), linear.dequantize())


def test_writing_into_a_type_that_is_too_narrow_is_an_error_and_no_overflow() -> None:
    with pytest.raises(ValueError, match=r"holds -8\.\.7"):
        write("Q4_0", _linear(4, 32, sym=False))
