"""Exact products on the numbers that are hardest for them, against Python's integers and single additions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgetool.fpga.simulator import exact_int4
from edgetool.fpga.simulator.exact_half import ExactHalf
from edgetool.fpga.simulator.exact_int4 import ExactInt4, exact_products, split
from edgetool.fpga.simulator.exact_sums import tree_sum
from edgetool.fpga.simulator.interfaces import HalfMatrix, Int4Matrix
from tests.fakes.scalar_et1 import F32, exact_sum, prepared, tree

HARD = {
    "largest": lambda rng, shape: np.full(shape, 65504, dtype=np.float16),
    "largest and smallest": lambda rng, shape: rng.choice([65504, -65504, 6e-8, -6e-8], shape).astype(np.float16),
    "subnormal": lambda rng, shape: rng.integers(-1023, 1024, shape) * np.float16(2**-24),
    "any bits": lambda rng, shape: _finite(rng.integers(0, 1 << 16, shape).astype(np.uint16).view(np.float16)),
    "usual": lambda rng, shape: rng.normal(0, 1, shape).astype(np.float16),
    "zero": lambda rng, shape: np.where(rng.integers(0, 2, shape), -0.0, 0.0).astype(np.float16),
}


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.float16(0.125))


def int4_matrix(rng: Any, n: int, k: int, group: int, offsets: bool) -> Int4Matrix:
    rows, width = -(-n // 32) * 32, -(-k // 128) * 128
    codes = np.zeros((rows, width), dtype=np.int8)
    codes[:n, :k] = rng.choice([-8, 7, -1, 0, 3], (n, k))
    factors = [rng.normal(0, 0.1, (rows, width // group)).astype(np.float16) for _ in range(2)]
    return Int4Matrix("m", "q", n, k, group, codes, factors[0], factors[1] if offsets else None, np.zeros(32))


def naive(matrix: Int4Matrix, x: np.ndarray) -> np.ndarray:
    """float32 [tokens, N]: the document's loop."""
    out = np.zeros((len(x), matrix.n), dtype=np.float32)
    with np.errstate(all="ignore"):
        for token, row in enumerate(x):
            starts = range(0, matrix.k, matrix.group)
            groups = [prepared(list(row[start : start + matrix.group])) for start in starts]
            for n in range(matrix.n):
                acc = F32(0)
                for g, (start, xs) in enumerate(zip(starts, groups, strict=True)):
                    qs = matrix.codes[n, start : start + len(xs)].tolist()
                    acc = acc + F32(matrix.scales[n, g]) * exact_sum(xs, qs)
                    if matrix.offsets is not None:
                        acc = acc + F32(matrix.offsets[n, g]) * exact_sum(xs, [1] * len(xs))
                out[token, n] = acc
    return out


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", HARD)
def test_sums_of_groups_are_exact(kind: str, group: int) -> None:
    rng = np.random.default_rng(group)
    matrix = int4_matrix(rng, 5, 200, group, offsets=group != 64)
    x = HARD[kind](rng, (3, 200)).astype(np.float16)
    got = ExactInt4(matrix)(torch.from_numpy(x)).numpy()
    assert np.array_equal(got.view(np.uint32), naive(matrix, x).view(np.uint32))


def test_both_ways_to_sum_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    matrix = int4_matrix(rng, 70, 300, 64, offsets=True)
    kernel, x = ExactInt4(matrix), HARD["any bits"](rng, (9, 300))
    assert exact_products()  # of this machine; where it is not, all tests run in fp64
    fast = kernel(torch.from_numpy(x)).numpy()
    monkeypatch.setattr(exact_int4, "exact_products", lambda: False)
    assert np.array_equal(kernel(torch.from_numpy(x)).numpy().view(np.uint32), fast.view(np.uint32))


def test_tiles_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    matrix = int4_matrix(rng, 40, 256, 32, offsets=True)
    kernel, x = ExactInt4(matrix), torch.from_numpy(HARD["usual"](rng, (11, 256)))
    whole = kernel(x).numpy()
    for values in (1, 700, 5000):
        monkeypatch.setattr(exact_int4, "_TILE_VALUES", values)
        assert np.array_equal(kernel(x).numpy().view(np.uint32), whole.view(np.uint32))


def test_infinities_go_the_way_of_ieee_754_and_stay_in_their_own_row() -> None:
    rng = np.random.default_rng(3)
    matrix = int4_matrix(rng, 6, 128, 64, offsets=True)
    x = HARD["usual"](rng, (4, 128))
    x[1, 5], x[2, 70] = np.inf, np.nan
    with np.errstate(all="ignore"):
        got, expected = ExactInt4(matrix)(torch.from_numpy(x)).numpy(), naive(matrix, x)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.isfinite(got[[0, 3]]).all() and not np.isfinite(got[1]).any() and np.isnan(got[2]).all()


def test_a_wrong_weight_in_one_place_changes_its_row_only() -> None:
    rng = np.random.default_rng(4)
    matrix = int4_matrix(rng, 8, 128, 32, offsets=False)
    x = torch.from_numpy(HARD["usual"](rng, (2, 128)))
    before = ExactInt4(matrix)(x).numpy()
    matrix.codes[3, 77] ^= 1
    after = ExactInt4(matrix)(x).numpy()
    assert (np.flatnonzero((before != after).any(axis=0)) == [3]).all()


@pytest.mark.parametrize("kind", HARD)
def test_digits_make_up_the_number(kind: str) -> None:
    x = HARD[kind](np.random.default_rng(5), (4, 64)).astype(np.float16)
    digits = split(x, 32)
    assert digits is not None
    powers = 256 ** np.arange(digits.shape[1], dtype=object)
    for group in range(2):
        whole = (digits[group].numpy().astype(object) * powers[:, None, None]).sum(axis=0)
        expected = [[int(float(one) * 2**24) for one in row] for row in x[:, 32 * group : 32 * group + 32]]
        assert whole.tolist() == expected


@pytest.mark.parametrize(("n", "k"), [(3, 100), (40, 256), (2100, 130)])
def test_fp16_matrices_add_in_the_order_of_the_tree(n: int, k: int) -> None:
    rng = np.random.default_rng(6)
    rows, width = -(-n // 32) * 32, -(-k // 128) * 128
    values = np.zeros((rows, width), dtype=np.float16)
    values[:n, :k] = rng.normal(0, 1, (n, k))
    x = rng.normal(0, 1, (2, k)).astype(np.float16)
    got = ExactHalf(HalfMatrix("h", "lm_head", n, k, values, np.zeros(32)))(torch.from_numpy(x)).numpy()
    some = [0, n // 2, n - 1]
    expected = [[tree([F32(a) * F32(b) for a, b in zip(row, values[i, :k], strict=True)]) for i in some] for row in x]
    assert got.shape == (2, n)
    assert np.array_equal(got[:, some], np.array(expected))


@pytest.mark.parametrize("lanes", [1, 2, 31, 32, 63, 64, 65, 127, 128, 129, 200, 256, 300, 640])
def test_tree_sums_add_as_single_additions_do(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    values = (rng.normal(0, 1, (3, lanes)) * 2.0 ** rng.integers(-10, 10, (3, lanes))).astype(np.float32)
    assert np.array_equal(tree_sum(values), [tree(list(row)) for row in values])


def test_a_tree_sum_of_nothing_but_negative_zeros_is_zero() -> None:
    assert not np.signbit(tree_sum(np.full((1, 5), -0.0, dtype=np.float32))).any()
