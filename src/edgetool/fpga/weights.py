"""The weights of one matrix of the image, a block of rows at a time, whatever format the checkpoint has.

Packed formats stay packed: GPTQ's words are read as a transposed view, compressed-tensors' as they are, AWQ's are
turned into that order. Only activation order (columns move) and `--requant` unpack codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.awq_words import from_awq
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound, module_format, read_linear, read_rest
from edgetool.checkpoints.packing import pack_rows
from edgetool.checkpoints.requant import RoundingError, requantize
from edgetool.checkpoints.rounding import MIDDLE, round_symmetric
from edgetool.checkpoints.scratch import Scratch
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, read_tensor, to_float32
from edgetool.errors import BadInput
from edgetool.fpga.halves import Losses, refuse_not_finite, to_half
from edgetool.fpga.hardware import align_up
from edgetool.fpga.layout import MatrixLayout, count_unrepresentable, pack_fp16, pack_int4
from edgetool.fpga.model import Linear

Array = npt.NDArray[Any]

_PIECE_WEIGHTS = 1 << 17
_BLOCK_BYTES = 1 << 22
"""Port bytes made at a time: they and their source stay near the caches, and memory does not grow with the matrix."""


@dataclass
class Rounded:
    """Errors of the matrices that this run rounded itself, by name; shared by its threads."""

    by_name: dict[str, RoundingError] = field(default_factory=dict)


@dataclass(frozen=True)
class Jobs:
    """What the writing of matrices needs beside the matrix."""

    checkpoint: Checkpoint
    found: QuantizationFound | None
    encoding: str
    losses: Losses
    rounded: Rounded
    scratch: Scratch = field(default_factory=Scratch)


class Matrix(Protocol):
    """One matrix of the image and where its weights come from."""

    @property
    def linear(self) -> Linear: ...

    @property
    def layout(self) -> MatrixLayout: ...

    def blocks(self, jobs: Jobs) -> Iterator[Array]:
        """Port bytes, uint8 [32, rows, row_bytes], of consecutive local rows; always cut at the same places.

        A block is good until the next one is asked for.
        """


def rows_per_block(layout: MatrixLayout) -> int:
    """Output channels in a block, a multiple of 32."""
    return 32 * max(1, _BLOCK_BYTES // (32 * layout.row_bytes))


@dataclass(frozen=True)
class PackedMatrix:
    """Codes of the checkpoint as they are.

    row_order: int [n], which row of the linear each row of the image is, or None. column_order: int [k], which input
    channel each is, in the order of the groups, or None.
    """

    linear: Linear
    layout: MatrixLayout
    row_order: Array | None = None
    column_order: Array | None = None

    def blocks(self, jobs: Jobs) -> Iterator[Array]:
        words, scales, offsets = self._open(jobs)
        step = rows_per_block(self.layout)
        block = None
        for start in range(0, self.layout.n, step):
            rows: Any = slice(start, min(start + step, self.layout.n))
            if self.row_order is not None:
                rows = self.row_order[rows]
            part = None if offsets is None else offsets[rows]
            block = pack_int4(words[rows], scales[rows], part, self.layout, jobs.encoding, block)
            yield block

    def _open(self, jobs: Jobs) -> tuple[Array, Array, Array | None]:
        """Words uint32 [n, ceil(k / 8)], scales float16 [n, groups] and offsets alike or None, of this linear alone."""
        assert jobs.found is not None
        module, stop = self.linear.module, self.linear.start + self.linear.n
        mine = slice(self.linear.start, stop)
        if self.column_order is not None:
            whole = read_linear(jobs.checkpoint, module, jobs.found)
            words = pack_rows(whole.codes[mine][:, self.column_order], 4)
        else:
            whole, words = _read_words(jobs.checkpoint, jobs.found, module, jobs.scratch)
            words = words[mine]
        scales = to_half(
            np.ascontiguousarray(whole.scales[mine]),
            "F16" if whole.scale_dtype == "F16" else "F32",
            f"{module}.scales",
            jobs.losses,
        )
        zeros = whole.zeros[mine]
        if not self.layout.zeros:
            if not bool((zeros == MIDDLE).all()):
                raise BadInput(f"{module} is asymmetric: {int((zeros != MIDDLE).sum())} zero points are not 8")
            return words.view(np.uint32), scales, None
        offsets = (MIDDLE - zeros.astype(np.float32)) * scales.astype(np.float32)
        return words.view(np.uint32), scales, to_half(offsets, "F32", f"{module}.offsets", jobs.losses)


@dataclass(frozen=True)
class RoundedMatrix:
    """Weights rounded to nearest here: lm_head where it is not quantised, anything with `--requant`."""

    linear: Linear
    layout: MatrixLayout

    def blocks(self, jobs: Jobs) -> Iterator[Array]:
        source = _weight_source(jobs, self.linear)
        layout, block = self.layout, None
        step = rows_per_block(layout)
        codes = np.empty((step, layout.k), dtype=np.uint8)
        scales = np.empty((step, layout.groups), dtype=np.float16)
        count, largest, errors, squares = 0, 0.0, 0.0, 0.0
        for start in range(0, self.linear.n, step):
            rows = min(step, self.linear.n - start)
            # in pieces that stay in the cache
            piece = max(1, _PIECE_WEIGHTS // layout.k)
            for first in range(0, rows, piece):
                here = slice(first, min(first + piece, rows))
                weights, origin = source(start + here.start, start + here.stop)
                codes[here], scales[here] = rounded(weights, layout.group, jobs.encoding, origin, self.linear.module)
                moved = _values(codes[here], scales[here], layout)
                moved -= weights
                count += weights.size
                largest = max(largest, float(np.abs(moved).max()))
                errors += float(np.vdot(moved, moved))
                squares += float(np.vdot(weights, weights))
            words = pack_rows(codes[:rows], 4).view(np.uint32)
            block = pack_int4(words, scales[:rows], None, layout, jobs.encoding, block)
            yield block
        jobs.rounded.by_name[self.linear.name] = RoundingError(count, largest, errors, squares)


def _values(codes: Array, scales: Array, layout: MatrixLayout) -> Array:
    """float32 [rows, k]: scale * (code - 8)."""
    values = codes.astype(np.float32)
    values -= MIDDLE
    if layout.k % layout.group:
        values *= np.repeat(scales.astype(np.float32), layout.group, axis=1)[:, : layout.k]
    else:
        grouped = values.reshape(len(codes), layout.groups, layout.group)
        grouped *= scales.astype(np.float32)[:, :, None]
    return values


def rounded(
    weights: Array, group: int, encoding: str, origin: QuantizedLinear | None, name: str
) -> tuple[Array, Array]:
    """Symmetric 4-bit codes, uint8 [rows, k], and float16 scales for float32 weights [rows, k].

    origin: the quantised rows that `weights` are the values of; they are rounded as `edgetool convert --requant` does,
    so that both ways end at the same bytes. Weights of 16 bits, and all weights for signmag (which has no -8), are
    rounded to nearest on the grid of each group's largest weight.
    """
    if origin is None or encoding == "signmag":
        return round_symmetric(weights, group, -MIDDLE if encoding == "twos" else 1 - MIDDLE, name)
    width = weights.shape[1]
    if width % group:
        whole = np.zeros((len(weights), align_up(width, group)), dtype=np.float32)
        whole[:, :width] = weights
        weights, origin = whole, None
    new = requantize(weights, bits=4, group_size=group, sym=True, origin=origin, name=name).linear
    return new.codes[:, :width], new.scales


@dataclass(frozen=True)
class HalfMatrix:
    """A matrix kept in fp16 (`--lm-head fp16`)."""

    linear: Linear
    layout: MatrixLayout

    def blocks(self, jobs: Jobs) -> Iterator[Array]:
        name = f"{self.linear.module}.weight"
        info = jobs.checkpoint.tensors[name]
        for rows in _row_ranges(self.linear, rows_per_block(self.layout)):
            yield pack_fp16(to_half(jobs.checkpoint.read_rows(name, rows), info.dtype, name, jobs.losses), self.layout)


def _row_ranges(linear: Linear, step: int) -> Iterator[Array]:
    stop = linear.start + linear.n
    for first in range(linear.start, stop, step):
        yield np.arange(first, min(first + step, stop))


def _weight_source(jobs: Jobs, linear: Linear) -> Callable[[int, int], tuple[Array, QuantizedLinear | None]]:
    """A function of (first, last + 1) row of the linear: float32 [rows, k] as stored or dequantised.

    Dequantised rows come with what they are dequantised from.
    """
    name = f"{linear.module}.weight"
    if jobs.found is not None and linear.module in jobs.found.layouts:
        whole = read_linear(jobs.checkpoint, linear.module, jobs.found)

        def dequantized(first: int, last: int) -> tuple[Array, QuantizedLinear | None]:
            rows = slice(linear.start + first, linear.start + last)
            part = replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zeros=whole.zeros[rows])
            return part.dequantize(), part

        return dequantized
    info = jobs.checkpoint.tensors[name]

    def stored(first: int, last: int) -> tuple[Array, QuantizedLinear | None]:
        rows = np.arange(linear.start + first, linear.start + last)
        weights = to_float32(jobs.checkpoint.read_rows(name, rows), info.dtype)
        refuse_not_finite(weights, name)
        return weights, None

    return stored


def _read_words(
    checkpoint: Checkpoint, found: QuantizationFound, module: str, scratch: Scratch
) -> tuple[QuantizedLinear, Array]:
    """A layer of 4 bits without its codes, and these as int32 [out_features, ceil(in_features / 8)], maybe a view.

    They lie in `scratch`, good until the thread's next call.
    """
    entry, _ = module_format(found, module)
    rest = read_rest(checkpoint, module, found)
    info = checkpoint.tensors[f"{module}.{entry.suffixes[0]}"]
    packed = read_tensor(info, scratch.empty("packed", info.shape, NUMPY_DTYPES[info.dtype]))
    if entry.name == "compressed-tensors":
        return rest, packed
    if entry.name != "awq":
        return rest, packed.T
    if rest.in_features % 8:
        return rest, pack_rows(read_linear(checkpoint, module, found).codes, 4)
    words = scratch.empty("words", (rest.out_features, rest.in_features // 8), np.int32)
    from_awq(packed, words.T)
    return rest, words


def unrepresentable(matrix: PackedMatrix, checkpoint: Checkpoint, found: QuantizationFound) -> int:
    """How many weights of a packed matrix are -8."""
    linear = matrix.linear
    _, words = _read_words(checkpoint, found, linear.module, Scratch())
    count = 0
    for rows in _row_ranges(linear, rows_per_block(matrix.layout)):
        count += count_unrepresentable(words[rows[0] : rows[-1] + 1], linear.k)
    return count
