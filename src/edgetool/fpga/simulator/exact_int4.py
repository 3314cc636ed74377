"""4-bit matrices in `et1`: exact sums of groups from int8 products, whatever the number of tokens or threads.

An fp16 number is a multiple of 2^-24 below 2^16, so x * 2^24 is an integer of 40 bits. It is cut into digits of base
256, -128 .. 127. The products of each digit with a group's weights are summed in int32, exactly, by the int8 product
that processors are fastest at. Put together in fp64 the sums are exact as well (50 bits), and are rounded to fp32 once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetool.fpga.simulator.interfaces import Int4Matrix

Array = npt.NDArray[Any]

_DIGITS = 6  # a balanced digit less would not reach 65504
_FRACTION_BITS = 24
_MIDDLES = sum(128 << 8 * digit for digit in range(_DIGITS))
_LIMITS = [127 * (256**count - 1) // 255 for count in range(1, _DIGITS + 1)]  # the largest that 1 .. 6 digits hold
_TILE_VALUES = 1 << 18  # sums of digits at a time: 1 MB, which a core's cache holds


class ExactInt4:
    """A MatrixKernel of one 4-bit matrix. One byte a weight in memory: int8 [groups, Np, group].

    Sums are kept as whole numbers, P * 2^24, and scales as scale * 2^-24: a power of two changes no rounding.
    """

    def __init__(self, matrix: Int4Matrix) -> None:
        self._group = matrix.group
        self._groups = -(-matrix.k // matrix.group)  # those of padding alone would add 0
        self._n = matrix.n
        self._pad = self._groups * matrix.group - matrix.k
        width = self._groups * matrix.group
        grouped = matrix.codes[:, :width].reshape(-1, self._groups, matrix.group).transpose(1, 0, 2)
        self._codes = torch.from_numpy(np.ascontiguousarray(grouped))
        self._factors = [group.T for group in self._codes]
        self._scales = _by_group(matrix.scales, self._groups) * np.float32(2.0**-_FRACTION_BITS)
        self._offsets = None if matrix.offsets is None else _by_group(matrix.offsets, self._groups)

    def __call__(self, x: Tensor) -> Tensor:
        """x: float16 [tokens, K]; returns float32 [tokens, N]."""
        values = np.pad(x.numpy(), ((0, 0), (0, self._pad))) if self._pad else x.numpy()
        out = np.zeros((len(values), self._codes.shape[1]), dtype=np.float32)
        digits = split(values, self._group) if exact_products() else None
        step = max(1, _TILE_VALUES // ((_DIGITS if digits is None else digits.shape[1]) * out.shape[1]))
        for start in range(0, len(values), step):
            here = slice(start, start + step)
            self._accumulate(values[here], None if digits is None else digits[:, :, here], out[here])
        return torch.from_numpy(out[:, : self._n])

    def _accumulate(self, x: Array, digits: Tensor | None, acc: Array) -> None:
        """acc += scale * P (+ offset * X), group after group. digits: int8 [groups, digits, tokens, group]."""
        sums = self._sums(x)
        together = max(1, _TILE_VALUES // ((_DIGITS if digits is None else digits.shape[1]) * acc.size))
        for first in range(0, self._groups, together):
            last = min(first + together, self._groups)
            whole = self._wide(x, first, last) if digits is None else self._narrow(digits[first:last], first)
            products = whole * self._scales[first:last, None]
            for number, product in enumerate(products, first):
                acc += product
                if sums is not None and self._offsets is not None:
                    acc += self._offsets[number] * sums[:, number, None]

    def _sums(self, x: Array) -> Array | None:
        """float32 [tokens, groups] of X, which is exact before it is rounded; None where there are no offsets."""
        if self._offsets is None:
            return None
        wide = x.astype(np.float64).reshape(len(x), -1, self._group)
        sums: Array = wide.sum(axis=2).astype(np.float32)
        return sums

    def _narrow(self, digits: Tensor, first: int) -> Array:
        """float32 [groups, tokens, N]: P * 2^24 of the groups from `first` on.

        digits: int8 [groups, digits, tokens, group].
        """
        groups, count, tokens, width = digits.shape
        rows = self._codes.shape[1]
        sums = torch.empty(groups, count * tokens, rows, dtype=torch.int32)
        some = self._factors[first : first + groups]
        for left, right, out in zip(digits.reshape(groups, -1, width).unbind(), some, sums.unbind(), strict=True):
            torch._int_mm(left, right, out=out)
        # a sum of 128 products is below 2^17, so a pair of digits still fits into int32
        parts = sums.view(groups, count, tokens, rows).unbind(1)
        pairs = [
            torch.add(parts[low], parts[low + 1], alpha=256) if low + 1 < count else parts[low]
            for low in range(0, count, 2)
        ]
        exact = pairs[-1]
        for pair in reversed(pairs[:-1]):
            exact = torch.add(pair.double(), exact.double(), alpha=65536.0)
        whole: Array = exact.float().numpy()
        return whole

    def _wide(self, x: Array, first: int, last: int) -> Array:
        """P * 2^24 in fp64: exact too, slower, and infinities and NaN go the way of IEEE 754."""
        some = torch.from_numpy(x).double().view(len(x), -1, self._group)[:, first:last].transpose(0, 1)
        exact: Array = (
            torch.bmm(some, self._codes[first:last].double().transpose(1, 2)).mul_(2.0**_FRACTION_BITS).float().numpy()
        )
        return exact


def _by_group(factors: Array, groups: int) -> Array:
    """float32 [groups, Np] of float16 [Np, groups or more]."""
    return np.ascontiguousarray(factors[:, :groups].T.astype(np.float32))


def split(values: Array, group: int) -> Tensor | None:
    """int8 [groups, digits, tokens, group] of x * 2^24, the lowest digit first; None where x is not finite.

    values: float16 [tokens, groups * group]. Digits that are 0 in all of x are left out from the top.
    """
    wide = np.ldexp(values.astype(np.float64, order="C"), _FRACTION_BITS)
    largest = max(wide.max(initial=0.0), -wide.min(initial=0.0))
    if not largest < np.inf:
        return None
    count = next(count for count, limit in enumerate(_LIMITS, 1) if largest <= limit)
    whole = wide.astype("<i8") + _MIDDLES
    octets = whole.view(np.uint8).reshape(len(values), -1, group, 8)[..., :count] ^ 0x80  # now a digit: byte - 128
    return torch.from_numpy(np.ascontiguousarray(octets.transpose(1, 3, 0, 2)).view(np.int8))


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
