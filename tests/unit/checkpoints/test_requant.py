import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from edgetool.checkpoints.requant import RoundingError, error_report, requantize
from edgetool.checkpoints.scale_storage import with_scale_dtype
from edgetool.errors import BadInput
from tests.parity.test_layouts import random_linear

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def to_scale(value, dtype):
    """A scale as the format stores it: rounded, at least 2**-14, signs kept."""
    one = np.float32(abs(value))
    stored = np.float32(np.float16(one)) if dtype == "F16" else bfloat16_to_float32(float32_to_bfloat16(one))
    return math.copysign(max(float(stored), 2.0**-14), value)


def naive_error(group, bits, scale, zero):
    """Squared error of rounding to nearest, in float64, a weight at a time."""
    total = 0.0
    for value in group:
        code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
        total += (value - scale * (code - zero)) ** 2
    return total


def naive_best(group, bits, sym, lowest_zero, dtype):
    """Smallest squared error over the clipped ranges, without refitting."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = float(min(group)), float(max(group))
    errors = []
    for factor in FACTORS:
        if sym:
            extreme = low if -low >= high else high
            for scale in (2 * factor * max(-low, high) / top, -factor * extreme / middle):
                errors.append(naive_error(group, bits, to_scale(scale, dtype), middle))
        else:
            bottom, upper = min(low, 0.0) * factor, max(high, 0.0) * factor
            scale = to_scale((upper - bottom) / top, dtype)
            errors.append(naive_error(group, bits, scale, min(max(round(-bottom / scale), lowest_zero), top)))
    return min(errors)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize(("sym", "lowest_zero"), [(True, 0), (False, 0), (False, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_group_is_at_least_as_good_as_the_best_of_a_naive_search(bits, sym, lowest_zero, dtype):
    rng = np.random.default_rng(bits)
    weight = (rng.standard_t(4, (6, 64)) * 0.02).astype(np.float32)
    weight[1] = np.abs(weight[1])  # one-sided groups
    weight[2] -= 0.1
    made = requantize(weight, bits=bits, group_size=16, sym=sym, lowest_zero=lowest_zero, scale_dtype=dtype)
    linear = made.linear
    assert linear.sym or not sym
    assert int(linear.zeros.min()) >= lowest_zero
    for row in range(6):
        for group in range(4):
            values = weight[row, 16 * group : 16 * group + 16]
            scale, zero = float(linear.scales[row, group]), int(linear.zeros[row, group])
            ours = naive_error(values.tolist(), bits, scale, zero)
            # float32 decides between candidates that differ by less than its own rounding
            assert ours <= naive_best(values.tolist(), bits, sym, lowest_zero, dtype) * (1 + 1e-5)
            # the codes are the nearest for that grid
            dequantized = linear.dequantize()[row, 16 * group : 16 * group + 16].astype(np.float64)
            assert np.square(values.astype(np.float64) - dequantized).sum() <= ours * (1 + 1e-5) + 1e-15


def test_the_search_is_better_than_spanning_the_range():
    weight = (np.random.default_rng(0).standard_t(4, (32, 128)) * 0.02).astype(np.float32)
    for sym in (True, False):
        made = requantize(weight, bits=4, group_size=128, sym=sym)
        low, high = weight.min(axis=1, keepdims=True), weight.max(axis=1, keepdims=True)
        scale = 2 * np.maximum(-low, high) / 15 if sym else (high - low) / 15
        zero = 8 if sym else np.rint(-low / scale)
        spanned = (np.clip(np.rint(weight / scale) + zero, 0, 15) - zero) * scale
        assert made.error.rms < 0.97 * np.sqrt(np.mean((spanned - weight) ** 2))


def is_kept(weight, **target):
    made = requantize(weight, **target)
    assert (made.error.max == 0) == np.array_equal(made.linear.dequantize(), weight)
    return made.error.max == 0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_that_are_on_a_grid_already_stay_exactly(bits, sym, dtype):
    linear = with_scale_dtype(random_linear(bits, 40, 192, bits, 64, sym), dtype, rounding=True)
    linear.scales[0] = 2.0**-20 if dtype == "F16" else 2.0**-100  # also scales that the search would not choose
    linear.scales[1] = 0
    weight = linear.dequantize()
    assert is_kept(weight, bits=bits, group_size=64, sym=sym, scale_dtype=dtype)
    assert is_kept(weight, bits=bits, group_size=32, sym=sym, scale_dtype=dtype)
    again = requantize(weight, bits=bits, group_size=64, sym=sym, scale_dtype=dtype).linear
    assert is_kept(again.dequantize(), bits=bits, group_size=64, sym=sym, scale_dtype=dtype)


def test_asymmetric_groups_that_fit_a_symmetric_grid_are_kept_and_the_others_counted():
    linear = random_linear(5, 16, 128, 4, 64, sym=False)
    linear.zeros[:] = 5
    linear.codes[:] = np.clip(linear.codes, 0, 12)  # levels -5 .. 7
    assert is_kept(linear.dequantize(), bits=4, group_size=64, sym=True)
    linear.codes[3, 70] = 15  # level 10: beyond the symmetric grid
    linear.codes[3, 71] = 0
    weight = linear.dequantize()
    made = requantize(weight, bits=4, group_size=64, sym=True)
    changed = np.argwhere(made.linear.dequantize() != weight)
    assert len(changed) and (changed[:, 0] == 3).all() and (changed[:, 1] >= 64).all()
    assert is_kept(weight, bits=8, group_size=64, sym=True)


def test_zeros_of_0_get_the_other_sign_where_the_format_has_no_zero_of_0():
    linear = replace(random_linear(6, 8, 64, 4, 32, sym=False), zeros=np.zeros((8, 2), np.uint8))
    linear.codes[:, ::32] = 15
    linear.codes[:, 1::32] = 0
    made = requantize(linear.dequantize(), bits=4, group_size=32, sym=False, lowest_zero=1)
    assert made.error.max == 0
    assert (made.linear.zeros == 15).all()


@pytest.mark.parametrize("size", [32, 16])
def test_scales_that_the_format_does_not_have_are_rounded_where_that_is_best(size):
    linear = with_scale_dtype(random_linear(7, 8, 64, 4, 32, sym=False), "F32")
    linear.scales[:] *= np.float32(1 + 2.0**-12)
    weight = linear.dequantize()
    made = requantize(weight, bits=4, group_size=size, sym=False, origin=linear)
    rounded = with_scale_dtype(linear, "F16", rounding=True)
    assert 0 < made.error.rms <= np.sqrt(np.mean((rounded.dequantize() - weight) ** 2)) * (1 + 1e-5)
    assert made.error.relative < 2.0**-11  # half a step of eleven bits


def test_an_origin_in_other_groups_gives_no_hint_and_no_error():
    linear = random_linear(7, 8, 64, 4, 32, sym=False, scattered=True)
    weight = linear.dequantize()
    plain = requantize(weight, bits=4, group_size=32, sym=False)
    assert requantize(weight, bits=4, group_size=32, sym=False, origin=linear).crc32 == plain.crc32
    straight = replace(linear, g_idx=None)
    plain = requantize(straight.dequantize(), bits=4, group_size=64, sym=False)
    assert requantize(straight.dequantize(), bits=4, group_size=64, sym=False, origin=straight).crc32 == plain.crc32


def test_common_divisors_that_are_multiples_of_the_scale_are_divided_until_the_format_holds_them():
    scale = np.float32(2047 * 2.0**-20)  # eleven bits; nine times that has more
    levels = np.float32([9, -9, 0, 9] * 8)
    assert np.float32(np.float16(9 * scale)) != 9 * scale
    assert is_kept((levels * scale)[None], bits=8, group_size=32, sym=False)
    assert not is_kept((levels * scale)[None], bits=4, group_size=32, sym=False)  # -9 .. 9 are more than 16 levels
    assert is_kept((np.float32([9, 0, 0, 9] * 8) * scale)[None], bits=4, group_size=32, sym=False)


def test_errors_and_checksum_are_those_of_the_weights_that_come_out():
    weight = np.random.default_rng(8).normal(0, 0.02, (700, 256)).astype(np.float32)  # several blocks
    weight[5, :32] = 0
    made = requantize(weight, bits=4, group_size=32, sym=False)
    values = made.linear.dequantize()
    difference = values.astype(np.float64) - weight
    assert made.crc32 == zlib.crc32(values.tobytes())
    # differences are taken in float32, whose rounding is some 1e-8 of the weights
    assert made.error.max == pytest.approx(np.abs(difference).max(), rel=1e-5)
    assert made.error.rms == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-5)
    assert made.error.relative == pytest.approx(
        np.sqrt(np.mean(difference**2) / np.mean(weight.astype(np.float64) ** 2)), rel=1e-5
    )
    assert not values[5, :32].any()
    assert made.linear.group_size == 32 and made.linear.n_groups == 8


def test_the_report_names_the_worst_five_and_adds_up_squares_not_means():
    errors = {f"m{k}": RoundingError(100 * (k + 1), k / 10, float(k), 50.0) for k in range(7)}
    report = error_report(errors)
    assert [entry["module"] for entry in report["worst"]] == ["m6", "m5", "m4", "m3", "m2"]
    assert report["worst"][0] == {"module": "m6", "max": 0.6, "rms": math.sqrt(6 / 700), "relative": math.sqrt(6 / 50)}
    assert (report["modules"], report["modules_changed"], report["max"]) == (7, 6, 0.6)
    assert report["rms"] == pytest.approx(math.sqrt(21 / 2800)) and report["relative"] == pytest.approx(
        math.sqrt(21 / 350)
    )
    assert error_report({})["worst"] == [] and error_report({})["rms"] == 0.0
    exact = error_report({"a": RoundingError(4, 0.0, 0.0, 0.0)})
    assert exact["worst"] == [] and exact["relative"] == 0.0


def test_what_cannot_be_rounded_is_refused_by_name():
    weight = np.ones((4, 96), np.float32)
    with pytest.raises(BadInput, match=r"group_size 64 does not divide in_features 96 \(down_proj\)"):
        requantize(weight, bits=4, group_size=64, sym=True, name="down_proj")
    weight[3, 5], weight[2, 1] = np.nan, np.inf
    with pytest.raises(BadInput, match=r"2 weights are NaN or infinite \(down_proj\)"):
        requantize(weight, bits=4, group_size=-1, sym=True, name="down_proj")


def test_enormous_and_tiny_weights_stay_finite():
    weight = np.float32([[3e38, -3e38] * 16, [1e-30, -2e-30] * 16, [1e-45, 0] * 16])
    for sym in (True, False):
        for dtype in ("F16", "BF16"):
            made = requantize(weight, bits=4, group_size=32, sym=sym, scale_dtype=dtype)
            assert np.isfinite(made.linear.scales).all()
            assert np.isfinite(made.error.max)
