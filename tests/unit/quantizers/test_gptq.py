import numpy as np
import pytest
import torch

from edgetool.quantizers import gptq
from edgetool.quantizers.grid import Grid, find_grid
from tests.unit.quantizers.naive_gptq import correlated_inputs, gram_of, walk_beside

TOLERANCE = 5e-5
"""Of a level. Levels up to 15 in float32 are exact to 1e-6; some hundred updates of about one level each, with a
factor rounded to float32, add up to a few times that."""


def problem(channels, out_features=6, seed=0):
    x = correlated_inputs(4 * channels, channels, seed)
    gram = gptq.damped(gram_of(x), 0.01)
    weight = torch.randn(out_features, channels, generator=torch.Generator().manual_seed(seed + 1))
    # U with U^T U = H^-1, the book's way: invert, then factorise
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float()
    return weight, gram, factor


def check(weight, gram, rounded, grid_of, bits=4, tolerance=TOLERANCE):
    codes = rounded.codes.T.to(torch.int64)
    walk = walk_beside(weight, gram, grid_of, bits, codes, tolerance)
    assert np.array_equal(codes.numpy(), walk.codes.numpy())
    # A level is doubtful with a probability of about 2 * tolerance: next to none of some hundred codes.
    assert walk.doubtful <= 8 * tolerance * codes.numel() + 2
    return walk


@pytest.mark.parametrize(
    ("channels", "group_size", "block"),
    [
        (64, 16, 32),  # groups inside a block
        (60, 20, 32),  # neither a multiple of the block, groups across its edge
        (96, 48, 32),  # groups larger than a block
        (70, 70, 32),  # one group (-1)
        (30, 10, 32),  # less than one block
        (33, 11, 32),  # a block of one channel
        (160, 40, None),  # the real block size
    ],
)
@pytest.mark.parametrize("static", [True, False])
def test_codes_are_those_of_textbook_gptq(channels, group_size, block, static, monkeypatch):
    if block is not None:
        monkeypatch.setattr(gptq, "BLOCK", block)
    weight, gram, factor = problem(channels)
    weight_t, groups = weight.T.contiguous(), channels // group_size
    group_of = [i // group_size for i in range(channels)]
    before = weight_t.clone()
    if static:
        grid = find_grid(weight_t.view(groups, group_size, -1), None, bits=4, sym=False, search="minmax")
        rounded = gptq.round_channels(weight_t, factor, group_of, grid, groups)
    else:
        seen = {}

        def choose(group, members):
            seen[group] = members.clone()
            return find_grid(members.unsqueeze(0), None, bits=4, sym=False, search="minmax")

        rounded = gptq.round_channels(weight_t, factor, group_of, choose, groups)
        grid = rounded.grid
        assert sorted(seen) == list(range(groups))

    def grid_of(i, work):
        if not static and i % group_size == 0:
            # The grid must have been chosen for the group as it stood when its first channel came up.
            expected = work[:, i : i + group_size].T
            torch.testing.assert_close(seen[i // group_size].double(), expected, rtol=0, atol=1e-4)
        return grid.scales[i // group_size], grid.zeros[i // group_size]

    check(weight, gram, rounded, grid_of)
    assert torch.equal(weight_t, before)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths_clamp_and_round_as_the_book_does(bits):
    weight, gram, factor = problem(40, seed=3)
    grid = find_grid(weight.T.reshape(2, 20, -1), None, bits=bits, sym=True, search="mse")
    rounded = gptq.round_channels(weight.T, factor, [i // 20 for i in range(40)], grid, 2)
    # 8 bits: the same absolute errors are sixteen times as many levels
    check(
        weight, gram, rounded, lambda i, _: (grid.scales[i // 20], grid.zeros[i // 20]), bits, TOLERANCE * 2**bits / 16
    )
    assert int(rounded.codes.max()) <= 2**bits - 1


def test_static_groups_may_come_in_any_order():
    """Activation order inside static groups: the group changes from one channel to the next."""
    weight, gram, factor = problem(48, seed=5)
    group_of = torch.randint(4, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    scales = 0.2 + 0.1 * torch.rand(4, 6, generator=torch.Generator().manual_seed(3))
    grid = Grid(scales, torch.full((4, 6), 8.0), 4)
    rounded = gptq.round_channels(weight.T, factor, group_of, grid, 4)
    check(weight, gram, rounded, lambda i, _: (scales[group_of[i]], grid.zeros[group_of[i]]))


def test_the_oracle_notices_a_wrong_factor():
    """Negative control: rounding without passing errors on differs from the book nearly everywhere."""
    weight, gram, factor = problem(64)
    grid = find_grid(weight.T.reshape(4, 16, -1), None, bits=4, sym=True)
    rounded = gptq.round_channels(weight.T, factor.diag().diag(), [i // 16 for i in range(64)], grid, 4)
    codes = rounded.codes.T.to(torch.int64)
    walk = walk_beside(weight, gram, lambda i, _: (grid.scales[i // 16], grid.zeros[i // 16]), 4, codes, TOLERANCE)
    assert (codes != walk.codes).float().mean() > 0.2


@pytest.mark.parametrize("channels", [1, 2, 65, 200])
def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse(channels):
    gram = gptq.damped(gram_of(correlated_inputs(4 * channels, channels, 7)), 0.01)
    factor = gptq.inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(gram.double())
    # float32 Cholesky loses about condition * 2**-24 of the whole
    bound = 8 * float(torch.linalg.cond(gram.double())) * 2**-24
    assert (factor.double().T @ factor.double() - inverse).norm() <= bound * inverse.norm()
    expected = torch.linalg.cholesky(inverse, upper=True)
    assert (factor.double() - expected).norm() <= bound * expected.norm()


def test_damping_adds_a_share_of_the_mean_diagonal_and_revives_dead_channels():
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(gptq.damped(gram, 0.1), torch.tensor([[4.2, 1, 0], [1, 2.2, 0], [0, 0, 2.0]]))
    assert gram[2, 2] == 0  # the caller's matrix is as it was
    assert torch.isfinite(gptq.inverse_factor(gptq.damped(torch.zeros(3, 3), 0.01))).all()


def with_eigenvalues(values, seed=0):
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed)).double()
    )
    gram = basis @ torch.tensor(values, dtype=torch.float64).diag() @ basis.T
    return ((gram + gram.T) / 2).float()


@pytest.mark.parametrize(("negative", "rung"), [(0.005, 1), (0.02, 3), (0.07, 10), (0.2, 30)])
def test_the_ladder_stops_at_the_first_damping_that_works(negative, rung):
    """An eigenvalue of -negative times the mean diagonal needs a damping of more than that."""
    values = [1.0] * 31
    values.append(-negative * 31 / (32 + negative))  # the mean of all 32 is then 31 / (32 + negative)
    gram = with_eigenvalues(values)
    _, damp = gptq.factor_with_ladder(gram, 0.01)
    assert damp == pytest.approx(0.01 * rung)


@pytest.mark.parametrize("kind", ["negative", "nan", "infinite"])
def test_a_matrix_no_damping_can_mend_is_reported(kind):
    gram = with_eigenvalues([1.0] * 31 + [-5.0])
    if kind != "negative":
        gram = torch.eye(32)
        gram[3, 4] = gram[4, 3] = float("nan" if kind == "nan" else "inf")
    with pytest.raises(gptq.NotPositiveDefinite):
        gptq.factor_with_ladder(gram, 0.01)
