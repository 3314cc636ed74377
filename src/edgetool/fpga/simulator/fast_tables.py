"""Tables of the image in `fast`: the function itself where the table is that function's, else the table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetool.fpga.simulator.interfaces import Array

Function = Callable[[Tensor], Tensor]

_TABLE_ULPS = 1
_BITS = 1 << 16


def function_of(table: Array, exact: Function, device: torch.device) -> Function:
    """`exact` where `table` (float16 [65536]) is its rounding for all finite numbers, else a lookup by fp16 bits."""
    x = torch.from_numpy(np.arange(_BITS, dtype=np.uint16).view(np.float16).astype(np.float64))
    finite = x.isfinite().numpy()
    with np.errstate(over="ignore"):
        wanted = exact(x).numpy().astype(np.float16)
    if _ulps(np.asarray(table, dtype=np.float16)[finite], wanted[finite]) <= _TABLE_ULPS:
        return exact
    entries = torch.from_numpy(np.asarray(table, dtype=np.float32)).to(device)
    return lambda values: entries[values.to(torch.float16).view(torch.int16).long() & (_BITS - 1)]


def _ulps(found: Array, wanted: Array) -> int:
    """The largest distance in representable numbers; NaN equals NaN, and -0 equals 0."""

    def ranks(values: Array) -> npt.NDArray[np.int64]:
        bits = values.view(np.int16).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    number = ~(np.isnan(found) & np.isnan(wanted))
    return int(np.abs(ranks(found) - ranks(wanted))[number].max(initial=0))


class Rotation:
    """Rotary positions as two tables over a whole head: x * cosines + x[partner] * sines.

    cos, sin: float32 [positions, rotary_dim / 2]. style: half or interleaved, as in docs/image-format.md.
    """

    def __init__(self, cos: Array, sin: Array, head_dim: int, style: str, device: torch.device) -> None:
        half = cos.shape[1]
        rotary_dim = 2 * half
        channel = np.arange(rotary_dim)
        if style == "half":
            entry, first, partner = channel % half, channel < half, (channel + half) % rotary_dim
        else:
            entry, first, partner = channel // 2, channel % 2 == 0, channel ^ 1
        beyond = ((0, 0), (0, head_dim - rotary_dim))
        cosines = np.pad(cos[:, entry], beyond, constant_values=1.0)
        sines = np.pad(np.where(first, -sin[:, entry], sin[:, entry]), beyond)
        whole = np.concatenate([partner, np.arange(rotary_dim, head_dim)])
        self._cosines, self._sines = (torch.from_numpy(table).to(device)[:, None] for table in (cosines, sines))
        self._partner = torch.from_numpy(whole).to(device)
        self._flat: dict[int, Tensor] = {}

    def turn(self, x: Tensor, position: int) -> Tensor:
        """x, float32 [tokens, heads, head_dim], is turned in place, the first token at `position`."""
        here = slice(position, position + len(x))
        if len(x) == 1:  # a list is looked up faster than the last of three dimensions
            partners = x.reshape(-1).index_select(0, self._partners_of(x.shape[1])).view(x.shape)
        else:
            partners = x.index_select(2, self._partner)
        return x.mul_(self._cosines[here]).addcmul_(partners, self._sines[here])

    def _partners_of(self, heads: int) -> Tensor:
        """Of one token's heads in a row."""
        if heads not in self._flat:
            starts = torch.arange(heads, device=self._partner.device)[:, None] * len(self._partner)
            self._flat[heads] = (starts + self._partner).flatten()
        return self._flat[heads]
