"""Attention in `et1`: every product, tree and table entry as the document has it, in tiles that caches hold.

Tiles of queries and keys only say what is computed together: no sum crosses from one query to another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgetool.fpga.simulator.exact_sums import LANES, fold, tree_sum, tree_sum_last

_TILE_VALUES = 1 << 18


def scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """QK of all keys, those behind the query too: float16 [heads, tokens, keys].

    query: float32 [tokens, heads, head_dim]. keys: float32 [kv_heads, head_dim, keys].
    """
    tokens, heads, width = query.shape
    kv_heads, _, count = keys.shape
    out = torch.empty(kv_heads, heads // kv_heads, tokens, count, dtype=torch.float16)
    grouped = query.view(tokens, kv_heads, -1, width, 1).permute(1, 2, 0, 3, 4)
    few, step = _tiles(heads * width, count)
    factor = torch.tensor(scale, dtype=torch.float32)
    for start in range(0, count, step):
        some = keys[:, None, None, :, start : start + step]
        for first in range(0, tokens, few):
            sums = tree_sum(grouped[:, :, first : first + few] * some, 3)
            out[:, :, first : first + few, start : start + step] = sums.mul_(factor)
    return out.view(heads, tokens, count)


def softmax(scored: Tensor, masked: Tensor | None, table: Tensor) -> Tensor:
    """float16 [heads, tokens, keys] of scores, -inf where masked. table: float16 [65536] of exp.

    masked: bool [tokens, keys], keys behind the query; None: there are none.
    """
    left = scored.float()
    shifted = left.sub_(left.amax(2, keepdim=True)).half()
    weights = table[shifted.view(torch.int16).int() & 0xFFFF].float()
    if masked is not None:
        weights.masked_fill_(masked, 0.0)
    return (weights / tree_sum_last(weights)[..., None]).half()


def mixed(probabilities: Tensor, values: Tensor) -> Tensor:
    """PV: float16 [tokens, heads, head_dim].

    probabilities: float16 [heads, tokens, keys], 0 where masked. values: float32 [kv_heads, head_dim, keys], finite
    where a probability is masked.
    """
    heads, tokens, count = probabilities.shape
    kv_heads, width, _ = values.shape
    blocks = -(-count // LANES)
    spare = blocks * LANES - count
    # lanes are tokens: [blocks, 128, ..., head_dim], so that a tree's additions run along neighbours in memory
    lanes = pad(values, (0, spare)).view(kv_heads, width, blocks, LANES).permute(2, 3, 0, 1).contiguous()
    wide = pad(probabilities.float(), (0, spare)).view(kv_heads, -1, tokens, blocks, LANES).permute(2, 3, 4, 0, 1)
    out = torch.zeros(tokens, kv_heads, heads // kv_heads, width)
    few = max(1, _TILE_VALUES // (LANES * heads * width))
    for first in range(0, tokens, few):
        for block in range(blocks):
            products = wide[first : first + few, block, ..., None] * lanes[block, :, :, None]
            out[first : first + few] += fold(products, 1)
    return out.view(tokens, heads, width).half()


def _tiles(values_per_key: int, keys: int) -> tuple[int, int]:
    """Queries and keys whose products fit into a tile."""
    step = max(1, min(keys, _TILE_VALUES // values_per_key))
    return max(1, _TILE_VALUES // (values_per_key * step)), step
