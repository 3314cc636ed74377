"""The one order in which `et1` adds fp32 numbers: binary trees over blocks of 128 lanes, then block after block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LANES = 128


def fold(block: Any) -> Any:
    """Sum of at most 128 lanes, the first dimension of `block` (numpy or torch, float32), which is used up.

    Lane i + 64 is added to lane i, then i + 32 .. i + 1. Lanes that are missing stand for 0; a sum of 0 may come out as
    -0, which adding it to 0 makes good.
    """
    half = LANES // 2
    while half:
        lanes = block.shape[0]
        if lanes > half:
            low = block[: lanes - half]
            low += block[half:]
            block = block[:half]
        half //= 2
    return block[0]


def tree_sum(products: Array) -> Array:
    """Sums along the last dimension of float32 `products`, in the document's order: onto 0, so never -0."""
    lanes = products.shape[-1]
    blocks = -(-lanes // LANES)
    padded = np.zeros((*products.shape[:-1], blocks, LANES), dtype=np.float32)
    padded.reshape(*products.shape[:-1], -1)[..., :lanes] = products
    folded = fold(np.moveaxis(padded, -1, 0))
    total = np.zeros(products.shape[:-1], dtype=np.float32)
    for number in range(blocks):
        total += folded[..., number]
    return total
