"""A model written as one GGUF file: what goes where and as what type, decided first; then written, tensor by tensor."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.bfloat16 import bfloat16_to_float32
from edgetool.checkpoints.gguf import blocks as gguf_blocks
from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.architecture import gguf_rows, tensor_table
from edgetool.checkpoints.gguf.description import described, metadata, remarks
from edgetool.checkpoints.gguf.vocabulary import tokenizer_metadata
from edgetool.checkpoints.gguf.writer import FILE_TYPES, Entry, GgufFileWriter, Value, tensor_bytes
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES
from edgetool.converter.source import PlainTensor, Source
from edgetool.errors import BadInput, Stopped
from edgetool.progress import NullProgress, Progress

Array = npt.NDArray[Any]
_In = TypeVar("_In")
_Out = TypeVar("_Out")

FILE_NAME = "model.gguf"

_MATRIX_TYPES = ("F16", "BF16", "F32")
_VECTOR_DTYPES = ("F16", "BF16", "F32")  # delivered as F32, which llama.cpp wants for everything that is no matrix


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF file will hold.

    entries: its tensors in order. names: each one's name -> the module or plain tensor of the source that it comes
    from (the divisors of a scaled rotation come from config.json and have their own name). refused: module or tensor
    -> why it has no exact place in the file. warnings: sentences about what llama.cpp does otherwise than the model's
    own code.
    """

    metadata: Mapping[str, Value] = field(repr=False)
    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    refused: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Data of all tensors."""
        return sum(tensor_bytes(entry) for entry in self.entries)

    @property
    def types(self) -> dict[str, int]:
        """GGUF type -> number of tensors of it."""
        return dict(sorted(Counter(kind for _, kind, _ in self.entries).items()))


def plan_gguf(source: Source, *, threads: int = 1, progress: Progress | None = None) -> GgufPlan:
    """Decide the type of every tensor; reads every quantised linear once, and the tokenizer.

    Each quantised linear gets the smallest type that holds all of its weights exactly (gguf_blocks.kind_for); other
    matrices keep their dtype, vectors become F32. Raises BadInput for a model, tokenizer or set of tensors that has no
    GGUF form; what stands against single tensors is collected in `refused`.
    """
    model = described(source.config)
    # a file without an output matrix uses the embeddings, as a model does that ties them
    output = "lm_head.weight" in source.plain or "lm_head" in source.layouts
    tensors = len(source.plain) + len(source.layouts)
    if model["num_hidden_layers"] > tensors:  # no table is made for what may be any number
        raise BadInput(f"config.json: {tensors} tensors are too few for {model['num_hidden_layers']} layers")
    table = tensor_table(model, output or source.config.get("tie_word_embeddings") is False)
    _compare_names(source, {theirs for theirs, _ in table.values()}, model["model_type"])
    with tempfile.TemporaryDirectory(prefix="edgetool-") as scratch:
        source.write_side_files(Path(scratch))
        try:
            vocabulary = tokenizer_metadata(Path(scratch), source.config)
        except BadInput as error:  # by the file's own name: the directory is gone when this is read
            raise BadInput(error.message.replace(f"{scratch}/", ""), error.hint) from error
    names = {name: _origin(source, theirs) for name, (theirs, _) in table.items()}
    refused: dict[str, str] = {}

    def entry(item: tuple[str, tuple[str, tuple[int, ...]]]) -> Entry | None:
        name, (_, shape) = item
        kind, reason = _kind(source, names[name], shape)
        if reason is not None:
            refused[names[name]] = reason
        return None if kind is None else (name, kind, shape)

    entries = []
    with (progress or NullProgress()).task("plan", len(table), "tensor") as task:
        for made in _mapped(entry, list(table.items()), threads):
            entries += [] if made is None else [made]
            task.advance()
    if model["llama3"] is not None:
        names[gguf_rope.TENSOR] = gguf_rope.TENSOR
        entries.append((gguf_rope.TENSOR, "F32", (model["head_dim"] // 2,)))
    common = Counter(kind for _, kind, shape in entries if len(shape) == 2).most_common(1)
    file_type = FILE_TYPES[common[0][0]] if common else FILE_TYPES["F32"]
    return GgufPlan(
        metadata={**metadata(model), "general.file_type": file_type, **vocabulary},
        entries=tuple(entries),
        names=names,
        refused={name: refused[name] for name in names.values() if name in refused},
        warnings=tuple(remarks(source.config)),
    )


def write_gguf(
    source: Source,
    plan: GgufPlan,
    path: Path,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Write `plan` to `path`, at most `threads` tensors in memory at a time; any error leaves no file behind.

    The same source gives the same bytes. Raises Stopped at the next tensor once `stop_requested`, ValueError where
    `plan` refuses something, ResourceUnavailable when the disk is full.
    """
    if plan.refused:
        raise ValueError(f"cannot write what was refused: {sorted(plan.refused)[:5]}")
    model = described(source.config)
    with (
        disk_errors(path),
        (progress or NullProgress()).task("write GGUF", plan.output_bytes, "B") as task,
        GgufFileWriter(path, plan.metadata, plan.entries) as writer,
    ):

        def write(entry: Entry) -> int:
            if stop_requested():
                raise Stopped("stopped on request while the GGUF file was written; it begins anew the next time")
            writer.write(entry[0], _data(source, plan.names[entry[0]], entry, model))
            return tensor_bytes(entry)

        for nbytes in _mapped(write, plan.entries, threads):
            task.advance(nbytes)


def _compare_names(source: Source, wanted: set[str], architecture: str) -> None:
    held = {f"{module}.weight" for module in source.layouts} | set(source.plain)
    if missing := sorted(wanted - held):
        raise BadInput(f"tensor {missing[0]!r} is missing, which a GGUF file of {architecture} has")
    if extra := sorted(held - wanted):
        others = f" (and {len(extra) - 1} others)" if len(extra) > 1 else ""
        raise BadInput(f"tensor {extra[0]!r}{others} has no place in a GGUF file of {architecture}")


def _origin(source: Source, name: str) -> str:
    module = name.removesuffix(".weight")
    return module if module in source.layouts else name


def _kind(source: Source, name: str, shape: tuple[int, ...]) -> tuple[str | None, str | None]:
    """(GGUF type, why there is none)."""
    if name in source.layouts:
        layout = source.layouts[name]
        held: tuple[int, ...] = (layout.out_features, layout.in_features)
    else:
        held = source.plain[name].shape
    if held != shape:
        return None, f"has shape {list(held)}, config.json asks for {list(shape)}"
    if name in source.inexact:
        return None, source.inexact[name]
    if name in source.layouts:
        linear = source.linear(name)
        kind = gguf_blocks.kind_for(linear)
        return kind, gguf_blocks.refusal(linear) if kind is None else None
    dtype = source.plain[name].dtype
    if len(shape) == 1:
        return ("F32", None) if dtype in _VECTOR_DTYPES else (None, f"has dtype {dtype}, which F32 does not hold")
    return (dtype, None) if dtype in _MATRIX_TYPES else (None, f"has dtype {dtype}, which llama.cpp does not read")


def _data(source: Source, name: str, entry: Entry, model: Mapping[str, Any]) -> Iterator[Array]:
    """The tensor's bytes as they go into the file."""
    kind = entry[1]
    rows = gguf_rows(name, model)
    if name == gguf_rope.TENSOR:
        yield gguf_rope.divisors(model["llama3"], model["rope_theta"], model["head_dim"])
    elif name in source.layouts:
        stored = gguf_blocks.write(kind, source.linear(name))
        yield stored if rows is None else _placed(stored, rows)
    elif rows is None:
        yield from (_as(piece, source.plain[name].dtype, kind) for piece in source.plain[name].chunks())
    else:
        yield _placed(_whole(source.plain[name]), rows)


def _placed(stored: Array, rows: npt.NDArray[np.intp]) -> Array:
    """Row r of `stored` becomes row rows[r]."""
    placed = np.empty_like(stored)
    placed[rows] = stored
    return placed


def _whole(tensor: PlainTensor) -> Array:
    whole = np.empty(int(np.prod(tensor.shape)), dtype=NUMPY_DTYPES[tensor.dtype])
    done = 0
    for piece in tensor.chunks():
        whole[done : done + piece.size] = piece
        done += piece.size
    return whole.reshape(tensor.shape)


def _as(values: Array, dtype: str, kind: str) -> Array:
    """Values of safetensors' `dtype` as GGUF's `kind`, which is the same or F32."""
    if dtype == kind:
        return values
    return bfloat16_to_float32(values) if dtype == "BF16" else values.astype(np.float32)


def _mapped(work: Callable[[_In], _Out], items: Sequence[_In], threads: int) -> Iterator[_Out]:
    """The results of `work` in order; an error ends it without starting the rest."""
    pool = ThreadPoolExecutor(max(1, threads), "gguf")
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
