"""What can be asked of an image: --inspect, --diff, --extract, --verify."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound, detect
from edgetool.checkpoints.plain_reader import PlainLinear, read_stored
from edgetool.checkpoints.rounding import MIDDLE, round_symmetric
from edgetool.checkpoints.tensor_file import TensorFileWriter, to_float32
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from edgetool.fpga.image_format import layout_of
from edgetool.fpga.layout import unpack_fp16, unpack_int4
from edgetool.fpga.scalar_reader import ScalarReader
from edgetool.progress import Progress

Array = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 22
_SHOWN = 20


def inspect(directory: Path, threads: int, progress: Progress) -> dict[str, Any]:
    """What an image holds; every hash is checked. Raises BadInput or VerificationFailed for a damaged one."""
    image = Image.open(directory)
    progress.note("checking every hash")
    checked = image.check_hashes(threads)
    manifest = image.manifest
    return {
        "image": str(directory),
        "profile": manifest["profile"],
        "version": ".".join(map(str, manifest["version"])),
        "int4_encoding": manifest["int4_encoding"],
        "numerics": manifest["numerics"],
        "model": dict(manifest["model"]),
        "kv": dict(manifest["kv"]),
        "memory": dict(manifest["memory"]),
        "estimate": {key: manifest["estimate"][key] for key in ("decode_tokens_per_s", "prefill_tokens_per_s")},
        "hashes_checked": checked,
        "segments": [dict(segment) for segment in manifest["segments"]],
        "tensors": [_brief(record) for record in manifest["tensors"]],
        "constants": len(manifest["constants"]),
        "operations": {part: len(image.program[part]) for part in ("prologue", "layer", "epilogue")},
    }


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("name", "role", "N", "K", "group", "zeros", "addr", "bytes_per_pc")
    return {key: record[key] for key in keys}


def diff(first: Path, second: Path) -> dict[str, Any]:
    """How two images differ: in what they say, and matrix by matrix in bytes."""
    images = Image.open(first), Image.open(second)
    left, right = images
    said = _differences("", _comparable(left.manifest), _comparable(right.manifest))
    said += _differences("program", left.program, right.program)
    tensors: list[dict[str, Any]] = []
    for name in sorted({*left.tensors, *right.tensors}):
        records = [image.tensors.get(name) for image in images]
        if records[0] is None or records[1] is None:
            tensors.append({"name": name, "bytes_differing": None, "only_in": str(first if records[0] else second)})
            continue
        if layout_of(records[0]) != layout_of(records[1]):
            tensors.append({"name": name, "bytes_differing": None, "only_in": "another layout"})
            continue
        count = sum(
            int(np.count_nonzero(_port_bytes(left, records[0], pc) != _port_bytes(right, records[1], pc)))
            for pc in range(VCU128.pseudo_channels)
        )
        if count:
            tensors.append({"name": name, "bytes_differing": count, "only_in": None})
    constants = [
        name
        for name in sorted({*left.constants, *right.constants})
        if name not in left.constants
        or name not in right.constants
        or left.constant(name).tobytes() != right.constant(name).tobytes()
    ]
    hashes = [_file_hashes(image) for image in images]
    files = sorted(name for name in {*hashes[0], *hashes[1]} if hashes[0].get(name) != hashes[1].get(name))
    return {
        "first": str(first),
        "second": str(second),
        "identical": not (said or tensors or constants or files),
        "settings_differing": said[:_SHOWN],
        "tensors_differing": tensors,
        "constants_differing": constants,
        "files_differing": files,
    }


def _comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without what is compared otherwise."""
    left_out = ("segments", "tensors", "constants", "program", "tokenizer", "memory", "estimate")
    return {key: value for key, value in manifest.items() if key not in left_out}


def _file_hashes(image: Image) -> dict[str, str]:
    hashes = {segment["file"]: segment["sha256"] for segment in image.manifest["segments"]}
    return hashes | {f"tokenizer/{name}": digest for name, digest in image.manifest["tokenizer"].items()}


def _differences(name: str, left: Any, right: Any) -> list[dict[str, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = list(dict.fromkeys([*left, *right]))
        return [
            one for key in keys for one in _differences(f"{name}.{key}" if name else key, left.get(key), right.get(key))
        ]
    return [] if left == right else [{"key": name, "first": left, "second": right}]


def _port_bytes(image: Image, record: Mapping[str, Any], pc: int) -> Array:
    return image.port(pc)[record["addr"] : record["addr"] + record["bytes_per_pc"]]


def extract(directory: Path, name: str, output: Path, overwrite: bool) -> dict[str, Any]:
    """Write one matrix as float32 [N, K] into a safetensors file, rows and columns in the checkpoint's order."""
    image = Image.open(directory)
    record = image.tensor(name)
    if output.is_dir():
        raise BadInput(f"{output} is a directory; --extract writes one file", f"-o {output}/weight.safetensors")
    if output.exists() and not overwrite:
        raise BadInput(f"output {output} exists already", "add --overwrite to replace it, or choose another")
    if not output.parent.is_dir():
        raise BadInput(f"cannot write {output}: {output.parent} is not a directory")
    shape = (record["N"], record["K"])
    metadata = {"image_tensor": record["name"], "source_module": record["source"]["module"]}
    partial = output.with_name(f".{output.name}.partial")
    with disk_errors(output):
        if record.get("perm"):
            pieces: Any = [_original_order(image, record, np.concatenate(list(_dequantized(image, record))))]
        else:
            pieces = _dequantized(image, record)
        with TensorFileWriter(partial, [(record["name"], "F32", shape)], metadata) as writer:
            writer.write(record["name"], pieces)
        partial.replace(output)
    return {"image": str(directory), "tensor": record["name"], "module": record["source"]["module"],
            "shape": list(shape), "dtype": "F32", "output": str(output)}  # fmt: skip


def _dequantized(image: Image, record: Mapping[str, Any]) -> Any:
    """float32 rows, in blocks, in the order of the image."""
    layout = layout_of(record)
    ports = [_port_bytes(image, record, pc).reshape(layout.rows, layout.row_bytes) for pc in range(32)]
    step = max(1, _BLOCK_ELEMENTS // (32 * layout.padded_k))
    for first in range(0, layout.rows, step):
        block = np.stack([port[first : first + step] for port in ports])
        rows = min(layout.n - 32 * first, 32 * block.shape[1])
        if not layout.group:
            yield unpack_fp16(block, layout)[:rows].astype(np.float32)
            continue
        codes, scales, offsets = unpack_int4(block, layout, image.encoding)
        wide = codes[:rows].astype(np.float32)
        wide *= np.repeat(scales[:rows].astype(np.float32), layout.group, axis=1)[:, : layout.k]
        if offsets is not None:
            wide += np.repeat(offsets[:rows].astype(np.float32), layout.group, axis=1)[:, : layout.k]
        yield wide


def _original_order(image: Image, record: Mapping[str, Any], stored: Array) -> Array:
    """Undo the orders of columns and rows: stored[i, j] = original[rows[i], columns[j]]."""
    for axis, key in ((1, "columns"), (0, "rows")):
        name = record["perm"][key]
        if name is not None:
            order = image.constant(name).astype(np.int64)
            stored = np.take(stored, np.argsort(order, kind="stable"), axis=axis)
    return stored


@dataclass(frozen=True)
class _Side:
    """One matrix of the checkpoint, read by the plain reader or as plain weights."""

    checkpoint: Checkpoint
    found: QuantizationFound | None
    encoding: str

    def linear(self, module: str) -> PlainLinear | None:
        if self.found is None or module not in self.found.layouts:
            return None
        layout = self.found.layouts[module]
        kind = self.found.format if layout.kind == "gptq" else layout.kind
        return read_stored(self.checkpoint.tensors, module, kind, layout.bits, layout.group_size)

    def weights(self, module: str, rows: Array) -> Array:
        info = self.checkpoint.tensors[f"{module}.weight"]
        return to_float32(self.checkpoint.read_rows(info.name, rows), info.dtype)


def verify(directory: Path, checkpoint: Checkpoint, threads: int, progress: Progress) -> dict[str, Any]:
    """Compare an image with a checkpoint, element by element, by the scalar reader and the plain reader.

    Raises VerificationFailed naming the first matrix, row and column that differ, and how many matrices do.
    """
    image = Image.open(directory)
    image.check_hashes(threads)
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    side = _Side(checkpoint, found, image.encoding)
    ports = [image.port(pc) for pc in range(VCU128.pseudo_channels)]
    records = list(image.manifest["tensors"])
    failures: list[str] = []
    elements = 0
    with progress.task("compare", len(records), "matrices") as task, ThreadPoolExecutor(threads) as pool:
        for record, fault in zip(
            records, pool.map(lambda one: _compare(image, ports, one, side), records), strict=True
        ):
            elements += record["N"] * record["K"]
            if fault is not None:
                failures.append(fault)
            task.advance(1, note=record["name"])
    failures += _compare_embedding(image, checkpoint)
    if failures:
        raise VerificationFailed(
            f"{len(failures)} of {len(records) + 1} tensors differ from {checkpoint.directory}; first: {failures[0]}",
            "compile the checkpoint again",
        )
    return {
        "image": str(directory),
        "checkpoint": str(checkpoint.directory),
        "tensors_compared": len(records) + 1,
        "tensors_equal": len(records) + 1,
        "elements_compared": elements,
    }


def _compare(image: Image, ports: list[Array], record: Mapping[str, Any], side: _Side) -> str | None:
    """The first difference of one matrix, in words."""
    name, module = record["name"], record["source"]["module"]
    first = record["source"]["rows"][0]
    if f"{module}.weight" not in side.checkpoint.tensors and (side.found is None or module not in side.found.layouts):
        return f"{name}: the checkpoint has no {module}"
    reader = ScalarReader(ports, record, image.encoding)
    linear = side.linear(module)
    orders = {
        key: None if record.get("perm", {}).get(key) is None else image.constant(record["perm"][key]).astype(np.int64)
        for key in ("rows", "columns")
    }
    step = max(32, _BLOCK_ELEMENTS // record["K"] // 32 * 32)
    for start in range(0, record["N"], step):
        here = np.arange(start, min(start + step, record["N"]))
        there = first + (here if orders["rows"] is None else orders["rows"][here])
        if there.max() >= _rows_of(side, module, linear):
            return f"{name}: the checkpoint's {module} has fewer rows"
        fault = _compare_rows(reader, record, side, linear, here, there, orders["columns"])
        if fault is not None:
            return f"{name} {fault}"
    return None


def _rows_of(side: _Side, module: str, linear: PlainLinear | None) -> int:
    return linear.out_features if linear is not None else side.checkpoint.tensors[f"{module}.weight"].shape[0]


def _compare_rows(
    reader: ScalarReader, record: Mapping[str, Any], side: _Side, linear: PlainLinear | None, here: Array, there: Array,
    columns: Array | None,
) -> str | None:  # fmt: skip
    stored = record["source"]["as"]
    if record["group"] == 0:
        wanted = side.weights(record["source"]["module"], there).astype(np.float16)
        return _first(reader.halves(here).view(np.uint16), wanted.view(np.uint16), here, "weight")
    if stored == "rounded":
        weights = linear.weight(there) if linear is not None else side.weights(record["source"]["module"], there)
        lowest = -MIDDLE if side.encoding == "twos" else 1 - MIDDLE
        codes, scales = round_symmetric(np.ascontiguousarray(weights), record["group"], lowest)
        zeros = np.full(scales.shape, MIDDLE, dtype=np.uint8)
    else:
        if linear is None:
            return "is quantised in the image and not in the checkpoint"
        codes, scales, zeros = linear.codes(there), linear.scales[there].astype(np.float16), linear.zeros[there]
    if codes.shape[1] != record["K"]:
        return f"has K {record['K']}, the checkpoint {codes.shape[1]}"
    if columns is not None:
        codes = codes[:, columns]
    fault = _first(
        reader.codes(here),
        codes.astype(np.int8) - np.int8(MIDDLE if record["zeros"] or stored else MIDDLE),
        here,
        "code",
    )
    if fault is not None:
        return fault
    got_scales, got_offsets = reader.scales(here)
    wanted_offsets = ((MIDDLE - zeros.astype(np.float32)) * scales.astype(np.float32)).astype(np.float16)
    for what, got, wanted in (("scale", got_scales, scales), ("offset", got_offsets, wanted_offsets)):
        if got.shape != wanted.shape:
            return f"has {got.shape[1]} groups, the checkpoint {wanted.shape[1]}"
        fault = _first(got, wanted, here, what)
        if fault is not None:
            return fault
    spare = reader.padding(here)
    return f"has {spare} values in its padding" if spare else None


def _first(got: Array, wanted: Array, rows: Array, what: str) -> str | None:
    different = got != wanted
    if not bool(different.any()):
        return None
    row, column = (int(index[0]) for index in np.nonzero(different))
    return f"row {int(rows[row])}, {what} {column}: {got[row, column]} in the image, {wanted[row, column]} in the checkpoint"


def _compare_embedding(image: Image, checkpoint: Checkpoint) -> list[str]:
    """The embedding on the host, row block by row block."""
    (rows, width), name = image.manifest["embedding"]["shape"], image.manifest["embedding"]["file"]
    matches = [
        info
        for tensor, info in checkpoint.tensors.items()
        if tensor.endswith(("embed_tokens.weight", "word_embeddings.weight")) and info.shape == (rows, width)
    ]
    if not matches:
        return [f"embedding: the checkpoint has none of shape {[rows, width]}"]
    stored = np.memmap(image.directory / name, dtype="<u2", mode="r", shape=(rows, width))
    step = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        here = np.arange(start, min(start + step, rows))
        wide = to_float32(checkpoint.read_rows(matches[0].name, here), matches[0].dtype)
        fault = _first(np.asarray(stored[here]), wide.astype(np.float16).view(np.uint16), here, "value")
        if fault is not None:
            return [f"embedding {fault}"]
    return []
