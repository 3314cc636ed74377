import numpy as np
import pytest

from edgetool.checkpoints.float16 import SHRINK, can_shrink, round_shrunk


def rounded(values):
    out = np.empty(values.shape, dtype=np.float16)
    round_shrunk(values * SHRINK, out, np.empty(values.shape, dtype=np.uint32))
    return out


def test_every_normal_value_every_tie_and_their_neighbours_round_as_numpy_rounds_them():
    halves = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all normal, positive
    ties = (halves[:-1] + halves[1:]) / 2  # exact: one more bit than a half has
    ties = np.append(ties, np.float32(65520.0 - 2**-7))  # the last float32 that does not round to infinity
    values = np.concatenate([halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(65519))])
    values = np.concatenate([values, -values, np.float32([0.0, -0.0])])
    assert np.array_equal(rounded(values).view(np.uint16), values.astype(np.float16).view(np.uint16))
    truncated = (values.view(np.uint32) >> 13 << 13).view(np.float32).astype(np.float16)
    assert not np.array_equal(rounded(values), truncated)  # the values do tell rounding from cutting off


@pytest.mark.parametrize(
    ("scales", "factor", "allowed"),
    [
        ([0.01, -0.02, 0.0], 15, True),
        ([2.0**-14], 15, True),
        ([2.0**-14, -(2.0**-15)], 15, False),  # subnormal in float16
        ([4367.9], 15, True),
        ([4368.0], 15, False),  # 65520: infinite in float16
        ([0.0, -0.0], 255, True),
        ([1e-30, 0.5], 15, False),
    ],
)
def test_products_that_float16_cannot_hold_as_normal_numbers_are_not_taken_this_way(scales, factor, allowed):
    assert can_shrink(np.float32(scales), factor) is allowed
