"""Choosing the quantisation grid (scale and zero point) of every group of a weight matrix.

A grid of `bits` has codes 0 .. 2**bits - 1 and stands for the values `scale * (code - zero)`. Scales are rounded to
fp16 here, before any code is chosen, because fp16 is what every checkpoint format stores: the codes must be right for
the scale that will be read back, not for the one that was computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleSearch = Literal["mse", "minmax"]

_SHRINK_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Fractions of the full range tried by the search; narrower ranges clip outliers to serve the many."""

_REFIT_ROUNDS = 2
"""Alternations of "codes for this scale" and "least-squares scale for these codes" after the best fraction."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of all groups of a matrix.

    scales: float32 [n_groups, out_features], each exactly representable in fp16, never 0, may be negative
        (a symmetric grid reaches one step further down than up, so the sign decides which side gets that step).
    zeros: float32 [n_groups, out_features], whole numbers in 0 .. 2**bits - 1.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)


def quantize_to_codes(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Nearest code (float32, whole numbers in 0 .. max_code) of each weight; shapes broadcast."""
    return torch.div(weight, scale).round_().add_(zero).clamp_(0, max_code)


def fp16_scale(scale: Tensor) -> Tensor:
    """`scale` rounded to fp16 and back; zeros become the smallest normal fp16, so that division stays defined."""
    rounded = scale.to(torch.float16).to(torch.float32)
    tiny = torch.finfo(torch.float16).tiny
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded).clamp_(-65504.0, 65504.0)


def find_grid(
    weight_groups: Tensor,
    importance: Tensor | None,
    *,
    bits: int,
    sym: bool,
    search: ScaleSearch = "mse",
    min_zero: int = 0,
) -> Grid:
    """Best grid of every group.

    weight_groups: float32 [n_groups, group_size, out_features].
    importance: float32 [n_groups, group_size], >= 0, weight of each input channel's squared error (the diagonal of
        the Gram matrix of the inputs: the expected square of the channel), or None for equal weights.
    "minmax" spans the group's extremes exactly (arXiv 2210.17323, section 3); "mse" searches clipped ranges and refits
    the scale by least squares for the weighted squared error. Zero points are at least `min_zero`.
    """
    max_code = 2**bits - 1
    if search == "minmax":
        scale, zero = _span(weight_groups, bits, sym, 1.0, min_zero)
        return Grid(scale, zero, bits)

    weights = None if importance is None else importance.unsqueeze(-1)
    candidates = [(factor, signed) for factor in _SHRINK_FACTORS for signed in ((False, True) if sym else (False,))]
    best_scale, best_zero = _span(weight_groups, bits, sym, candidates[0][0], min_zero, signed=candidates[0][1])
    best_error = _weighted_error(weight_groups, best_scale, best_zero, max_code, weights)
    for factor, signed in candidates[1:]:
        scale, zero = _span(weight_groups, bits, sym, factor, min_zero, signed=signed)
        error = _weighted_error(weight_groups, scale, zero, max_code, weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)

    for _ in range(_REFIT_ROUNDS):
        levels = quantize_to_codes(weight_groups, best_scale.unsqueeze(1), best_zero.unsqueeze(1), max_code)
        levels.sub_(best_zero.unsqueeze(1))
        weighted = levels if weights is None else levels * weights
        denominator = (weighted * levels).sum(1)
        scale = fp16_scale(torch.where(denominator > 0, (weighted * weight_groups).sum(1) / denominator, best_scale))
        error = _weighted_error(weight_groups, scale, best_zero, max_code, weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return Grid(best_scale, best_zero, bits)


def _span(
    groups: Tensor, bits: int, sym: bool, factor: float, min_zero: int, *, signed: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [n_groups, out_features] whose grid spans `factor` of each group's range."""
    max_code = 2**bits - 1
    low, high = groups.amin(1), groups.amax(1)
    if sym:
        zero = torch.full_like(low, float(2 ** (bits - 1)))
        if signed:
            # The extreme of larger magnitude lands exactly on code 0, the lowest: level -2**(bits-1).
            extreme = torch.where(low.abs() >= high.abs(), low, high)
            return fp16_scale(extreme * (-factor / 2 ** (bits - 1))), zero
        return fp16_scale(torch.maximum(low.abs(), high.abs()) * (2.0 * factor / max_code)), zero
    low, high = low.clamp(max=0.0) * factor, high.clamp(min=0.0) * factor
    scale = fp16_scale((high - low) / max_code)
    return scale, torch.div(-low, scale).round_().clamp_(min_zero, max_code)


def _weighted_error(groups: Tensor, scale: Tensor, zero: Tensor, max_code: int, weights: Tensor | None) -> Tensor:
    """Sum over each group of weight * (w - quantised w)**2: [n_groups, out_features]."""
    levels = quantize_to_codes(groups, scale.unsqueeze(1), zero.unsqueeze(1), max_code).sub_(zero.unsqueeze(1))
    error = levels.mul_(scale.unsqueeze(1)).sub_(groups).square_()
    return error.sum(1) if weights is None else error.mul_(weights).sum(1)
