"""GPTQ by the book, in float64, one input channel after the other: the oracle for quantizers/gptq.py and solve.py.

Right-looking, without Cholesky, blocks or transposition: the inverse Hessian of the channels not yet rounded is had by
eliminating the rounded one (arXiv 2210.17323, equations 2 and 3, which are those of Optimal Brain Quantization).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Walk:
    """codes: what the book gives. doubtful: codes that lay within tolerance of a rounding boundary, which were taken
    from the implementation so that the walk could go on beside it. columns: each channel just before its rounding."""

    codes: Tensor
    doubtful: int = 0
    columns: list[Tensor] = field(default_factory=list)


def walk_beside(
    weight: Tensor,
    hessian: Tensor,
    grid_of: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    bits: int,
    implemented: Tensor,
    tolerance: float,
) -> Walk:
    """Round weight [out, in] channel by channel, in order, with codes `implemented` [out, in] at hand.

    hessian: [in, in], positive definite. grid_of(i, weight as it stands) -> scale and zero [out] for channel i.
    A code is doubtful when the level w / scale + zero lies within `tolerance` of a half: float32 may round it to
    either side. Such a code must be one of the two neighbours; every other code is the book's own.
    """
    work = weight.double().clone()
    out_features, channels = work.shape
    inverse = torch.linalg.inv(hessian.double())
    walk = Walk(torch.empty(out_features, channels, dtype=torch.int64))
    top = 2**bits - 1
    for i in range(channels):
        scale, zero = (part.double() for part in grid_of(i, work))
        walk.columns.append(work[:, i].clone())
        rounded = torch.empty(out_features, dtype=torch.float64)
        for row in range(out_features):
            level = float(work[row, i] / scale[row] + zero[row])
            code = round(min(max(level, 0.0), float(top)))
            below = int(level // 1)
            if -1 < level < top + 1 and abs(level - below - 0.5) < tolerance:
                theirs = int(implemented[row, i])
                if theirs in (max(below, 0), min(below + 1, top)):
                    walk.doubtful += 1
                    code = theirs
            walk.codes[row, i] = code
            rounded[row] = scale[row] * (code - zero[row])
        error = (work[:, i] - rounded) / inverse[i, i]
        work -= error.unsqueeze(1) * inverse[i].unsqueeze(0)
        work[:, i] = rounded
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = 0  # exactly nothing is owed to channels that are done
        inverse[:, i] = 0
    return walk


def correlated_inputs(tokens: int, channels: int, seed: int) -> Tensor:
    """float32 [tokens, channels] whose channels overlap and differ in size, as those of a real layer do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5 + 0.7 * torch.eye(channels)
    sizes = torch.rand(channels, generator=generator) * 2 + 0.1
    return (torch.randn(tokens, channels, generator=generator) @ mixing) * sizes


def gram_of(x: Tensor) -> Tensor:
    """float32 [in, in], mean of x x^T, symmetric to the last bit."""
    gram = x.double().T @ x.double() / x.shape[0]
    return ((gram + gram.T) / 2).float()
