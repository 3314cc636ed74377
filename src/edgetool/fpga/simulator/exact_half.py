"""Matrices of plain fp16 in `et1`: fp32 products, summed like those of the attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgetool.fpga.simulator.exact_sums import LANES, fold
from edgetool.fpga.simulator.interfaces import HalfMatrix

_TILE_ROWS = 2048  # a block of products, 1 MB, stays in a core's cache


class ExactHalf:
    """A MatrixKernel of one fp16 matrix, in memory as float16 [blocks, 128, Np]."""

    def __init__(self, matrix: HalfMatrix) -> None:
        rows, width = matrix.values.shape
        blocks = matrix.values.reshape(rows, width // LANES, LANES).transpose(1, 2, 0)
        self._values = torch.from_numpy(np.ascontiguousarray(blocks))
        self._n = matrix.n
        self._pad = width - matrix.k

    def __call__(self, x: Tensor) -> Tensor:
        """x: float16 [tokens, K]; returns float32 [tokens, N]."""
        blocks, _, rows = self._values.shape
        wide = torch.nn.functional.pad(x, (0, self._pad)).float().view(x.shape[0], blocks, LANES, 1)
        out = torch.zeros(x.shape[0], rows)
        for first in range(0, rows, _TILE_ROWS):
            for block in range(blocks):
                values = self._values[block, :, first : first + _TILE_ROWS].float()
                for token in range(x.shape[0]):
                    out[token, first : first + _TILE_ROWS] += fold(wide[token, block] * values)
        return out[:, : self._n]
