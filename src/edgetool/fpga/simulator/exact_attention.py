"""Attention in `et1`: every product, tree and table entry as the document has it, in tiles that caches hold.

Tiles of queries and keys only say what is computed together: no sum crosses from one query to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetool.fpga.simulator.exact_sums import LANES, fold, tree_sum

_TILE_VALUES = 1 << 18


def scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """QK of all keys, those behind the query too: float16 [heads, tokens, keys].

    query: float32 [tokens, heads, head_dim]. keys: float32 [kv_heads, head_dim, keys].
    """
    tokens, heads, width = query.shape
    kv_heads, _, count = keys.shape
    out = torch.zeros(kv_heads, heads // kv_heads, tokens, count)
    # lanes are channels, in front: a tree's additions then run along neighbouring keys
    left = query.view(tokens, kv_heads, -1, width, 1).permute(3, 1, 2, 0, 4)
    right = keys.permute(1, 0, 2)[:, :, None, None]
    few, step = _tiles(heads * width, count)
    for start in range(0, count, step):
        some = right[..., start : start + step]
        for first in range(0, tokens, few):
            here = out[:, :, first : first + few, start : start + step]
            for lane in range(0, width, LANES):
                here += fold(left[lane : lane + LANES, :, :, first : first + few] * some[lane : lane + LANES])
    return out.mul_(torch.tensor(scale, dtype=torch.float32)).half().view(heads, tokens, count)


def softmax(scored: Tensor, masked: Tensor | None, table: Tensor) -> Tensor:
    """float16 [heads, tokens, keys] of scores, -inf where masked. table: float32 [65536] of exp.

    masked: bool [tokens, keys], keys behind the query; None: there are none.
    """
    wide = scored.float()
    shifted = wide.sub_(wide.amax(2, keepdim=True)).half()
    weights = table[shifted.view(torch.int16).int().bitwise_and_(0xFFFF)]
    if masked is not None:
        weights.masked_fill_(masked, 0.0)
    totals = torch.from_numpy(tree_sum(weights.numpy()))
    return weights.div_(totals[..., None]).half()


def mixed(probabilities: Tensor, values: Tensor) -> Tensor:
    """PV: float16 [tokens, heads, head_dim].

    probabilities: float16 [heads, tokens, keys], 0 where masked. values: float32 [kv_heads, head_dim, keys], finite
    where a probability is masked.
    """
    heads, tokens, count = probabilities.shape
    kv_heads, width, _ = values.shape
    # lanes are tokens, in front: a tree's additions then run along neighbouring channels
    right = values.permute(2, 0, 1).contiguous()[:, :, None, None]
    left = probabilities.float().view(kv_heads, -1, tokens, count).permute(3, 0, 1, 2)[..., None]
    out = torch.zeros(kv_heads, heads // kv_heads, tokens, width)
    few = max(1, _TILE_VALUES // (LANES * heads * width))
    for first in range(0, tokens, few):
        here = out[:, :, first : first + few]
        for lane in range(0, count, LANES):
            here += fold(left[lane : lane + LANES, :, :, first : first + few] * right[lane : lane + LANES])
    return out.half().permute(2, 0, 1, 3).reshape(tokens, heads, width)


def _tiles(values_per_key: int, keys: int) -> tuple[int, int]:
    """Queries and keys whose products fit into a tile."""
    step = max(1, min(keys, _TILE_VALUES // values_per_key))
    return max(1, _TILE_VALUES // (values_per_key * step)), step
