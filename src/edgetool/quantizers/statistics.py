"""Second moments of a stage's inputs, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_BLOCK = 384
"""Columns of the Gram matrix computed together; smaller blocks skip more of the lower triangle, larger run faster."""


@dataclass
class InputStatistics:
    """Second moments of a stage's inputs x (as the quantised model sees them) over all calibration tokens.

    gram: float32 [in, in], mean of x x^T.
    mean: float32 [in], mean of x.
    magnitude: float32 [in], mean of |x|.
    cross: float32 [in, in], mean of (x_original - x) x^T, or None when the original's inputs are not followed.
    """

    gram: Tensor
    mean: Tensor
    magnitude: Tensor
    cross: Tensor | None = None


class Moments:
    """Sums for `InputStatistics`; the Gram matrix is symmetric, so only its upper blocks are summed."""

    def __init__(self, width: int, device: torch.device, *, follow_original: bool) -> None:
        self._gram = torch.zeros((width, width), device=device)
        self._sum = torch.zeros(width, device=device)
        self._magnitude = torch.zeros(width, device=device)
        self._cross = torch.zeros_like(self._gram) if follow_original else None
        self._tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count x, float32 [tokens, width], and the original model's inputs of the same tokens."""
        with through_onednn():
            width = x.shape[1]
            for start in range(0, width, GRAM_BLOCK):
                stop = min(start + GRAM_BLOCK, width)
                self._gram[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
            if self._cross is not None and original is not None:
                self._cross.addmm_((original - x).t(), x)
        self._sum += x.sum(0)
        self._magnitude += x.abs().sum(0)
        self._tokens += x.shape[0]

    def finite(self) -> bool:
        """Whether no input was NaN or infinite, nor so large that its square is."""
        return bool(torch.isfinite(self._gram.diagonal()).all())

    def mean(self) -> InputStatistics:
        """The statistics; the sums are used up."""
        gram = self._gram.div_(self._tokens)
        width = gram.shape[0]
        for start in range(0, width, GRAM_BLOCK):  # block by block, since a copy of the whole would be large
            stop = min(start + GRAM_BLOCK, width)
            gram[stop:, start:stop] = gram[start:stop, stop:].t()
            corner = gram[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).t())
        cross = None if self._cross is None else self._cross.div_(self._tokens)
        return InputStatistics(gram, self._sum / self._tokens, self._magnitude / self._tokens, cross)


@contextmanager
def through_onednn() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on a CPU, by way of bf16 where it has instructions for it.

    For statistics and for measuring errors, not for the solution itself. Products are summed in float32 either way, and
    the model's own products round these inputs to bf16 too.
    The setting also selects oneDNN over the default library, which is half as fast on some CPUs.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
