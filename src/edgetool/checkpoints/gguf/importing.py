"""A GGUF file made into a checkpoint in Hugging Face layout with fp16 weights, a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.architecture import gguf_rows, model_config, target_names
from edgetool.checkpoints.gguf.file import GgufFile, GgufTensor
from edgetool.checkpoints.gguf.tokenizer import special_token_ids, tokenizer_config, tokenizer_json
from edgetool.checkpoints.tensor_file import TensorFileWriter
from edgetool.errors import BadInput
from edgetool.progress import NullProgress, Progress

IMPORT_VERSION = 1
"""Raised whenever the same GGUF would give another checkpoint; part of the cache key."""

_CHUNK_VALUES = 1 << 22
_HALF_MAX = 65504.0


def import_gguf(source: Path, directory: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors (fp16) into `directory`.

    The same file gives the same bytes. Returns what the file says about itself: name, architecture, license, and how
    many tensors have which type. Raises BadInput for a damaged file, a model or tokenizer that is not known, and a
    number that fp16 cannot hold; MissingDependency without the `gguf` package. The caller maps OSError (full disk).
    """
    progress = progress or NullProgress()
    gguf = GgufFile.open(source)
    metadata, where = gguf.metadata, str(source)
    config = model_config(metadata, gguf.tensors, where, gguf.vector(gguf_rope.TENSOR))
    names = target_names(config, gguf.tensors, where)
    tensors = [tensor for tensor in gguf.tensors.values() if tensor.name in names]
    for name, document in side_documents(metadata, config, where).items():
        write_json(directory / name, document)
    entries = [(names[tensor.name], "F16", tensor.shape) for tensor in tensors]
    with (
        progress.task("read GGUF", sum(tensor.nbytes for tensor in tensors), "B") as task,
        TensorFileWriter(directory / "model.safetensors", entries) as writer,
    ):
        for tensor in tensors:
            name = names[tensor.name]
            writer.write(name, _half_rows(gguf, tensor, gguf_rows(name, config)))
            task.advance(tensor.nbytes)
    kinds = [tensor.kind for tensor in gguf.tensors.values()]
    return {
        "name": metadata.get("general.name"),
        "architecture": metadata["general.architecture"],
        "license": metadata.get("general.license"),
        "gguf_types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def side_documents(metadata: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """File name -> content of the JSON files that stand beside the weights: config.json first, `config` with token ids.

    config: as `model_config` gives it. Raises BadInput, beginning with `where`, for a tokenizer that is not known.
    """
    roles = special_token_ids(metadata, where)
    ids = {f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles}
    return {
        "config.json": {**config, **ids},
        "generation_config.json": dict(ids),
        "tokenizer.json": tokenizer_json(metadata, where),
        "tokenizer_config.json": tokenizer_config(metadata, config["max_position_embeddings"], where),
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """UTF-8, indented by 2, one newline at the end."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _half_rows(
    gguf: GgufFile, tensor: GgufTensor, order: npt.NDArray[np.intp] | None
) -> Iterator[npt.NDArray[np.float16]]:
    """The tensor in fp16, a block of rows at a time."""
    step = max(_CHUNK_VALUES // max(tensor.shape[-1], 1), 1)
    for start in range(0, tensor.rows, step):
        block = range(start, min(start + step, tensor.rows))
        values = gguf.float32(tensor, block if order is None else order[block.start : block.stop])
        yield to_half(values, f"{gguf.path}: tensor {tensor.name!r}")


def to_half(values: npt.NDArray[np.float32], where: str) -> npt.NDArray[np.float16]:
    """Values rounded to fp16. Raises BadInput, beginning with `where`, for one beyond its range or not a number."""
    if values.size:
        largest = float(np.max(np.abs(values)))  # NaN goes through max
        if not largest <= _HALF_MAX:
            raise BadInput(f"{where}: holds {largest}, which fp16 (at most {_HALF_MAX:g}) cannot")
    return values.astype(np.float16)
