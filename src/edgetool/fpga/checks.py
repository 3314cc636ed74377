"""What can be asked of an image: --inspect, --diff, --extract, --verify."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import MANIFEST_NAME as RECORD_NAME
from edgetool.artifacts import disk_errors, sha256_file
from edgetool.checkpoints.checkpoint import read_json_object
from edgetool.checkpoints.tensor_file import TensorFileWriter
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from edgetool.fpga.image_format import MANIFEST_NAME, layout_of
from edgetool.fpga.layout import unpack_fp16, unpack_int4
from edgetool.progress import Progress

Array = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 22
_SHOWN = 20


def inspect(directory: Path, threads: int, progress: Progress) -> dict[str, Any]:
    """What an image holds; every hash is checked. Raises BadInput or VerificationFailed for a damaged one."""
    image = Image.open(directory)
    progress.note("checking every hash")
    checked = image.check_hashes(threads) + _check_record(directory)
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


def _check_record(directory: Path) -> int:
    """Where the compiler's record lies beside, the manifest must be the one it wrote: 1 file compared, or 0."""
    if not (directory / RECORD_NAME).is_file():
        return 0
    files = read_json_object(directory / RECORD_NAME).get("files")
    said = files.get(MANIFEST_NAME) if isinstance(files, dict) else None
    found = sha256_file(directory / MANIFEST_NAME)
    if said != found:
        raise VerificationFailed(
            f"{directory / MANIFEST_NAME}: SHA-256 is {found}, {RECORD_NAME} says {said}",
            "the manifest was changed after compiling: compile again",
        )
    return 1


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
