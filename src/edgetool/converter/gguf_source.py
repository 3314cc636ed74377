"""A GGUF file as a source of conversions: codes where its blocks have them, values where they have not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.bfloat16 import float32_to_bfloat16
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.detect import ModuleLayout
from edgetool.checkpoints.formats import Spec
from edgetool.checkpoints.gguf import blocks as gguf_blocks
from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.architecture import gguf_rows, model_config, target_names
from edgetool.checkpoints.gguf.file import GgufFile, GgufTensor
from edgetool.checkpoints.gguf.importing import side_documents, to_half, write_json
from edgetool.converter.source import PlainTensor
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

_FLOATS = {"F16", "BF16", "F32"}
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file; see `source.Source`.

    Q4_0, Q4_1 whose minima are integer multiples of their scales, and Q8_0 linears have codes in groups of 32; all
    other quantised linears are `inexact` and give values only. `config` and the tokenizer's files are those that the
    import writes. Rows of q and k are in Hugging Face's order. Norms, embeddings and the output matrix are plain.
    """

    file: GgufFile
    config: Mapping[str, Any]
    spec: Spec | None
    layouts: Mapping[str, ModuleLayout]
    inexact: Mapping[str, str]
    plain: Mapping[str, PlainTensor]
    order: Sequence[str]
    _tensors: Mapping[str, GgufTensor] = field(repr=False)
    _side_documents: Mapping[str, Mapping[str, Any]] = field(repr=False)
    format: str = "gguf"
    disagreements: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, dtype: str = "F16") -> GgufSource:
        """Open the file at `path`; of the data only vectors and the minima of Q4_1 blocks are read.

        dtype: F16, BF16 or F32, into which quantised embeddings and a quantised output matrix are rounded, once, from
        float32. Tensors that are floats in the file keep their values exactly: F32 is delivered as F16 where that
        holds all of its values. Raises BadInput for a file that is damaged or describes a model or tokenizer that is
        not known, MissingDependency without the `gguf` package.
        """
        file, where = GgufFile.open(path), str(path)
        config = model_config(file.metadata, file.tensors, where, file.vector(gguf_rope.TENSOR))
        names = target_names(config, file.tensors, where)
        config |= {"torch_dtype": _TORCH_NAMES[dtype], "dtype": _TORCH_NAMES[dtype]}
        documents = side_documents(file.metadata, config, where)
        tensors: dict[str, GgufTensor] = {}
        layouts: dict[str, ModuleLayout] = {}
        inexact: dict[str, str] = {}
        plain: dict[str, PlainTensor] = {}
        for tensor in file.tensors.values():
            if tensor.name not in names:
                continue
            name = names[tensor.name]
            if name.endswith("_proj.weight") and tensor.kind not in _FLOATS:
                name = name.removesuffix(".weight")
                layouts[name] = _layout(tensor)
                if (reason := _inexact(file, tensor)) is not None:
                    inexact[name] = reason
            else:
                delivered = _delivered(file, tensor, dtype)
                pieces = partial(_pieces, file, tensor, gguf_rows(name, config), delivered)
                plain[name] = PlainTensor(name, delivered, tensor.shape, pieces)
            tensors[name] = tensor
        return cls(
            file=file,
            config=documents.pop("config.json"),
            spec=_spec(layouts, tensors),
            layouts=layouts,
            inexact=inexact,
            plain=plain,
            order=list(tensors),
            _tensors=tensors,
            _side_documents=documents,
        )

    @property
    def files(self) -> Sequence[Path]:
        """The file itself."""
        return [self.file.path]

    def linear(self, module: str) -> QuantizedLinear:
        """A quantised linear in canonical form, groups of 32. Raises BadInput for one that is `inexact`."""
        self._refuse_inexact(module)
        tensor = self._tensors[module]
        return gguf_blocks.read(tensor.kind, self.file.rows(tensor, self._rows(module)), self._blame(module))

    def weight(self, module: str) -> Array:
        """A quantised linear's weights as the `gguf` package decodes them, float32 [out_features, in_features]."""
        tensor, rows = self._tensors[module], self._rows(module)
        weight = np.empty(tensor.shape, dtype=np.float32)
        for block in _row_blocks(tensor):
            weight[block] = self.file.float32(tensor, rows[block])
        return weight

    def rest(self, module: str) -> QuantizedLinear:
        """The same: codes, scales and zeros lie in one block."""
        return self.linear(module)

    def write_side_files(self, directory: Path) -> None:
        """Write generation_config.json, tokenizer.json and tokenizer_config.json into `directory`."""
        with disk_errors(directory):
            for name, document in self._side_documents.items():
                write_json(directory / name, document)

    def _rows(self, module: str) -> npt.NDArray[np.intp]:
        rows = gguf_rows(module, self.config)
        return np.arange(self._tensors[module].shape[0]) if rows is None else rows

    def _refuse_inexact(self, module: str) -> None:
        if module in self.inexact:
            raise BadInput(f"{self._blame(module)}: {self.inexact[module]}")

    def _blame(self, module: str) -> str:
        return f"{self.file.path}: {module}"


def _layout(tensor: GgufTensor) -> ModuleLayout:
    """Shape and width of a quantised linear; of types without canonical codes the nominal width (Q6_K: 6)."""
    digit = re.search(r"\d", tensor.kind)
    rows, columns = tensor.shape
    bits = int(digit[0]) if digit else 0
    return ModuleLayout("gguf", bits, rows, columns, min(gguf_blocks.BLOCK, columns), g_idx_trivial=True)


def _inexact(file: GgufFile, tensor: GgufTensor) -> str | None:
    if tensor.kind not in gguf_blocks.CODE_BITS:
        return f"type {tensor.kind} has no integer codes with one scale and one zero for each group of 32"
    if tensor.kind != "Q4_1":
        return None
    for block in _row_blocks(tensor):
        if gguf_blocks.inexact_minima(file.rows(tensor, range(block.start, block.stop))):
            return "minima of its Q4_1 blocks are no integer multiples of their scales, so there are no integer zeros"
    return None


def _spec(layouts: Mapping[str, ModuleLayout], tensors: Mapping[str, GgufTensor]) -> Spec | None:
    if not layouts:
        return None
    bits, _ = Counter(layout.bits for layout in layouts.values()).most_common(1)[0]
    sym = all(tensors[module].kind in ("Q4_0", "Q8_0") for module in layouts)
    return Spec(bits=bits, group_size=gguf_blocks.BLOCK, sym=sym)


def _delivered(file: GgufFile, tensor: GgufTensor, dtype: str) -> str:
    """safetensors' name of the dtype that a plain tensor gets."""
    if tensor.kind not in _FLOATS:
        return dtype
    if tensor.kind != "F32":
        return tensor.kind
    for block in _row_blocks(tensor):
        values = file.float32(tensor, range(block.start, block.stop))
        with np.errstate(over="ignore"):
            # of equal numbers only zeros differ in their bits, and float16 has both of them
            if not np.array_equal(values.astype(np.float16), values):
                return "F32"
    return "F16"


def _pieces(file: GgufFile, tensor: GgufTensor, rows: npt.NDArray[np.intp] | None, dtype: str) -> Iterator[Array]:
    """The values, a few MiB at a time, flat, as `dtype`."""
    for block in _row_blocks(tensor):
        wanted = range(block.start, block.stop) if rows is None else rows[block]
        yield _as(file.float32(tensor, wanted), dtype, f"{file.path}: tensor {tensor.name!r}").reshape(-1)


def _as(values: npt.NDArray[np.float32], dtype: str, where: str) -> Array:
    if dtype == "F16":
        return to_half(values, where)
    return float32_to_bfloat16(values) if dtype == "BF16" else values


def _row_blocks(tensor: GgufTensor) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // tensor.shape[-1])
    return (slice(start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))
