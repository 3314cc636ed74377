"""Linears made to fit another format: every weight bit-equal, or a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import Spec
from edgetool.converter.fit import Refused, fit, needs_codes
from tests.fakes.packed_checkpoints import bfloat16

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
ASYM = Spec(4, 32, sym=False)
SYM = Spec(4, 32, sym=True)


def linear(seed: int = 0, shape: tuple[int, int] = (16, 64), lowest: int = 1, highest: int = 15, **changes: Any) -> Any:
    """Codes lie in lowest..highest, zeros in the same range."""
    rng = np.random.default_rng(seed)
    groups = shape[1] // 32
    made = QuantizedLinear(
        codes=rng.integers(lowest, highest + 1, shape).astype(np.uint8),
        scales=rng.normal(0, 0.01, (shape[0], groups)).astype(np.float16),
        zeros=rng.integers(lowest, highest + 1, (shape[0], groups)).astype(np.uint8),
        g_idx=None,
        bits=4,
        group_size=32,
    )
    return replace(made, **changes)


def weights(given: QuantizedLinear) -> np.ndarray:
    """By the definition, channel by channel."""
    index = given.g_idx if given.g_idx is not None else np.arange(given.in_features) // given.group_size
    columns = [
        given.scales[:, g].astype(np.float32)
        * np.float32(given.codes[:, i].astype(int) - given.zeros[:, g].astype(int))
        for i, g in enumerate(index)
    ]
    return np.stack(columns, axis=1)


def reason(given: QuantizedLinear, target: str, spec: Spec) -> str:
    with pytest.raises(Refused) as refused:
        fit(given, target, spec)
    return refused.value.reason


@pytest.mark.parametrize("target", FORMATS)
def test_what_fits_is_handed_back_as_it_is(target: str) -> None:
    given = linear()
    fitted = fit(given, target, ASYM)
    for part in ("codes", "scales", "zeros"):
        assert getattr(fitted, part) is getattr(given, part)


def test_a_zero_of_0_moves_up_with_its_codes_for_version_1_only() -> None:
    given = linear(lowest=0, highest=14)
    given.zeros[3, 1] = 0
    fitted = fit(given, "gptq", ASYM)
    assert fitted.zeros.min() == 1
    assert np.array_equal(weights(fitted), weights(given))
    moved = given.zeros == 0
    assert np.array_equal(fitted.zeros != given.zeros, moved)
    assert np.array_equal(fitted.codes != given.codes, np.repeat(moved, 32, axis=1))
    for target in ("gptq_v2", "awq", "compressed-tensors"):
        assert fit(given, target, ASYM).zeros is given.zeros


def test_a_zero_of_0_with_a_code_at_the_top_is_refused_with_what_helps() -> None:
    given = linear(lowest=0)
    given.zeros[:] = 5
    given.zeros[3, 1] = 0
    given.codes[3, 40] = 15
    with pytest.raises(Refused) as refused:
        fit(given, "gptq", ASYM)
    assert refused.value.reason == "1 of 32 groups use codes that leave 0..15 when their zero is moved to 1"
    assert "gptq_v2" in str(refused.value.hint)


@pytest.mark.parametrize("target", FORMATS)
def test_sym_moves_every_zero_to_the_middle_where_codes_have_room(target: str) -> None:
    given = linear(lowest=6, highest=9)
    given.codes[:] = np.clip(given.codes, 6, 9)
    fitted = fit(given, target, SYM)
    assert (fitted.zeros == 8).all()
    assert np.array_equal(weights(fitted).view(np.uint32), weights(given).view(np.uint32))


def test_sym_is_refused_where_one_group_has_no_room() -> None:
    given = linear(lowest=6, highest=9)
    given.zeros[2, 0], given.codes[2, 31] = 0, 9
    given.codes[2, :31] = 3
    assert (
        reason(given, "awq", SYM)
        == "1 of 32 groups use codes that leave 0..15 when their zero is moved to the middle, 8"
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 3),
    scattered=st.booleans(),
    sym=st.booleans(),
)
def test_shifting_keeps_all_weights_or_is_refused_for_a_group_that_has_no_room(
    seed: int, bits: int, groups: int, scattered: bool, sym: bool
) -> None:
    rng = np.random.default_rng(seed)
    top, middle, width = (1 << bits) - 1, 1 << (bits - 1), 32 * groups
    index = np.arange(width) // 32
    index = rng.permutation(index) if scattered else index
    zeros = rng.integers(0, top + 1, (32, groups)).astype(np.uint8)
    around = rng.integers(0, max(1, top // 2) + 1)
    codes = np.clip(zeros[:, index] + rng.integers(-around, around + 1, (32, width)), 0, top).astype(np.uint8)
    scales = rng.normal(0, 0.1, zeros.shape).astype(np.float16)
    given = QuantizedLinear(codes, scales, zeros, index.astype(np.int32) if scattered else None, bits, 32)
    spec = Spec(bits, 32, sym=sym, desc_act=scattered)
    room = True
    for row in range(32):
        for group in range(groups):
            zero = int(zeros[row, group])
            shift = middle - zero if sym else int(zero == 0)
            members = codes[row, index == group].astype(int) + shift
            room = room and (shift == 0 or (members.min() >= 0 and members.max() <= top))
    if not room:
        assert "groups use codes that leave" in reason(given, "gptq", spec)
        return
    fitted = fit(given, "gptq", spec)
    assert np.array_equal(weights(fitted).view(np.uint32), weights(given).view(np.uint32))
    assert (fitted.zeros == middle).all() if sym else (fitted.zeros >= 1).all()
    fitted.validate()


def test_a_group_without_channels_moves_freely() -> None:
    index = np.zeros(64, dtype=np.int32)
    index[:32] = 2
    given = linear(shape=(8, 96), lowest=6, highest=9)
    given = replace(given, g_idx=np.r_[index, np.full(32, 2, dtype=np.int32)])
    given.zeros[:, 1] = 15
    fitted = fit(given, "gptq", replace(SYM, desc_act=True))
    assert (fitted.zeros == 8).all()
    assert np.array_equal(weights(fitted), weights(given))


def test_groups_that_only_have_other_numbers_lose_their_g_idx_where_the_target_has_none() -> None:
    index = np.repeat([1, 2, 0], 32).astype(np.int32)
    given = linear(shape=(16, 96), g_idx=index)
    for target in ("awq", "compressed-tensors"):
        fitted = fit(given, target, ASYM)
        assert fitted.g_idx is None
        assert np.array_equal(weights(fitted), weights(given))
    assert fit(given, "gptq", replace(ASYM, desc_act=True)).g_idx is index


def test_activation_order_has_no_awq_form() -> None:
    index = np.random.default_rng(1).permutation(np.arange(64) // 32).astype(np.int32)
    with pytest.raises(Refused) as refused:
        fit(linear(g_idx=index), "awq", ASYM)
    assert "awq has no g_idx" in refused.value.reason
    assert "--fold-act-order" in str(refused.value.hint)


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "awq"])
def test_float32_scales_are_narrowed_to_the_first_dtype_that_has_them_all(target: str) -> None:
    half = linear(scales=linear().scales.astype(np.float32), scale_dtype="F32")
    assert fit(half, target, ASYM).scale_dtype == "F16"
    far = (half.scales * 0 + np.float32(2**-30)).astype(np.float32)
    assert fit(replace(half, scales=far), target, ASYM).scale_dtype == "BF16"
    third = np.full_like(far, 1 / 3)
    words = reason(replace(half, scales=third), target, ASYM)
    assert "32 of 32 F32 scales are not exact in F16" in words and "BF16" in words
    assert fit(replace(half, scales=third), "compressed-tensors", ASYM).scale_dtype == "F32"


def test_bfloat16_scales_stay_where_16_bits_are_all_that_is_asked() -> None:
    wide = (bfloat16(linear().scales.astype(np.float32)).astype(np.uint32) << 16).view(np.float32)
    given = linear(scales=wide, scale_dtype="BF16")
    for target in FORMATS:
        assert fit(given, target, ASYM).scale_dtype == "BF16"


def test_another_width_or_group_size_than_the_checkpoints_is_refused() -> None:
    assert reason(linear(), "gptq", replace(ASYM, bits=8)) == "it has 4 bits, most linears have 8"
    assert reason(linear(), "gptq", replace(ASYM, group_size=64)) == "it has groups of 32, most linears have 64"
    whole = linear(shape=(16, 32))
    assert fit(whole, "gptq", replace(ASYM, group_size=-1)).group_size == 32
    assert fit(whole, "gptq", replace(ASYM, group_size=128)).group_size == 32


def test_the_formats_own_reason_is_passed_on() -> None:
    assert "out_features 12 is not a multiple of 8" in reason(linear(shape=(12, 64)), "awq", ASYM)
    eight = replace(linear(), bits=8)
    assert "4-bit codes only" in reason(eight, "awq", replace(ASYM, bits=8))


def test_codes_are_asked_for_only_where_they_have_to_move() -> None:
    given = linear()
    assert not any(needs_codes(given, target, ASYM) for target in FORMATS)
    assert all(needs_codes(given, target, SYM) for target in FORMATS)
    given.zeros[0, 0] = 0
    assert [target for target in FORMATS if needs_codes(given, target, ASYM)] == ["gptq"]
    given.zeros[:] = 8
    assert not any(needs_codes(given, target, SYM) for target in FORMATS)
