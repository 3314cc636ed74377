"""From a weight matrix and the statistics of its inputs to codes, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgetool.quantizers import gptq
from edgetool.quantizers.grid import Grid, find_grid, quantize_to_codes
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.statistics import InputStatistics, through_onednn

_GRID_ELEMENTS = 1 << 18
"""Weights searched together: 1 MiB, so that the search stays in the cache."""


@dataclass(frozen=True)
class Solved:
    """A quantised matrix.

    codes: uint8 [in_features, out_features], in the checkpoint's channel order.
    grid: scales and zeros [n_groups, out_features].
    group_of: int64 [in_features], group of each channel.
    trivial: group_of is i // group_size.
    method: what was really done ("gptq", "rtn"); damp: the damping that worked (0 for rtn).
    relative_error: sqrt(tr(D gram D^T) / tr(W gram W^T)) with D the change of the weight: the error of the outputs.
        Without calibration the inputs count as uncorrelated and of equal size: the error of the weights.
    """

    codes: Tensor
    grid: Grid
    group_of: Tensor
    trivial: bool
    method: str
    damp: float
    relative_error: float

    def dequantized_t(self) -> Tensor:
        """float32 [in_features, out_features]."""
        return dequantize_t(self.codes, self.grid, self.group_of)


def dequantize_t(codes: Tensor, grid: Grid, group_of: Tensor) -> Tensor:
    """scale * (code - zero), float32 [in_features, out_features]."""
    return codes.to(torch.float32).sub_(grid.zeros[group_of]).mul_(grid.scales[group_of])


def relative_error(weight_t: Tensor, quantized_t: Tensor, gram: Tensor) -> float:
    """Root of the mean squared output error over the mean squared output."""
    difference = quantized_t - weight_t
    with through_onednn():
        error = float((difference * (gram @ difference)).sum())
        energy = float((weight_t * (gram @ weight_t)).sum())
    return (max(error, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def weight_error(weight_t: Tensor, quantized_t: Tensor) -> float:
    """As `relative_error`, for inputs of which nothing is known."""
    size = float(weight_t.norm())
    return float((quantized_t - weight_t).norm()) / size if size > 0 else 0.0


def solve_rtn(weight: Tensor, recipe: Recipe, statistics: InputStatistics | None = None) -> Solved:
    """Round to nearest on the best grid; with statistics, the grid search weighs channels by their activity."""
    weight_t = weight.t().contiguous()
    channels = weight_t.shape[0]
    grid = static_grid(weight_t, recipe, None if statistics is None else statistics.gram.diagonal())
    group_of = trivial_groups(channels, recipe, weight.device)
    codes = quantize_to_codes(weight_t, grid.scales[group_of], grid.zeros[group_of], grid.max_code).to(torch.uint8)
    rounded_t = dequantize_t(codes, grid, group_of)
    if statistics is not None:
        error = relative_error(weight_t, rounded_t, statistics.gram)
    else:
        error = weight_error(weight_t, rounded_t)
    return Solved(codes, grid, group_of, True, "rtn", 0.0, error)


def solve_gptq(weight: Tensor, recipe: Recipe, statistics: InputStatistics) -> Solved:
    """GPTQ on `weight` float32 [out_features, in_features]; falls back to RTN where no damping helps."""
    weight_t = weight.t().clone(memory_format=torch.contiguous_format)
    channels = weight_t.shape[0]
    activity = statistics.gram.diagonal()
    dead = activity <= 0
    weight_t[dead] = 0  # a channel that is never active must not stretch its group's range
    if recipe.act_order or recipe.desc_act:
        order = torch.argsort(activity, descending=True, stable=True)
    else:
        order = torch.arange(channels, device=weight.device)
    try:
        factor, damp = gptq.factor_with_ladder(statistics.gram, recipe.damp, recipe.shrinkage, order)
    except gptq.NotPositiveDefinite:
        return solve_rtn(weight, recipe, statistics)

    target_t = weight_t
    if statistics.cross is not None and recipe.asymmetric_calibration > 0:
        target_t = shifted_target(weight_t, statistics.cross, factor, order, recipe.asymmetric_calibration)
    ordered = target_t[order]
    size = recipe.size(channels)
    if recipe.desc_act or not recipe.act_order:
        group_of = torch.arange(channels, device=weight.device) // size
        importance = activity[order]

        def grid_of(group: int, members: Tensor) -> Grid:
            weights = importance[group * size : (group + 1) * size].unsqueeze(0)
            return grid_for(members.unsqueeze(0), weights, recipe)

        rounded = gptq.round_channels(ordered, factor, group_of.tolist(), grid_of, recipe.groups(channels))
    else:
        grid = static_grid(target_t, recipe, activity)
        group_of = order // size
        rounded = gptq.round_channels(ordered, factor, group_of.tolist(), grid, recipe.groups(channels))
    del factor
    codes, grid = rounded.codes, rounded.grid
    back = torch.argsort(order)
    codes, group_of = codes[back].contiguous(), group_of[back]
    trivial = not recipe.desc_act or bool((group_of == trivial_groups(channels, recipe, weight.device)).all())
    error = relative_error(weight_t, dequantize_t(codes, grid, group_of), statistics.gram)
    return Solved(codes, grid, group_of, trivial, "gptq", damp, error)


def shifted_target(weight_t: Tensor, cross: Tensor, factor: Tensor, order: Tensor, strength: float) -> Tensor:
    """The real-valued matrix whose outputs on the quantised model's inputs are nearest the original's outputs.

    min_V E|V x - W x_original|^2 is solved by V = W + W E[(x_original - x) x^T] (E[x x^T] + damping)^-1; rounding V by
    GPTQ then minimises the objective of arXiv 2504.02692 (equation 6) directly. `factor` U of the damped Gram matrix in
    `order` gives its inverse as U^T U. Returns float32 [in, out] in the checkpoint's order.
    """
    moved = cross.t()[order] @ weight_t  # [in (ordered), out]
    correction = torch.empty_like(weight_t)
    correction[order] = factor.t() @ (factor @ moved)
    return weight_t + strength * correction


def static_grid(weight_t: Tensor, recipe: Recipe, importance: Tensor | None) -> Grid:
    """Grid of all groups of [in, out], found before any rounding.

    Searched a few output channels at a time: they are independent, and the search makes several passes over its copies.
    """
    channels, out_features = weight_t.shape
    shape = recipe.groups(channels), recipe.size(channels)
    weights = None if importance is None else importance.view(shape)
    columns = max(1, _GRID_ELEMENTS // channels)
    parts = [
        grid_for(weight_t[:, start : start + columns].contiguous().view(*shape, -1), weights, recipe)
        for start in range(0, out_features, columns)
    ]
    return Grid(torch.cat([p.scales for p in parts], 1), torch.cat([p.zeros for p in parts], 1), recipe.bits)


def grid_for(groups: Tensor, weights: Tensor | None, recipe: Recipe) -> Grid:
    """`find_grid` with what the recipe says."""
    return find_grid(
        groups, weights, bits=recipe.bits, sym=recipe.sym, search=recipe.scale_search, min_zero=recipe.min_zero
    )


def trivial_groups(channels: int, recipe: Recipe, device: torch.device) -> Tensor:
    """int64 [in_features]: i // group_size."""
    return torch.arange(channels, device=device) // recipe.size(channels)
