"""4-bit matrices in `et1`: exact sums of groups from int8 products, whatever the number of tokens or threads.

An fp16 number is a multiple of 2^-24 below 2^16, so x * 2^24 is an integer of 40 bits. It is cut into digits of base
256, -128 .. 127. The products of each digit with a group's weights are summed in int32, exactly, by the int8 product
that processors are fastest at. Put together in fp64 the sums are exact as well (50 bits), and are rounded to fp32 once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from edgetool.fpga.simulator.interfaces import Int4Matrix

_DIGITS = 6  # a balanced digit less would not reach 65504
_FRACTION_BITS = 24
_MIDDLES = sum(128 << 8 * digit for digit in range(_DIGITS))
_TILE_VALUES = 1 << 18  # sums of digits at a time: 1 MB, which a core's cache holds


class ExactInt4:
    """A MatrixKernel of one 4-bit matrix. One byte a weight in memory: int8 [groups, Np, group]."""

    def __init__(self, matrix: Int4Matrix) -> None:
        rows, width = matrix.codes.shape
        self._group = matrix.group
        self._n = matrix.n
        self._pad = width - matrix.k
        grouped = matrix.codes.reshape(rows, -1, matrix.group).transpose(1, 0, 2)
        self._codes = torch.from_numpy(np.ascontiguousarray(grouped))
        self._scales = _by_group(matrix.scales)
        self._offsets = None if matrix.offsets is None else _by_group(matrix.offsets)

    def __call__(self, x: Tensor) -> Tensor:
        """x: float16 [tokens, K]; returns float32 [tokens, N]."""
        tokens = x.shape[0]
        x = torch.nn.functional.pad(x, (0, self._pad))
        out = torch.zeros(tokens, self._codes.shape[1])
        digits = split(x, self._group) if exact_products() else None
        count = 0 if digits is None else digits.shape[1]
        step = max(1, _TILE_VALUES // (max(count, 2) * out.shape[1]))
        for start in range(0, tokens, step):
            here = slice(start, start + step)
            part = None if digits is None else digits[:, :, here]
            self._accumulate(x[here], part, out[here])
        return out[:, : self._n]

    def _accumulate(self, x: Tensor, digits: Tensor | None, acc: Tensor) -> None:
        """acc += scale * P (+ offset * X), group after group. digits: int8 [groups, digits, tokens, group]."""
        groups, _, width = self._codes.shape
        together = max(1, _TILE_VALUES // ((6 if digits is None else digits.shape[1]) * acc.numel()))
        sums = None if self._offsets is None else x.double().view(-1, groups, width).sum(2).float()
        for first in range(0, groups, together):
            last = min(first + together, groups)
            if digits is None:
                exact = _wide(x, self._codes, first, last)
            else:
                exact = _narrow(digits[first:last], self._codes[first:last])
            products = exact.mul_(self._scales[first:last, None])
            for number in range(first, last):
                acc.add_(products[number - first])
                if self._offsets is not None and sums is not None:
                    acc.add_(self._offsets[number] * sums[:, number, None])


def _by_group(factors: np.ndarray) -> Tensor:
    """float32 [groups, Np] of float16 [Np, groups]."""
    return torch.from_numpy(np.ascontiguousarray(factors.T.astype(np.float32)))


def split(x: Tensor, group: int) -> Tensor | None:
    """int8 [groups, digits, tokens, group] of x * 2^24, the lowest digit first; None where x is not finite.

    x: float16 [tokens, Kp]. Digits that are 0 in all of x are left out from the top.
    """
    values = x.numpy()
    largest = float(np.max(np.abs(values), initial=np.float16(0)))
    if not largest < np.inf:
        return None
    count = 1
    while largest * 2.0**_FRACTION_BITS > 127 * (256**count - 1) // 255:
        count += 1
    whole = np.ldexp(values.astype(np.float64), _FRACTION_BITS).astype("<i8") + _MIDDLES
    octets = whole.view(np.uint8).reshape(values.shape[0], -1, group, 8)[..., :count] ^ 0x80  # now a digit: byte - 128
    return torch.from_numpy(np.ascontiguousarray(octets.transpose(1, 3, 0, 2)).view(np.int8))


def _narrow(digits: Tensor, codes: Tensor) -> Tensor:
    """float32 [groups, tokens, N]: P of groups. digits: [groups, digits, tokens, group]; codes: [groups, N, group]."""
    groups, count, tokens, width = digits.shape
    rows = codes.shape[1]
    sums = torch.empty(groups, count * tokens, rows, dtype=torch.int32)
    for number in range(groups):
        torch._int_mm(digits[number].reshape(count * tokens, width), codes[number].T, out=sums[number])
    # a sum of 128 products is below 2^17, so a pair of digits still fits into int32
    sums = sums.view(groups, count, tokens, rows)
    pairs = [
        sums[:, low] if low + 1 == count else sums[:, low + 1].mul_(256).add_(sums[:, low])
        for low in range(0, count, 2)
    ]
    if len(pairs) == 1:
        return pairs[0].float().mul_(2.0**-_FRACTION_BITS)
    exact = pairs[-1].double()
    for pair in reversed(pairs[:-1]):
        exact.mul_(65536.0).add_(pair)
    return exact.mul_(2.0**-_FRACTION_BITS).float()


def _wide(x: Tensor, codes: Tensor, first: int, last: int) -> Tensor:
    """The same in fp64: exact too, slower, and infinities and NaN go the way of IEEE 754."""
    width = codes.shape[2]
    some = x[:, first * width : last * width].double().view(x.shape[0], last - first, width).transpose(0, 1)
    return torch.bmm(some, codes[first:last].double().transpose(1, 2)).float()


@cache
def exact_products() -> bool:
    """Whether this processor's int8 products are exact on the largest sums there are, in the shapes that are used."""
    try:
        for rows in (1, 4, 24):
            digits = torch.tensor([-128, 127], dtype=torch.int8).repeat(rows, 64)
            for codes in ([-8, 7], [-8, -8], [7, -8], [7, 7]):
                weights = torch.tensor(codes, dtype=torch.int8).repeat(96, 64)
                if not torch.equal(torch._int_mm(digits, weights.T).long(), digits.long() @ weights.long().T):
                    return False
    except (RuntimeError, AttributeError):  # a build of torch without it
        return False
    return True
