"""GPTQ: rounding one input channel at a time while the channels not yet rounded make up for the error.

arXiv 2210.17323, algorithm 1. Everything here is a pure function on tensors, in float32, for all output rows at once.
Matrices are held transposed, [in_features, out_features], so that the step over one input channel reads one contiguous
row. Inside a block the update is left-looking (a row gathers what earlier rows owe it just before it is rounded): it
moves half as much memory as updating all later rows after each step, and gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetool.quantizers.grid import Grid, quantize_to_codes

BLOCK = 128
"""Input channels rounded between two updates of all later ones (arXiv 2210.17323, section 3, lazy batch-updates)."""

DAMP_LADDER = (1.0, 3.0, 10.0, 30.0)
"""Multiples of the asked damping tried in turn while the Cholesky factorisation fails."""


class NotPositiveDefinite(Exception):
    """The damped Gram matrix has no Cholesky factor at any step of the ladder."""


@dataclass(frozen=True)
class Rounded:
    """codes: uint8 [in_features, out_features] in the caller's channel order; grid as used, one per group."""

    codes: Tensor
    grid: Grid


def damped(gram: Tensor, damp: float, shrinkage: float = 0.0) -> Tensor:
    """`gram` [in, in] made safe to invert: regularised off and on the diagonal. The argument is left as it is.

    Off the diagonal it is multiplied by 1 - `shrinkage`: correlations measured on a few thousand tokens of one kind of
    text hold only in part for other text (0 trusts them wholly, 1 leaves rounding to nearest with weighted channels).
    On the diagonal, `damp` times its mean is added; channels never active get the mean.
    """
    return _damp_in_place(gram.clone(), damp, shrinkage)


def _damp_in_place(gram: Tensor, damp: float, shrinkage: float) -> Tensor:
    diagonal = gram.diagonal().clone()
    gram.mul_(1.0 - shrinkage)
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    gram.diagonal().copy_(torch.where(diagonal > 0, diagonal + damp * mean, mean))
    return gram


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U [in, in] with U^T U = gram^-1. The argument is left as it is.

    gram = R R^T with R upper triangular, factorised from the last block to the first, and U = R^-1: a third of the work
    of inverting first and factorising again, with fewer digits lost. Both steps overwrite their matrix, which is the
    largest thing in memory (321 MB for a width of 8960).
    Raises torch.linalg.LinAlgError if `gram` is not positive definite.
    """
    return _invert_upper(_factorize_backwards(gram.clone()))


_FACTOR_BLOCK = 512


def _blocks_from_last(channels: int) -> list[tuple[int, int]]:
    return [(start, min(start + _FACTOR_BLOCK, channels)) for start in range(0, channels, _FACTOR_BLOCK)][::-1]


def _factorize_backwards(a: Tensor) -> Tensor:
    """Overwrite symmetric `a` with upper triangular R, R R^T = a."""
    for start, stop in _blocks_from_last(a.shape[0]):
        right = a[start:stop, stop:]
        corner = a[start:stop, start:stop].addmm_(right, right.t(), alpha=-1.0)
        corner.copy_(torch.linalg.cholesky(corner.flip(0, 1)).flip(0, 1))
        above = a[:start, start:stop].addmm_(a[:start, stop:], right.t(), alpha=-1.0)
        above.copy_(torch.linalg.solve_triangular(corner.t(), above, upper=False, left=False))
        a[stop:, start:stop] = 0
    return a


def _invert_upper(r: Tensor) -> Tensor:
    """Overwrite upper triangular `r` with its inverse."""
    for start, stop in _blocks_from_last(r.shape[0]):
        corner = r[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=r.dtype, device=r.device)
        corner.copy_(torch.linalg.solve_triangular(corner, identity, upper=True))
        right = r[start:stop, stop:]
        right.copy_(corner @ (right @ r[stop:, stop:])).neg_()
    return r


def _reordered(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in `order`, some rows at a time: indexing both at once builds indices larger than the matrix."""
    result = torch.empty_like(gram)
    for start in range(0, len(order), _FACTOR_BLOCK):
        rows = order[start : start + _FACTOR_BLOCK]
        result[start : start + len(rows)] = gram[rows][:, order]
    return result


def factor_with_ladder(
    gram: Tensor, damp: float, shrinkage: float = 0.0, order: Tensor | None = None
) -> tuple[Tensor, float]:
    """(inverse factor of the damped gram, the damping that worked). Raises NotPositiveDefinite.

    With `order`, int64 [in], the factor is that of the matrix with rows and columns in this order.
    """
    for step in DAMP_LADDER:
        matrix = gram.clone() if order is None else _reordered(gram, order)
        try:
            factor = _invert_upper(_factorize_backwards(_damp_in_place(matrix, damp * step, shrinkage)))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(factor.sum())):  # one number: a mask of the whole matrix would take more than its size
            return factor, damp * step
    raise NotPositiveDefinite


def round_channels(
    weight_t: Tensor, factor: Tensor, group_of: list[int], grid: Grid | Callable[[int, Tensor], Grid], n_groups: int
) -> Rounded:
    """Round every input channel in the order given.

    weight_t: float32 [in_features, out_features], rows in processing order; not modified.
    factor: `inverse_factor` of the Gram matrix in the same order.
    group_of: group number of each row.
    grid: the grid of all groups (static groups), or a function of (group, current weights of that group's rows
        [rows, out_features]) called when a group's first row is reached (each group is then a contiguous run of rows).
    """
    channels, out_features = weight_t.shape
    work = weight_t.clone()
    codes = torch.empty((channels, out_features), dtype=torch.uint8, device=work.device)
    if isinstance(grid, Grid):
        scales, zeros, max_code, bits = grid.scales, grid.zeros, grid.max_code, grid.bits
    else:
        scales = torch.empty((n_groups, out_features), device=work.device)
        zeros = torch.empty_like(scales)
        max_code = bits = 0
    diagonal = factor.diagonal().tolist()
    group = -1
    for start in range(0, channels, BLOCK):
        stop = min(start + BLOCK, channels)
        inner = factor[start:stop, start:stop].t().contiguous()  # row i holds what rows before i owe it
        errors = torch.empty((stop - start, out_features), device=work.device)
        for i in range(stop - start):
            row = start + i
            current = work[row]
            if i:
                current.addmv_(errors[:i].t(), inner[i, :i], alpha=-1.0)
            if group_of[row] != group:
                group = group_of[row]
                if not isinstance(grid, Grid):
                    members = _settled(work, errors, factor, start, i, row, group_of)
                    found = grid(group, members)
                    scales[group], zeros[group] = found.scales[0], found.zeros[0]
                    max_code, bits = found.max_code, found.bits
                scale, zero = scales[group], zeros[group]
            code = quantize_to_codes(current, scale, zero, max_code)
            codes[row] = code
            torch.sub(current, code.sub_(zero).mul_(scale), out=errors[i]).div_(diagonal[row])
        if stop < channels:
            work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return Rounded(codes, Grid(scales, zeros, bits))


def _settled(
    work: Tensor, errors: Tensor, factor: Tensor, start: int, done: int, row: int, group_of: list[int]
) -> Tensor:
    """Rows of the group that begins at `row` with every earlier rounding error already paid for."""
    end = row + 1
    while end < len(group_of) and group_of[end] == group_of[row]:
        end += 1
    members = work[row:end].clone()
    if done:
        # The first row has been settled by the caller; the others still miss this block's earlier errors.
        members[1:].addmm_(factor[start : start + done, row + 1 : end].t(), errors[:done], alpha=-1.0)
    return members
