"""AWQ: scale the channels that matter most before rounding, and undo it in the tensor in front.

arXiv 2306.00978, section 3.2. The paper scores a candidate by running the layer; here the score is
tr(D gram D^T) with D the change of the weight, which is the same mean squared output error, from the Gram matrix alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetool.models.architectures import Stage
from edgetool.quantizers.grid import quantize_to_codes
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.solve import dequantize_t, static_grid, trivial_groups
from edgetool.quantizers.statistics import InputStatistics, through_onednn

ALPHAS = tuple(step / 10 for step in range(10))
"""Exponents of the activation in the scale; 0 leaves the weights as they are."""

SCORED_ROWS = 384
"""Output rows that candidates are scored on, evenly spaced: rows are independent, so some of them tell enough."""


MAX_SCALE = 1000.0
"""Bound of a scale and of its inverse, so that folded norms stay well inside fp16."""


def value_channel_of(query_heads: int, value_heads: int, head_dim: int) -> Tensor:
    """int64 [query_heads * head_dim]: the output channel of v_proj that each input channel of o_proj stems from.

    With grouped-query attention several query heads read one value head, so their channels must share a scale.
    """
    heads = torch.arange(query_heads) // (query_heads // value_heads)
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def find_scale(weight: Tensor, statistics: InputStatistics, recipe: Recipe, source_of: Tensor | None = None) -> Tensor:
    """Scale of each channel of the tensor in front, float32 [channels], that gives the least error after rounding.

    weight: float32 [out_features, in_features], all linears of the stage; not modified.
    statistics: of the stage's inputs. A channel's activity is its mean magnitude, as in the paper: its root mean square
        would follow the few tokens with huge activations that every model has.
    source_of: int64 [in_features], channel in front of each input channel; None when they are the same.
    """
    gram = statistics.gram
    if source_of is None:
        source_of = torch.arange(weight.shape[1], device=weight.device)
    channels = int(source_of.max()) + 1
    shares = torch.bincount(source_of, minlength=channels).to(torch.float32)
    activity = torch.zeros(channels, device=weight.device).index_add_(0, source_of, statistics.magnitude) / shares
    activity = activity.clamp(min=max(1e-4 * float(activity.mean()), 1e-12))
    every = -(-weight.shape[0] // SCORED_ROWS)
    weight_t = weight[::every].t().contiguous()
    group_of = trivial_groups(weight_t.shape[0], recipe, weight.device)
    best, best_error = torch.ones_like(activity), float("inf")
    for alpha in ALPHAS:
        candidate = activity.pow(alpha)
        candidate = (candidate / (candidate.max() * candidate.min()).sqrt()).clamp_(1 / MAX_SCALE, MAX_SCALE)
        scale = candidate[source_of].unsqueeze(1)
        scaled = weight_t * scale
        grid = static_grid(scaled, recipe, gram.diagonal() / scale.squeeze(1).square())
        codes = quantize_to_codes(scaled, grid.scales[group_of], grid.zeros[group_of], grid.max_code)
        difference = dequantize_t(codes, grid, group_of).div_(scale).sub_(weight_t)
        with through_onednn():
            error = float((difference * (gram @ difference)).sum())
        if error < best_error:
            best, best_error = candidate, error
    return best


def fold(tensors: dict[str, Tensor], stage: Stage, scale: Tensor, source_of: Tensor | None = None) -> dict[str, Tensor]:
    """New tensors of the layer with `scale` moved from the stage's input into its weights; the product is unchanged.

    tensors: names inside the layer -> float32; those that change are replaced in the copy that is returned.
    """
    wide = scale if source_of is None else scale[source_of]
    changed = dict(tensors)
    for linear in stage.linears:
        changed[f"{linear}.weight"] = tensors[f"{linear}.weight"] * wide
    front = tensors[f"{stage.source}.weight"]
    changed[f"{stage.source}.weight"] = front / (scale if front.dim() == 1 else scale.unsqueeze(1))
    if f"{stage.source}.bias" in tensors:
        changed[f"{stage.source}.bias"] = tensors[f"{stage.source}.bias"] / scale
    return changed
