"""Rounding to nearest in symmetric groups, against every other choice of code."""

from __future__ import annotations

import numpy as np
import pytest

from edgetool.checkpoints.rounding import round_symmetric
from edgetool.errors import BadInput


@pytest.mark.parametrize("lowest", [-8, -7])
@pytest.mark.parametrize(("rows", "width", "group"), [(3, 64, 32), (5, 200, 64), (1, 1, 128), (4, 130, 128)])
def test_no_other_code_is_nearer(rows: int, width: int, group: int, lowest: int) -> None:
    weights = np.random.default_rng(width).normal(0, 0.1, (rows, width)).astype(np.float32)
    codes, scales = round_symmetric(weights, group, lowest)
    assert codes.dtype == np.uint8 and scales.dtype == np.float16
    assert scales.shape == (rows, -(-width // group))
    assert codes.min() >= 8 + lowest and codes.max() <= 15
    wide = np.repeat(scales.astype(np.float64), group, axis=1)[:, :width]
    every = np.arange(lowest, 8)[:, None, None] * wide
    best = np.abs(every - weights).min(axis=0)
    got = np.abs((codes.astype(np.float64) - 8) * wide - weights)
    # rounding is done on the float32 quotient, whose last bit may tip a tie
    np.testing.assert_allclose(got, best, rtol=1e-5, atol=1e-9)


def test_the_largest_weight_of_a_group_gets_the_lowest_code() -> None:
    weights = np.zeros((1, 64), dtype=np.float32)
    weights[0, 5], weights[0, 40] = 0.8, -0.8
    codes, scales = round_symmetric(weights, 32)
    assert codes[0, 5] == codes[0, 40] == 0
    assert scales[0].tolist() == [np.float16(-0.1), np.float16(0.1)]


def test_a_group_of_zeros_stays_zero() -> None:
    codes, scales = round_symmetric(np.zeros((2, 40), dtype=np.float32), 32)
    assert np.all(codes == 8) and np.all(scales == 0)


def test_a_scale_beyond_fp16_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"beyond float16 \(lm_head\)"):
        round_symmetric(np.full((1, 32), 1e6, dtype=np.float32), 32, name="lm_head")
