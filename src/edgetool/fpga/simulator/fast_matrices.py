"""Matrices of `fast`: 4-bit weights stay packed, and torch's own int4 kernels multiply with them in bfloat16.

torch's kernels compute sum of x * ((code - 8) * scale + offset) with code 0..15, x, scales and offsets in bfloat16,
sums in float32, the result in bfloat16. That is the image's form, so packing is only an order of nibbles.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgetool.fpga.simulator.interfaces import Array, HalfMatrix, Int4Matrix, MatrixKernel

MIDDLE = 8
_FEW_ROWS = 4
_PACKED_ROWS = 4096
_BLOCK_ELEMENTS = 1 << 25
_CUDA_INNER_TILES = 8


class PackedInt4:
    """One or several 4-bit matrices that read the same input, one above the other.

    x: float32 [tokens, K]. Returns bfloat16 [tokens, sum of Np]; `parts` says which columns are whose.
    """

    def __init__(self, matrices: Sequence[Int4Matrix], device: torch.device, spare_groups: int = 0) -> None:
        first = matrices[0]
        self.group = first.group
        self.k = first.k
        step = 128 if device.type == "cuda" else self.group  # what a kernel wants K to be a multiple of
        self.columns = -(-self.k // step) * step + spare_groups * step
        self._cuda = device.type == "cuda"
        self._packed = self._pack(np.concatenate([matrix.codes for matrix in matrices]), device)
        table = torch.cat([self._scales(matrix) for matrix in matrices], 1)
        self.scales = table.to(device, torch.bfloat16).contiguous()
        ends = np.cumsum([matrix.scales.shape[0] for matrix in matrices])
        self.parts = [
            slice(int(end) - len(matrix.scales), int(end) - len(matrix.scales) + matrix.n)
            for matrix, end in zip(matrices, ends, strict=True)
        ]

    def _pack(self, codes: Array, device: torch.device) -> Tensor:
        """What the kernel reads, uint8 or int32, of all rows; some at a time, since codes are 32-bit on the way.

        Kernels take rows in blocks of up to 64, so that only whole blocks may be packed apart.
        """
        packed = []
        for start in range(0, codes.shape[0], _PACKED_ROWS):
            own = codes[start : start + _PACKED_ROWS, : self.columns]
            wide = np.full((own.shape[0], self.columns), MIDDLE, dtype=np.int32)
            np.add(own, MIDDLE, out=wide[:, : own.shape[1]], dtype=np.int32)
            block = torch.from_numpy(wide)
            if self._cuda:
                pairs = (block[:, ::2] << 4 | block[:, 1::2]).to(torch.uint8).to(device)
                packed.append(torch.ops.aten._convert_weight_to_int4pack(pairs, _CUDA_INNER_TILES))
            else:
                packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(block, 1))
        return torch.cat(packed)

    def _scales(self, matrix: Int4Matrix) -> Tensor:
        """float32 [groups, Np, 2]: scale and offset; 0 for groups beyond the matrix."""
        table = np.zeros((self.columns // self.group, matrix.scales.shape[0], 2), dtype=np.float32)
        groups = min(table.shape[0], matrix.scales.shape[1])
        table[:groups, :, 0] = matrix.scales[:, :groups].T
        if matrix.offsets is not None:
            table[:groups, :, 1] = matrix.offsets[:, :groups].T
        return torch.from_numpy(table)

    def multiply(self, x: Tensor, scales: Tensor) -> Tensor:
        """bfloat16 [tokens, Np] of bfloat16 x [tokens, columns]."""
        kernel = torch.ops.aten._weight_int4pack_mm if self._cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        result: Tensor = kernel(x, self._packed, self.group, scales)
        return result

    def __call__(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.bfloat16)
        if self.columns != self.k:
            narrow = torch.nn.functional.pad(narrow, (0, self.columns - self.k))
        return self.multiply(narrow, self.scales)


class Trimmed:
    """A single matrix's kernel: bfloat16 [tokens, N] without the padding."""

    def __init__(self, packed: PackedInt4) -> None:
        self._packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        return self._packed(x)[:, self._packed.parts[0]]


class RefinedInt4:
    """A 4-bit matrix whose results need more than bfloat16's 8 bits: the logits, which are compared with each other.

    A second pass computes what the first one's rounding lost. Its weights have one group more, of zeros, whose offsets
    are the first result and whose input is -1: so the kernel itself subtracts before it rounds. The rest of x, beyond
    bfloat16, goes along as a second row, at almost no cost since weights are read once.
    """

    def __init__(self, matrix: Int4Matrix, device: torch.device) -> None:
        self._packed = PackedInt4([matrix], device, spare_groups=1)
        self._lessened = self._packed.scales.clone()
        self._spare = -(-matrix.k // matrix.group)
        self._lock = threading.Lock()  # sessions of several threads share the lessened scales

    def __call__(self, x: Tensor) -> Tensor:
        with self._lock:
            return torch.cat([self._row(row) for row in torch.split(x, 1)])

    def _row(self, x: Tensor) -> Tensor:
        packed = self._packed
        high = x.to(torch.bfloat16)
        both = torch.zeros(2, packed.columns, dtype=torch.bfloat16, device=x.device)
        both[0, : packed.k] = high[0]
        both[1, : packed.k] = (x - high.float())[0]
        first = packed.multiply(both[:1], packed.scales)
        both[0, self._spare * packed.group] = -1
        rough = first.float()
        # a scale of 0 and an offset of y, as two bfloat16 in memory, are the float32 whose upper half y is
        self._lessened.view(torch.float32)[self._spare, :, 0] = rough[0]
        rest = packed.multiply(both, self._lessened)
        return rough.add_(rest[:1]).add_(rest[1:])[:, packed.parts[0]]


class Halves:
    """A matrix of plain fp16: float32 [tokens, N]. Few rows are multiplied in fp16, many in float32, block by block."""

    def __init__(self, matrix: HalfMatrix, device: torch.device) -> None:
        self._weight = torch.from_numpy(np.ascontiguousarray(matrix.values[: matrix.n, : matrix.k])).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= _FEW_ROWS or self._weight.device.type == "cuda":
            half = x.to(torch.float16)
            return torch.cat([half[row : row + 1] @ self._weight.t() for row in range(len(x))]).float()
        rows = max(1, _BLOCK_ELEMENTS // self._weight.shape[1])
        return torch.cat([x @ block.float().t() for block in torch.split(self._weight, rows)], 1)


def kernel_of(matrix: Int4Matrix | HalfMatrix, device: torch.device, refined: bool) -> MatrixKernel:
    """The kernel of one matrix, whose results are bfloat16 or float32; the latter with `refined`."""
    if isinstance(matrix, HalfMatrix):
        return Halves(matrix, device)
    return RefinedInt4(matrix, device) if refined else Trimmed(PackedInt4([matrix], device))
