"""From finished layers to a checkpoint: shards in the order of the original, config.json, side files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.checkpoint import shard_index, write_index
from edgetool.checkpoints.config_files import sections, set_dtype, spell_rope_twice, write_config
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorFileWriter, TensorInfo, iter_chunks, read_header
from edgetool.progress import Progress
from edgetool.quantizers.engine import HEAD_FILE, Job, layer_file
from edgetool.quantizers.storage import storage_chunks, stored_dtype_of

_VISION = "visual"


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output and where its bytes come from."""

    name: str
    dtype: str
    info: TensorInfo
    finished: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * int(NUMPY_DTYPES[self.dtype].itemsize)

    def chunks(self, target: str) -> Iterator[Any]:
        return iter_chunks(self.info) if self.finished else storage_chunks(self.info, target)


def assemble(job: Job, max_shard_bytes: int, progress: Progress) -> None:
    """Write the checkpoint's files into the job's directory. May be killed and run again: it only reads the layers."""
    checkpoint = job.model.checkpoint
    pieces = {piece.name: piece for piece in _pieces(job)}
    shards = shard_index([(piece.name, piece.nbytes) for piece in pieces.values()], max_shard_bytes)
    total = sum(piece.nbytes for piece in pieces.values())
    with progress.task("write", total, "B") as task, disk_errors(job.directory):
        for file_name, names in shards:
            entries = [(name, pieces[name].dtype, pieces[name].info.shape) for name in names]
            with TensorFileWriter(job.directory / file_name, entries) as writer:
                for name in names:
                    writer.write(name, pieces[name].chunks(job.dtype))
                    task.advance(pieces[name].nbytes)
    with disk_errors(job.directory):
        write_index(job.directory, shards, total)
        for path in checkpoint.side_files:
            shutil.copyfile(path, job.directory / path.name)
        _write_config(job)


def remove_working_files(directory: Path) -> None:
    """Layer files and activations; what is left is the checkpoint and the ledger."""
    for pattern in ("layer-*.safetensors", HEAD_FILE, "activations-*.bin"):
        for path in directory.glob(pattern):
            path.unlink()


def _pieces(job: Job) -> Iterator[_Piece]:
    """The output's tensors, each layer in the place of the original's first tensor of that layer."""
    model = job.model
    layers: dict[str | None, int] = {model.map.layer_prefix(layer): layer for layer in range(model.map.n_layers)}
    finished = dict(layers)
    for name, info in model.checkpoint.tensors.items():
        prefix = _layer_prefix(name, model.map.prefix)
        if prefix not in layers:
            if name.endswith("lm_head.weight") and (model.map.lm_head is None or job.quantize_lm_head):
                continue  # tied: the embedding is the one copy; quantised: replaced below
            yield _Piece(name, stored_dtype_of(info.dtype, job.dtype), info, False)
        elif prefix in finished:
            for part in read_header(layer_file(job.directory, finished.pop(prefix))).values():
                yield _Piece(part.name, part.dtype, part, True)
    if job.quantize_lm_head:
        for part in read_header(job.directory / HEAD_FILE).values():
            yield _Piece(part.name, part.dtype, part, True)


def _layer_prefix(name: str, prefix: str) -> str | None:
    start = f"{prefix}layers."
    if not name.startswith(start):
        return None
    return start + name[len(start) :].split(".", 1)[0] + "."


def _write_config(job: Job) -> None:
    checkpoint = job.model.checkpoint
    config = json.loads(json.dumps(checkpoint.config))
    ignore = [] if job.quantize_lm_head else ["lm_head"]
    if any(f"{_VISION}." in name for name in checkpoint.tensors):
        ignore.append(_VISION)
    quantization = job.format.quantization_config(job.spec, ignore)
    set_dtype(config, job.dtype)
    spell_rope_twice(config)
    if job.quantize_lm_head:
        config["tie_word_embeddings"] = False
        for section in sections(config)[1:]:
            section.pop("tie_word_embeddings", None)
    write_config(job.directory, config, quantization, job.format.side_config)
