import numpy as np
import pytest
import torch

from edgetool.quantizers.grid import find_grid, fp16_scale, quantize_to_codes

FP16_ULP = 2.0**-11
"""Rounding to nearest fp16 moves a value by at most this share of it."""


def random_groups(groups=5, size=16, rows=7, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, size, rows, generator=generator) + offset


def weighted_error(weights, grid, importance=None):
    """float64 [n_groups, rows], by broadcasting over every code: the nearest of all values of the grid."""
    codes = torch.arange(2**grid.bits, dtype=torch.float64)
    values = (codes - grid.zeros.double()[..., None]) * grid.scales.double()[..., None]  # [groups, rows, codes]
    distance = (weights.double()[..., None] - values[:, None]).abs().amin(-1)
    share = 1.0 if importance is None else importance.double()[:, :, None]
    return (distance.square() * share).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_minmax_spans_each_group_exactly(bits, sym, offset):
    groups = random_groups(offset=offset)
    grid = find_grid(groups, None, bits=bits, sym=sym, search="minmax")
    top = 2**bits - 1
    for group in range(groups.shape[0]):
        for row in range(groups.shape[2]):
            values = groups[group, :, row].double().tolist()
            low, high = min(0.0, *values), max(0.0, *values)
            scale = 2 * max(-low, high) / top if sym else (high - low) / top
            found = float(grid.scales[group, row])
            assert abs(found - scale) <= scale * FP16_ULP * (1 + 1e-3)
            zero = 2 ** (bits - 1) if sym else min(max(round(-low / found), 0), top)
            assert float(grid.zeros[group, row]) == zero


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e5])
def test_scales_are_fp16_values_and_zeros_are_codes(search, sym, magnitude):
    groups = random_groups(offset=0.3) * magnitude
    grid = find_grid(groups, None, bits=4, sym=sym, search=search)
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.isfinite(grid.scales).all() and (grid.scales != 0).all()
    assert torch.equal(grid.zeros, grid.zeros.round())
    assert float(grid.zeros.min()) >= 0 and float(grid.zeros.max()) <= 15
    assert grid.max_code == 15


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_mse_is_nowhere_worse_than_minmax(bits, sym, weighted):
    groups = random_groups(seed=bits, offset=0.2)
    groups[0, 0] *= 20  # an outlier in every row of one group
    importance = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)).square() * 10 if weighted else None
    errors = {}
    for search in ("minmax", "mse"):
        grid = find_grid(groups, importance, bits=bits, sym=sym, search=search)
        errors[search] = weighted_error(groups, grid, importance)
    # candidates are compared in float32, whose sum over 16 channels is exact to about 1e-6
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert errors["mse"].sum() < (0.99 if bits < 8 else 1.0) * errors["minmax"].sum()


@pytest.mark.parametrize("sym", [True, False])
def test_mse_comes_near_an_exhaustive_search_of_scales(sym):
    groups = random_groups(groups=3, size=32, rows=20)
    grid = find_grid(groups, None, bits=4, sym=sym)
    found = weighted_error(groups, grid)
    best = torch.full_like(found, float("inf"))
    spread = (groups.amax(1) - groups.amin(1)).double() if not sym else 2 * groups.abs().amax(1).double()
    for factor in np.linspace(0.4, 1.3, 120):
        for sign in (1, -1) if sym else (1,):
            scale = sign * spread * factor / 15
            zeros = (
                [torch.full_like(scale, 8.0)] if sym else [(-groups.amin(1) / scale).round() + d for d in (-1, 0, 1)]
            )
            for zero in zeros:
                codes = ((groups / scale[:, None]).round() + zero[:, None]).clamp(0, 15)
                error = ((codes - zero[:, None]) * scale[:, None] - groups).square().sum(1)
                best = torch.minimum(best, error)
    # 720 candidates against at most 18: the quick search may lose a few per cent on average, not more
    assert found.sum() < 1.10 * best.sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_grid_turns_its_longer_side_to_the_extreme(sign):
    """Levels -8 .. 7: a group that needs +8 gets it by a negative scale, and is then exact."""
    levels = torch.tensor([8.0, -7, 5, 3, -1, 0, 2, -4]) * sign
    grid = find_grid((levels * 0.125).view(1, 8, 1), None, bits=4, sym=True)
    assert float(grid.scales[0, 0]) == -0.125 * sign
    assert float(weighted_error((levels * 0.125).view(1, 8, 1), grid)) == 0.0


def test_importance_decides_whom_the_grid_serves():
    groups = random_groups(groups=20)
    importance = torch.randn(20, 16, generator=torch.Generator().manual_seed(4)).exp().square()
    even, weighted = (find_grid(groups, share, bits=3, sym=False) for share in (None, importance))
    assert weighted_error(groups, weighted, importance).sum() < 0.97 * weighted_error(groups, even, importance).sum()
    assert weighted_error(groups, even).sum() < 0.97 * weighted_error(groups, weighted).sum()


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_group_of_zeros_stays_zero(search, sym):
    groups = random_groups()
    groups[2] = 0
    groups[3, :, 4] = 0
    grid = find_grid(groups, torch.zeros(5, 16), bits=4, sym=sym, search=search)
    codes = quantize_to_codes(groups, grid.scales[:, None], grid.zeros[:, None], 15)
    values = (codes - grid.zeros[:, None]) * grid.scales[:, None]
    assert torch.isfinite(values).all()
    assert (values[2] == 0).all() and (values[3, :, 4] == 0).all()


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("value", [0.7, -0.7, 1e-3, -40.0])
@pytest.mark.parametrize("sym", [True, False])
def test_a_constant_group_keeps_its_value(search, value, sym):
    groups = torch.full((1, 32, 1), value)
    grid = find_grid(groups, None, bits=4, sym=sym, search=search)
    # the scale is rounded to fp16; minmax sym spans 7.5 levels to each side, so its extreme lies half a level off
    allowed = abs(value) * (1 / 15 if sym and search == "minmax" else 0) + abs(value) * FP16_ULP * 1.01
    assert float(weighted_error(groups, grid)[0, 0] / 32) ** 0.5 <= allowed


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_zero_points_keep_clear_of_codes_a_format_cannot_store(search):
    groups = random_groups().abs() + 0.5  # all positive: the natural zero point is 0
    assert find_grid(groups, None, bits=4, sym=False, search=search).zeros.max() == 0
    grid = find_grid(groups, None, bits=4, sym=False, search=search, min_zero=1)
    assert (grid.zeros == 1).all()
    # One code of fifteen is lost, so a group that spans the whole range may be clipped by one step at its end.
    step = grid.scales.abs().double()
    assert (weighted_error(groups, grid) <= 16 * step.square() * 1.01).all()


def test_codes_are_the_nearest_and_ties_go_to_the_even_code():
    weight = torch.tensor([-0.26, -0.25, 0.0, 0.24, 0.25, 0.75, 9.0, -9.0])
    codes = quantize_to_codes(weight, torch.tensor(0.5), torch.tensor(8.0), 15)
    assert codes.tolist() == [7, 8, 8, 8, 8, 10, 15, 0]


def test_a_scale_becomes_the_nearest_fp16_and_never_zero_or_infinite():
    wide = torch.tensor([0.1, -0.1, 0.0, 1e-9, -1e-9, 1e6, -1e6, 6.2e-5])
    found = fp16_scale(wide)
    normal = [0, 1, 7]
    assert np.array_equal(found.numpy()[normal], wide.numpy()[normal].astype(np.float16).astype(np.float32))
    assert found[[2, 3]].tolist() == [2.0**-14] * 2
    assert abs(float(found[4])) == 2.0**-14
    assert found[[5, 6]].tolist() == [65504.0, -65504.0]
