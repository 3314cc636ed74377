"""The one order in which `et1` adds fp32 numbers: binary trees over blocks of 128 lanes, then block after block."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

LANES = 128


def tree_sum(products: Tensor, dim: int) -> Tensor:
    """Sum of float32 `products` along `dim` by the document's order. `products` is used up.

    A block adds lane i + 64 to lane i, then i + 32 .. i + 1; lanes that are missing are 0. The sum starts at 0 and the
    blocks are added to it one after the other, so it is never -0.
    """
    total: Tensor | None = None
    for start in range(0, products.shape[dim], LANES):
        block = fold(products.narrow(dim, start, min(LANES, products.shape[dim] - start)), dim)
        total = block + 0.0 if total is None else total.add_(block)
    assert total is not None
    return total


def fold(block: Tensor, dim: int) -> Tensor:
    """Sum of at most 128 lanes along `dim` by the tree, in place; -0 where the document's lanes of 0 would give +0."""
    half = LANES // 2
    while half:
        lanes = block.shape[dim]
        if lanes > half:
            block.narrow(dim, 0, lanes - half).add_(block.narrow(dim, half, lanes - half))
            block = block.narrow(dim, 0, half)
        half //= 2
    return block.select(dim, 0)


def tree_sum_last(values: Tensor) -> Tensor:
    """`tree_sum` along the last dimension with all blocks folded at once, for many of them. `values` is kept."""
    lanes = values.shape[-1]
    blocks = -(-lanes // LANES)
    padded = pad(values, (0, blocks * LANES - lanes)).reshape(*values.shape[:-1], blocks, LANES)
    if padded.data_ptr() == values.data_ptr():
        padded = padded.clone()
    folded = fold(padded, -1)
    total = folded[..., 0] + 0.0
    for number in range(1, blocks):
        total.add_(folded[..., number])
    return total
