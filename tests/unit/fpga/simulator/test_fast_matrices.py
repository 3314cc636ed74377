"""Matrices of `fast` against sums in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edgetool.fpga.simulator.fast_matrices import Halves, PackedInt4, RefinedInt4, kernel_of
from edgetool.fpga.simulator.fast_tables import function_of
from edgetool.fpga.simulator.interfaces import HalfMatrix, Int4Matrix

CPU = torch.device("cpu")
BFLOAT16 = 2.0**-8
"""Half of the distance of two neighbouring bfloat16 numbers, as a share of the larger."""


def int4(n: int, k: int, group: int, zeros: bool, seed: int = 0) -> Int4Matrix:
    draw = np.random.default_rng(seed)
    rows, width = -(-n // 32) * 32, -(-k // 128) * 128
    codes = draw.integers(-8, 8, (rows, width)).astype(np.int8)
    codes[n:], codes[:, k:] = 0, 0
    groups = -(-width // group)
    scales, offsets = (draw.uniform(-0.02, 0.02, (rows, groups)).astype(np.float16) for _ in range(2))
    read = np.zeros(32, dtype=np.int64)
    return Int4Matrix("m", "q", n, k, group, codes, scales, offsets if zeros else None, read)


def dense(matrix: Int4Matrix) -> np.ndarray:
    scales = np.repeat(matrix.scales.astype(np.float64), matrix.group, axis=1)
    weights = scales * matrix.codes
    if matrix.offsets is not None:
        weights += np.repeat(matrix.offsets.astype(np.float64), matrix.group, axis=1)
    return weights[: matrix.n, : matrix.k]


def inputs(tokens: int, k: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).normal(size=(tokens, k)).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 128, 32), (70, 192, 64), (33, 200, 128), (128, 2304, 128), (4200, 128, 64)]
)
def test_packed_products_are_right_to_bfloat16(n: int, k: int, group: int, zeros: bool, tokens: int) -> None:
    matrix, x = int4(n, k, group, zeros), inputs(tokens, k)
    wanted = x.double().numpy() @ dense(matrix).T
    # inputs, scales and results are rounded: each by half a step, and the first two in every one of k products
    size = x.abs().double().numpy() @ np.abs(dense(matrix)).T
    got = kernel_of(matrix, CPU, refined=False)(x).float().numpy()
    assert got.shape == (tokens, n)
    assert np.all(np.abs(got - wanted) <= BFLOAT16 * (3 * size / np.sqrt(k) * 3 + np.abs(wanted)) + 1e-6)


def test_stacked_matrices_keep_their_own_rows() -> None:
    parts = [int4(70, 192, 64, False, 1), int4(32, 192, 64, True, 2), int4(96, 192, 64, False, 3)]
    packed, x = PackedInt4(parts, CPU), inputs(3, 192)
    stacked = packed(x)
    for part, matrix in zip(packed.parts, parts, strict=True):
        alone = kernel_of(matrix, CPU, refined=False)(x)
        assert torch.equal(stacked[:, part], alone)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("k", "group"), [(128, 32), (192, 64), (200, 128)])
def test_a_refined_product_has_more_bits_than_bfloat16(k: int, group: int, zeros: bool) -> None:
    matrix, x = int4(96, k, group, zeros), inputs(3, k)
    # scales are bfloat16 in both, so the comparison is with the matrix that has such scales
    kept = [np.asarray(torch.from_numpy(part.astype(np.float32)).bfloat16().float()) for part in (matrix.scales,)]
    offsets = None
    if matrix.offsets is not None:
        offsets = torch.from_numpy(matrix.offsets.astype(np.float32)).bfloat16().float().numpy()
    exact = Int4Matrix("m", "q", 96, k, group, matrix.codes, kept[0], offsets, matrix.read_bytes_per_pc)
    wanted = x.double().numpy() @ dense(exact).T
    coarse = kernel_of(matrix, CPU, refined=False)(x).float().numpy()
    fine = RefinedInt4(matrix, CPU)(x).numpy()
    assert fine.shape == (3, 96)
    assert np.abs(fine - wanted).max() < np.abs(coarse - wanted).max() / 50


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_matrices_of_fp16_are_right_to_fp16(tokens: int) -> None:
    values = np.random.default_rng(3).normal(size=(64, 256)).astype(np.float16)
    matrix = HalfMatrix("m", "lm_head", 50, 200, values, np.zeros(32, dtype=np.int64))
    x = inputs(tokens, 200).half().float()
    wanted = x.double().numpy() @ values[:50, :200].astype(np.float64).T
    got = Halves(matrix, CPU)(x).numpy()
    assert got.shape == (tokens, 50)
    assert np.abs(got - wanted).max() <= 2.0**-10 * np.abs(wanted).max()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def all_halves() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize(("exact", "plain"), [(torch.nn.functional.silu, silu), (torch.exp, np.exp)])
def test_a_table_of_the_function_is_the_function_and_any_other_is_looked_up(
    exact: Callable[[torch.Tensor], torch.Tensor], plain: Callable[[np.ndarray], np.ndarray]
) -> None:
    with np.errstate(all="ignore"):
        table = plain(all_halves().astype(np.float64)).astype(np.float16)
    assert function_of(table, exact, CPU) is exact
    other = table.copy()
    other[np.float16(1.5).view(np.uint16)] = np.float16(42)
    found = function_of(other, exact, CPU)
    assert found is not exact
    x = torch.tensor([1.5, -2.0, 0.0, 1.5001])
    wanted = [42.0, float(plain(np.array(-2.0))), float(plain(np.array(0.0))), 42.0]
    assert np.allclose(found(x).numpy(), wanted, atol=1e-3)
