"""--verify: an image against its checkpoint, every element, both sides by readers that no compiler code goes through.

The image is read by `scalar_reader.py`, the checkpoint by `checkpoints/plain_reader.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound, detect, read_linear
from edgetool.checkpoints.plain_reader import PlainLinear, read_stored
from edgetool.checkpoints.rounding import MIDDLE
from edgetool.checkpoints.tensor_file import to_float32
from edgetool.errors import VerificationFailed
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from edgetool.fpga.scalar_reader import ScalarReader
from edgetool.fpga.weights import rounded
from edgetool.progress import Progress

Array = npt.NDArray[Any]
Record = Mapping[str, Any]

_BLOCK_ELEMENTS = 1 << 22
_MULTIPLIER_ONE = 0x3C000000
_SAMPLED = 6
_EDGE_ROWS = 48


def verify(directory: Path, checkpoint: Checkpoint, threads: int, progress: Progress) -> dict[str, Any]:
    """Compare an image with a checkpoint: matrices, norms, biases and the embedding.

    Raises VerificationFailed naming the first matrix, row and column that differ, and how many tensors do.
    """
    image = Image.open(directory)
    image.check_hashes(threads)
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    side = CheckpointSide(checkpoint, found)
    comparison = _Comparison(image, [image.port(pc) for pc in range(VCU128.pseudo_channels)], side)
    records = list(image.manifest["tensors"])
    constants = image.manifest["constants"]
    sourced = [record for record in constants if record["source"] is not None or record["role"] == "bias"]
    faults: list[str] = []
    with progress.task("compare", len(records), "matrices") as task, ThreadPoolExecutor(threads) as pool:
        for record, fault in zip(records, pool.map(comparison.matrix, records), strict=True):
            faults += [] if fault is None else [fault]
            task.advance(1, note=record["name"])
    faults += [fault for record in sourced if (fault := comparison.constant(record)) is not None]
    faults += [] if (fault := comparison.embedding()) is None else [fault]
    compared = len(records) + len(sourced) + 1
    if faults:
        raise VerificationFailed(
            f"{len(faults)} of {compared} tensors differ from {checkpoint.directory}; first: {faults[0]}",
            "compile the checkpoint again",
            {"tensors_compared": compared, "tensors_equal": compared - len(faults), "differences": faults[:20]},
        )
    return {
        "image": str(directory),
        "checkpoint": str(checkpoint.directory),
        "tensors_compared": compared,
        "tensors_equal": compared,
        "weights_compared": sum(record["N"] * record["K"] for record in records),
    }


def verify_sample(directory: Path, checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Open a fresh image as any reader does and compare the edges of some matrices: the first, the last, some between.

    Returns what was compared. Raises as `Image.open` and `verify`.
    """
    image = Image.open(directory)
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    comparison = _Comparison(
        image, [image.port(pc) for pc in range(VCU128.pseudo_channels)], CheckpointSide(checkpoint, found)
    )
    records = list(image.manifest["tensors"])
    chosen = [*records[: -1 : max(1, len(records) // _SAMPLED)], records[-1]]
    with progress.task("check a sample", len(chosen), "matrices") as task:
        for record in chosen:
            fault = comparison.matrix(record, edges=_EDGE_ROWS)
            if fault is not None:
                raise VerificationFailed(f"what was written is not what was meant: {fault}", "please report this")
            task.advance(1, note=record["name"])
    rows = sum(min(record["N"], 2 * _EDGE_ROWS) for record in chosen)
    return {"matrices_compared": len(chosen), "rows_compared": rows}


@dataclass(frozen=True)
class CheckpointSide:
    """The checkpoint: quantised modules by the plain reader, others as stored."""

    checkpoint: Checkpoint
    found: QuantizationFound | None

    def linear(self, module: str) -> PlainLinear | None:
        if self.found is None or module not in self.found.layouts:
            return None
        layout = self.found.layouts[module]
        kind = self.found.format if layout.kind == "gptq" else layout.kind
        return read_stored(self.checkpoint.tensors, module, kind, layout.bits, layout.group_size)

    def quantized(self, module: str, rows: Array) -> QuantizedLinear | None:
        """Some rows in canonical form, which rounding again starts from; None for a module that is not quantised."""
        if self.found is None or module not in self.found.layouts:
            return None
        whole = read_linear(self.checkpoint, module, self.found)
        return replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zeros=whole.zeros[rows])

    def rows_of(self, module: str, linear: PlainLinear | None) -> int:
        if linear is not None:
            return linear.out_features
        info = self.checkpoint.tensors.get(f"{module}.weight")
        return 0 if info is None else info.shape[0]

    def weights(self, module: str, linear: PlainLinear | None, rows: Array) -> Array:
        """float32 [rows, K], dequantised or as stored."""
        if linear is not None:
            return np.ascontiguousarray(linear.weight(rows))
        info = self.checkpoint.tensors[f"{module}.weight"]
        return to_float32(self.checkpoint.read_rows(info.name, rows), info.dtype)


@dataclass(frozen=True)
class _Comparison:
    image: Image
    ports: list[Array]
    side: CheckpointSide

    def matrix(self, record: Record, edges: int = 0) -> str | None:
        """The first difference of one matrix, in words. edges: compare only so many rows at either end."""
        module = record["source"]["module"]
        first, last = record["source"]["rows"]
        linear = self.side.linear(module)
        if self.side.rows_of(module, linear) < last:
            return f"{record['name']}: the checkpoint has no rows {first} .. {last - 1} of {module}"
        reader = ScalarReader(self.ports, record, self.image.encoding)
        rows, columns = (self._order(record, key) for key in ("rows", "columns"))
        step = max(32, _BLOCK_ELEMENTS // record["K"])
        every = np.arange(record["N"])
        if edges and record["N"] > 2 * edges:
            every = np.concatenate([every[:edges], every[-edges:]])
        for start in range(0, len(every), step):
            here = every[start : start + step]
            there = first + (here if rows is None else rows[here])
            fault = self._rows(reader, record, linear, here, there, columns)
            if fault is not None:
                return f"{record['name']}: {fault}"
        return None

    def _order(self, record: Record, key: str) -> Array | None:
        name = record.get("perm", {}).get(key)
        return None if name is None else self.image.constant(name).astype(np.int64)

    def _rows(
        self,
        reader: ScalarReader,
        record: Record,
        linear: PlainLinear | None,
        here: Array,
        there: Array,
        columns: Array | None,
    ) -> str | None:
        module = record["source"]["module"]
        if record["group"] == 0:
            wanted = self.side.weights(module, linear, there).astype(np.float16)
            return _first("weight", reader.halves(here).view(np.uint16), wanted.view(np.uint16), here) or _spare(
                reader, here
            )
        if record["source"]["as"] == "rounded":
            weights = self.side.weights(module, linear, there)
            origin = self.side.quantized(module, there)
            codes, scales = rounded(weights, record["group"], self.image.encoding, origin, module)
            zeros = np.full(scales.shape, MIDDLE, dtype=np.uint8)
        elif linear is None:
            return f"{module} is quantised in the image and not in the checkpoint"
        else:
            codes, zeros, scales = linear.codes(there), linear.zeros[there], linear.scales[there].astype(np.float16)
        if columns is not None:
            codes = codes[:, columns]
        offsets = ((MIDDLE - zeros.astype(np.float32)) * scales.astype(np.float32)).astype(np.float16)
        got_scales, got_offsets = reader.scales(here)
        return (
            _first("weight", reader.codes(here), codes.astype(np.int8) - np.int8(MIDDLE), here)
            or _first("scale", got_scales, scales, here)
            or _first("offset", got_offsets, offsets, here)
            or _spare(reader, here)
        )

    def constant(self, record: Record) -> str | None:
        """A norm or bias of DDR; a bias that comes from nothing must add nothing."""
        got = self.image.constant(record["name"])
        if record["source"] is None:
            zero = np.full(record["shape"], _MULTIPLIER_ONE, dtype=np.int64)
            return _first("bias", got.astype(np.int64).reshape(1, -1), zero.reshape(1, -1), [0], record["name"])
        info = self.side.checkpoint.tensors.get(record["source"])
        if info is None:
            return f"{record['name']}: the checkpoint has no {record['source']}"
        stored = to_float32(self.side.checkpoint.read(info.name), info.dtype).astype(np.float16).view(np.uint16)
        if record["role"] == "norm":
            wanted = np.concatenate([stored, np.zeros_like(stored)])
            return _first("value", got.view(np.uint16).reshape(1, -1), wanted.reshape(1, -1), [0], record["name"])
        matrix = self.image.tensors[record["name"].removesuffix(".bias")]
        first, last = matrix["source"]["rows"]
        mine = stored[first:last]
        order = self._order(matrix, "rows")
        full = np.full(record["shape"], _MULTIPLIER_ONE, dtype=np.int64)
        full[: len(mine)] += mine if order is None else mine[order]
        return _first("bias", got.astype(np.int64).reshape(1, -1), full.reshape(1, -1), [0], record["name"])

    def embedding(self) -> str | None:
        """The embedding on the host, block by block."""
        name, (rows, width) = self.image.manifest["embedding"]["source"], self.image.manifest["embedding"]["shape"]
        info = self.side.checkpoint.tensors.get(name)
        if info is None or info.shape != (rows, width):
            return f"embedding: the checkpoint has no {name} of shape {[rows, width]}"
        path = self.image.directory / self.image.manifest["embedding"]["file"]
        stored = np.memmap(path, dtype="<u2", mode="r", shape=(rows, width))
        step = max(1, _BLOCK_ELEMENTS // width)
        for start in range(0, rows, step):
            here = np.arange(start, min(start + step, rows))
            wanted = to_float32(self.side.checkpoint.read_rows(name, here), info.dtype).astype(np.float16)
            fault = _first("value", np.asarray(stored[start : start + len(here)]), wanted.view(np.uint16), here)
            if fault is not None:
                return f"embedding: {fault}"
        return None


def _first(what: str, got: Array, wanted: Array, rows: Any, label: str = "") -> str | None:
    """Where two arrays of rows differ first."""
    prefix = f"{label}: " if label else ""
    if got.shape != wanted.shape:
        return f"{prefix}{what}s have shape {got.shape[1:]} in the image, {wanted.shape[1:]} in the checkpoint"
    different = got != wanted
    if not bool(different.any()):
        return None
    row, column = (int(index[0]) for index in np.nonzero(different))
    here, there = got[row, column], wanted[row, column]
    return f"{prefix}row {int(rows[row])}, {what} {column} is {here} in the image and {there} in the checkpoint"


def _spare(reader: ScalarReader, rows: Array) -> str | None:
    count = reader.padding(rows)
    return f"{count} values in the padding of rows {rows[0]} .. {rows[-1]} are not zero" if count else None
