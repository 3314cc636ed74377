from dataclasses import replace

import numpy as np
import pytest
import torch

from edgetool.quantizers import gptq
from edgetool.quantizers.engine import canonical
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.solve import relative_error, shifted_target, solve_gptq, solve_rtn
from edgetool.quantizers.statistics import InputStatistics
from tests.unit.quantizers.naive_gptq import correlated_inputs, gram_of, walk_beside

RECIPE = Recipe(group_size=32, scale_search="minmax")


def problem(channels=96, out_features=8, seed=0):
    x = correlated_inputs(4 * channels, channels, seed)
    weight = torch.randn(out_features, channels, generator=torch.Generator().manual_seed(seed + 1))
    return weight, InputStatistics(gram_of(x), x.mean(0), x.abs().mean(0)), x


def by_the_book(weight, solved, gram, order, damp, shrinkage):
    """Textbook GPTQ of `weight` in the order given, on the grid that the implementation chose."""
    variances = gram.double().diagonal()
    hessian = (1 - shrinkage) * gram.double() + shrinkage * variances.diag()
    hessian += damp * variances.mean() * torch.eye(len(gram))
    codes = solved.codes.T.to(torch.int64)[:, order]
    groups = solved.group_of[order]

    def grid_of(i, _):
        return solved.grid.scales[groups[i]], solved.grid.zeros[groups[i]]

    # More than test_gptq.py allows, because the factor is of a float32 matrix: condition number * 2**-24 of a level.
    walk = walk_beside(weight[:, order], hessian[order][:, order], grid_of, 4, codes, tolerance=5e-4)
    return codes, walk


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("desc_act", "act_order"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_codes_are_those_of_textbook_gptq_in_activation_order(sym, desc_act, act_order, shrinkage):
    weight, statistics, _ = problem()
    recipe = replace(RECIPE, sym=sym, desc_act=desc_act, act_order=act_order, shrinkage=shrinkage)
    solved = solve_gptq(weight, recipe, statistics)
    activity = statistics.gram.diagonal().numpy()
    order = np.argsort(-activity, kind="stable") if act_order else np.arange(96)
    codes, walk = by_the_book(weight, solved, statistics.gram, torch.from_numpy(order), 0.01, shrinkage)
    assert np.array_equal(codes.numpy(), walk.codes.numpy())
    assert walk.doubtful < 0.01 * codes.numel() + 2
    assert (solved.method, solved.damp) == ("gptq", pytest.approx(0.01))


def test_desc_act_groups_follow_the_activation_order_as_autogptq_means_it():
    weight, statistics, _ = problem()
    solved = solve_gptq(weight, replace(RECIPE, desc_act=True), statistics)
    activity = statistics.gram.diagonal().numpy()
    # AutoGPTQ: channels sorted by falling activity, position // group_size, put back into the channels' own order
    expected = np.empty(96, dtype=np.int64)
    for position, channel in enumerate(sorted(range(96), key=lambda c: -activity[c])):
        expected[channel] = position // 32
    assert np.array_equal(solved.group_of.numpy(), expected)
    assert not solved.trivial
    for group in (0, 1):
        assert activity[expected == group].min() >= activity[expected == group + 1].max()


def test_without_desc_act_groups_stay_where_they_are():
    weight, statistics, _ = problem()
    solved = solve_gptq(weight, RECIPE, statistics)
    assert solved.trivial
    assert solved.group_of.tolist() == [i // 32 for i in range(96)]


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_canonical_form_holds_the_same_values_for_any_rows(desc_act):
    weight, statistics, _ = problem()
    recipe = replace(RECIPE, desc_act=desc_act, sym=False)
    solved = solve_gptq(weight, recipe, statistics)
    linear = canonical(solved, slice(2, 7), recipe)
    linear.validate("test")
    assert (linear.g_idx is None) == (not desc_act)
    scale = solved.grid.scales[solved.group_of].T.numpy()
    zero = solved.grid.zeros[solved.group_of].T.numpy()
    expected = scale * (solved.codes.T.numpy().astype(np.float32) - zero)  # exact: 11 bits times 5 bits
    assert np.array_equal(linear.dequantize(), expected[2:7])
    assert np.array_equal(solved.dequantized_t().T.numpy(), expected)


def test_one_group_for_a_row_is_trivial_even_with_desc_act():
    weight, statistics, _ = problem()
    recipe = replace(RECIPE, desc_act=True, group_size=-1)
    solved = solve_gptq(weight, recipe, statistics)
    assert solved.trivial and solved.grid.scales.shape == (1, 8)
    assert canonical(solved, slice(0, 8), recipe).group_size == 96


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(bits, search, shrinkage):
    weight, statistics, _ = problem(128, 32)
    recipe = replace(RECIPE, bits=bits, scale_search=search, shrinkage=shrinkage)
    assert solve_gptq(weight, recipe, statistics).relative_error < solve_rtn(weight, recipe, statistics).relative_error


def test_the_reported_error_is_that_of_the_outputs():
    weight, statistics, x = problem()
    solved = solve_gptq(weight, RECIPE, statistics)
    outputs, change = x.double() @ weight.double().T, x.double() @ (solved.dequantized_t() - weight.T).double()
    # the Gram matrix is float32
    assert solved.relative_error == pytest.approx(float(change.norm() / outputs.norm()), rel=1e-4)
    assert relative_error(weight.T, weight.T, statistics.gram) == 0.0
    assert relative_error(torch.zeros(96, 8), weight.T, statistics.gram) == 0.0


def test_without_calibration_rounding_says_the_error_of_the_weights() -> None:
    weight, _, _ = problem()
    solved = solve_rtn(weight, RECIPE)
    change = solved.dequantized_t().T.numpy() - weight.numpy()
    assert 0.05 < solved.relative_error < 0.2  # 4 bits of a normal distribution
    assert solved.relative_error == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weight.numpy()), rel=1e-5)
    assert solve_rtn(torch.zeros(8, 96), RECIPE).relative_error == 0.0


def test_rounding_to_nearest_takes_the_nearest_value_of_the_grid():
    weight, _, _ = problem()
    solved = solve_rtn(weight, RECIPE)
    values = solved.dequantized_t()
    grid = solved.grid
    for group in range(3):
        rows = slice(32 * group, 32 * group + 32)
        levels = (torch.arange(16.0)[:, None] - grid.zeros[group]) * grid.scales[group]  # [16, out]
        nearest = (levels[:, None, :] - weight.T[None, rows]).abs().amin(0)
        assert torch.equal((values[rows] - weight.T[rows]).abs(), nearest)


@pytest.mark.parametrize("kind", ["negative", "nan"])
def test_a_gram_matrix_without_factor_falls_back_to_rounding_to_nearest(kind):
    weight, statistics, _ = problem()
    gram = statistics.gram.clone()
    if kind == "nan":
        gram[5, 6] = gram[6, 5] = float("nan")
    else:
        gram[5, 6] = gram[6, 5] = 1e4
    broken = InputStatistics(gram, statistics.mean, statistics.magnitude)
    solved = solve_gptq(weight, RECIPE, broken)
    nearest = solve_rtn(weight, RECIPE, broken)
    assert (solved.method, solved.damp) == ("rtn", 0.0)
    assert torch.equal(solved.codes, nearest.codes)
    assert torch.equal(solved.codes, solve_rtn(weight, RECIPE).codes)  # minmax grids ask for no importance


def test_a_dead_channel_is_zero_and_stretches_no_grid():
    weight, statistics, x = problem()
    x[:, [3, 40]] = 0
    statistics = InputStatistics(gram_of(x), x.mean(0), x.abs().mean(0))
    tame, wild = weight.clone(), weight.clone()
    tame[:, [3, 40]], wild[:, [3, 40]] = 0.0, 1e4
    for recipe in (RECIPE, replace(RECIPE, desc_act=True), replace(RECIPE, sym=False, scale_search="mse")):
        a, b = (solve_gptq(w, recipe, statistics) for w in (tame, wild))
        assert torch.equal(a.codes, b.codes) and torch.equal(a.grid.scales, b.grid.scales)
        assert (b.dequantized_t()[[3, 40]] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_given_is_not_modified(transposed):
    weight, statistics, x = problem()
    x[:, 3] = 0
    statistics = InputStatistics(gram_of(x), x.mean(0), x.abs().mean(0), torch.zeros(96, 96))
    given = weight.T.contiguous().T if transposed else weight
    before = given.clone()
    for recipe in (RECIPE, replace(RECIPE, desc_act=True), replace(RECIPE, asymmetric_calibration=1.0)):
        solve_gptq(given, recipe, statistics)
        solve_rtn(given, recipe, statistics)
        assert torch.equal(given, before)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_shifted_target_is_the_damped_least_squares_solution(strength):
    weight, _, original = problem(48, 5)
    x = original + 0.3 * correlated_inputs(len(original), 48, 9)
    gram = gram_of(x)
    cross = ((original - x).double().T @ x.double() / len(x)).float()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    factor = gptq.inverse_factor(gptq.damped(gram[order][:, order], 0.01))
    found = shifted_target(weight.T.contiguous(), cross, factor, order, strength).T

    # min_V |x V^T - original W^T|^2 / n + damping |V - W|^2, as one stacked least-squares problem in float64
    n, damping = len(x), 0.01 * float(gram.diagonal().mean())
    left = torch.cat([x.double() / n**0.5, damping**0.5 * torch.eye(48, dtype=torch.float64)])
    right = torch.cat([original.double() @ weight.double().T / n**0.5, damping**0.5 * weight.double().T])
    full = torch.linalg.lstsq(left, right).solution.T
    expected = weight + strength * (full - weight)
    # float32 Gram matrix and factor, condition number a few hundred
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    assert (full - weight).abs().max() > 0.05


def test_following_the_original_brings_the_outputs_nearer_to_it():
    weight, _, original = problem(96, 16)
    x = original + 0.3 * correlated_inputs(len(original), 96, 9)
    cross = ((original - x).double().T @ x.double() / len(x)).float()
    statistics = InputStatistics(gram_of(x), x.mean(0), x.abs().mean(0), cross)
    errors = []
    for strength in (0.0, 1.0):
        solved = solve_gptq(weight, replace(RECIPE, asymmetric_calibration=strength), statistics)
        errors.append(float((x @ solved.dequantized_t() - original @ weight.T).norm()))
    assert errors[1] < errors[0]
