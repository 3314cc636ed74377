"""The lossy way: weights rounded to nearest onto a new grid, and how far that is off.

Groups whose weights lie on a grid that the target can store keep every value: their scale is found as the greatest
common divisor of the weights. For all others the grid with the smallest squared error is taken out of a few that clip
the group's range by some per cent, its scale refitted by least squares.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

WORST_SHOWN = 5

_SHRINK_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range; less clips outliers to serve the many
_REFIT_ROUNDS = 2
_BLOCK_WEIGHTS = 1 << 16  # rounded at a time, so that the temporaries stay in the L2 cache
_SCALE_BITS = {"F16": 11, "BF16": 8}  # significant bits
_SMALLEST_SCALE = np.float32(2.0**-14)  # float16's smallest normal number; smaller ones are slow or zero on GPUs
_LARGEST_SCALE = {"F16": np.float32(65504.0), "BF16": np.float32(2.0**64)}  # no product with a code overflows float32


@dataclass(frozen=True)
class RoundingError:
    """weights: how many. max: the largest difference. squares, weight_squares: sums over differences and weights."""

    weights: int
    max: float
    squares: float
    weight_squares: float

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return float(np.sqrt(self.squares / max(1, self.weights)))

    @property
    def relative(self) -> float:
        """RMS of the differences over the RMS of the weights; 0 where both are."""
        return float(np.sqrt(self.squares / self.weight_squares)) if self.weight_squares else 0.0

    def to_dict(self) -> dict[str, float]:
        """For reports."""
        return {"max": self.max, "rms": self.rms, "relative": self.relative}


@dataclass(frozen=True)
class Requantized:
    """linear: the new layer. error: how far it is from the weights. crc32: of its float32 weights, row after row."""

    linear: QuantizedLinear
    error: RoundingError
    crc32: int


def requantize(
    weight: Array,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    lowest_zero: int = 0,
    scale_dtype: str = "F16",
    origin: QuantizedLinear | None = None,
    name: str = "",
) -> Requantized:
    """`weight`, float32 [out_features, in_features], rounded to `bits` with groups of neighbouring channels.

    group_size: channels a group, which must divide in_features; -1 for one group. lowest_zero: smallest zero point the
    format stores (1 for GPTQ version 1). scale_dtype: F16 or BF16. origin: what the weights are the values of, if they
    were quantised; its own grids, rounded to what the format stores, are then tried as well.
    Raises BadInput, naming `name`, for weights that are not finite and for groups that do not fit.
    """
    where = f" ({name})" if name else ""
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    if size < 1 or in_features % size:
        raise BadInput(f"group_size {group_size} does not divide in_features {in_features}{where}")
    groups = in_features // size
    codes = np.empty(weight.shape, dtype=np.uint8)
    scales = np.empty((out_features, groups), dtype=np.float16 if scale_dtype == "F16" else np.float32)
    zeros = np.empty((out_features, groups), dtype=np.uint8)
    largest = squares = weight_squares = 0.0
    crc = 0
    target = _Target(bits, sym, lowest_zero, scale_dtype)
    known = _known_grids(origin, size)
    step = max(1, _BLOCK_WEIGHTS // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        block = weight[rows].reshape(-1, size)
        if not np.isfinite(block).all():
            raise BadInput(f"{int((~np.isfinite(weight)).sum())} weights are NaN or infinite{where}")
        with np.errstate(all="ignore"):  # what overflows is found to be no good grid
            scale, zero = target.grids(block, None if known is None else (known[0][rows], known[1][rows]))
        part = target.layer(weight[rows], scale, zero)
        codes[rows], scales[rows], zeros[rows] = part.codes, part.scales, part.zeros
        values = part.dequantize()
        crc = zlib.crc32(values.data, crc)
        values -= weight[rows]
        largest = max(largest, float(np.abs(values).max()))
        squares += float(np.square(values, dtype=np.float64).sum())
        weight_squares += float(np.square(block, dtype=np.float64).sum())
    linear = QuantizedLinear(codes, scales, zeros, None, bits, size, scale_dtype)
    linear.validate(name)
    return Requantized(linear, RoundingError(weight.size, largest, squares, weight_squares), crc)


def _known_grids(origin: QuantizedLinear | None, group_size: int) -> tuple[Array, Array] | None:
    """Scales and zeros, float32 [out_features, n_groups], of groups that are whole or cut into equal parts."""
    if origin is None or origin.g_idx is not None or origin.group_size % group_size or origin.ragged:
        return None
    parts = origin.group_size // group_size
    scales, zeros = (array.astype(np.float32).repeat(parts, axis=1) for array in (origin.scales, origin.zeros))
    return scales, zeros


def error_report(errors: Mapping[str, RoundingError]) -> dict[str, Any]:
    """For the result document: totals over all modules, and the worst of them by relative error."""
    total = RoundingError(
        weights=sum(error.weights for error in errors.values()),
        max=max((error.max for error in errors.values()), default=0.0),
        squares=sum(error.squares for error in errors.values()),
        weight_squares=sum(error.weight_squares for error in errors.values()),
    )
    ranked = sorted(errors.items(), key=lambda item: (-item[1].relative, item[0]))
    changed = sum(error.squares > 0 for error in errors.values())
    return {
        "modules": len(errors),
        "modules_changed": changed,
        **total.to_dict(),
        "worst": [{"module": name, **error.to_dict()} for name, error in ranked[:WORST_SHOWN] if error.squares > 0],
    }


@dataclass(frozen=True)
class _Target:
    """The grids that may be chosen. Groups are float32 [n, group_size], scales and zeros float32 [n]."""

    bits: int
    sym: bool
    lowest_zero: int
    scale_dtype: str

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def grids(self, groups: Array, known: tuple[Array, Array] | None) -> tuple[Array, Array]:
        """The scale and the zero of every group; `known` are tried too."""
        scales, zeros, found = self.exact(groups)
        if not found.all():
            left = ~found
            hints = None if known is None else (known[0].reshape(-1)[left], known[1].reshape(-1)[left])
            scales[left], zeros[left] = self.searched(groups[left], hints)
        return scales, zeros

    def layer(self, weight: Array, scales: Array, zeros: Array) -> QuantizedLinear:
        """`weight` [rows, in_features] on the grids that were chosen for its groups."""
        groups = weight.reshape(len(scales), -1)
        codes = self.levels(groups, scales, zeros, np.empty_like(groups))
        codes += zeros[:, None]
        stored = scales.astype(np.float16) if self.scale_dtype == "F16" else scales
        return QuantizedLinear(
            codes=codes.astype(np.uint8).reshape(weight.shape),
            scales=stored.reshape(len(weight), -1),
            zeros=zeros.astype(np.uint8).reshape(len(weight), -1),
            g_idx=None,
            bits=self.bits,
            group_size=groups.shape[1],
            scale_dtype=self.scale_dtype,
        )

    def levels(self, groups: Array, scales: Array, zeros: Array, out: Array) -> Array:
        """Nearest code minus zero of each weight, float32 whole numbers, in `out`."""
        np.divide(groups, scales[:, None], out=out)
        np.rint(out, out=out)
        if self.sym:  # limits that are no arrays are three times as fast
            np.clip(out, np.float32(-self.middle), np.float32(self.top - self.middle), out=out)
        else:
            np.maximum(out, -zeros[:, None], out=out)
            np.minimum(out, (self.top - zeros)[:, None], out=out)
        return out

    def exact(self, groups: Array) -> tuple[Array, Array, Array]:
        """Grids that hold every weight of a group as it is, and which groups have one (bool [n])."""
        low, high = groups.min(axis=1), groups.max(axis=1)
        peak = np.maximum(-low, high)
        scales = np.full(len(groups), _SMALLEST_SCALE, dtype=np.float32)
        zeros = np.full(len(groups), self.middle if self.sym else self.lowest_zero, dtype=np.float32)
        found = peak == 0
        # With scales of p bits and codes of b bits, all products are whole multiples of 2**-(p + b) times the power of
        # two above the largest of them.
        _, exponents = np.frexp(peak)
        unit = exponents - (_SCALE_BITS[self.scale_dtype] + self.bits)
        counts = np.ldexp(groups, -unit[:, None])
        left = np.flatnonzero((counts == np.rint(counts)).all(axis=1) & ~found)
        divisor = np.gcd.reduce(counts[left].astype(np.int32), axis=1)
        for part in range(1, self.top + 1):
            if not left.size:
                break
            # The greatest common divisor is the scale, or a multiple of it that may have too many bits itself.
            scale = np.ldexp((divisor / part).astype(np.float32), unit[left])
            signed, zero = self.placed(low[left] / scale, high[left] / scale)
            fits = (signed != 0) & (self.rounded(scale) == scale)
            taken = left[fits]
            scales[taken], zeros[taken], found[taken] = (signed * scale)[fits], zero[fits], True
            again = (signed != 0) & ~fits  # finer grids only make the levels larger
            left, divisor = left[again], divisor[again]
        return scales, zeros, found

    def placed(self, lowest: Array, highest: Array) -> tuple[Array, Array]:
        """Sign of the scale (0: neither) and zero with which levels from `lowest` to `highest` are codes."""
        sign, zeros = np.zeros_like(lowest), np.zeros_like(lowest)
        for direction in (-1.0, 1.0):  # the usual sign last, so that it is kept where both fit
            first, last = (lowest, highest) if direction > 0 else (-highest, -lowest)
            zero = np.full_like(first, self.middle) if self.sym else np.maximum(-first, self.lowest_zero)
            fits = (zero <= self.top) & (zero + first >= 0) & (zero + last <= self.top)
            sign[fits], zeros[fits] = direction, zero[fits]
        return sign, zeros

    def searched(self, groups: Array, known: tuple[Array, Array] | None) -> tuple[Array, Array]:
        """The grids with the smallest squared error."""
        low, high = groups.min(axis=1), groups.max(axis=1)
        best_error = np.full(len(groups), np.inf, dtype=np.float32)
        best_scale = self.stored((high - low) / np.float32(self.top))
        best_zero = np.full_like(best_scale, self.middle)
        levels = np.empty_like(groups)  # used again and again: fresh memory costs more than the arithmetic

        def consider(scale: Array, zero: Array) -> None:
            self.levels(groups, scale, zero, levels)
            np.multiply(levels, scale[:, None], out=levels)
            np.subtract(levels, groups, out=levels)
            error = np.einsum("ij,ij->i", levels, levels)
            better = error < best_error
            best_error[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]

        if known is not None:
            zero = best_zero if self.sym else np.clip(known[1], self.lowest_zero, self.top)
            consider(self.stored(known[0]), zero.copy())
        for factor in map(np.float32, _SHRINK_FACTORS):
            if self.sym:
                zero = np.full(len(groups), self.middle, dtype=np.float32)
                peak = np.maximum(-low, high)
                consider(self.stored(peak * (2 * factor / np.float32(self.top))), zero)
                # The other way spends the one step more that lies below zero on the extreme.
                extreme = np.where(-low >= high, low, high)
                consider(self.stored(extreme * (-factor / np.float32(self.middle))), zero)
            else:
                bottom, top = np.minimum(low, 0) * factor, np.maximum(high, 0) * factor
                scale = self.stored((top - bottom) / np.float32(self.top))
                consider(scale, np.clip(np.rint(-bottom / scale), self.lowest_zero, self.top))
        for _ in range(_REFIT_ROUNDS):
            self.levels(groups, best_scale, best_zero, levels)
            weight = np.einsum("ij,ij->i", levels, levels)
            fitted = np.divide(np.einsum("ij,ij->i", levels, groups), weight, out=best_scale.copy(), where=weight > 0)
            consider(self.stored(fitted), best_zero.copy())
        return best_scale, best_zero

    def stored(self, scales: Array) -> Array:
        """`scales` rounded to what the format stores, neither zero nor subnormal nor infinite."""
        sizes = np.minimum(np.nan_to_num(np.abs(scales)), _LARGEST_SCALE[self.scale_dtype])
        return np.copysign(np.maximum(self.rounded(sizes), _SMALLEST_SCALE), scales)

    def rounded(self, scales: Array) -> Array:
        """`scales` in the format's dtype and back to float32."""
        if self.scale_dtype == "BF16":
            return bfloat16_to_float32(float32_to_bfloat16(scales))
        with np.errstate(over="ignore"):
            return scales.astype(np.float16).astype(np.float32)
