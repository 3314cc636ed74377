"""A GGUF file as verification reads it: by the `gguf` package's names and decoders.

Nothing comes from edgetool's own gguf/architecture.py, blocks.py and writer.py: an error in the order of
rows, the names, the blocks or the places would have to be made twice to go unseen. Only the header is read by
gguf/header.py, which shares nothing with the writer; the package's reader takes 14 s and 500 MB for 150 000 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.gguf.header import read_header
from edgetool.checkpoints.plain_reader import Rows
from edgetool.converter.sides import Values, Weights
from edgetool.errors import BadInput, MissingDependency

Array = npt.NDArray[Any]

_FLOATS: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
_OURS = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|mlp\.(gate|up|down)_proj"
    r"|self_attn\.([qkvo]_proj|[qk]_norm)))|lm_head"
)
_DERIVED = "rope_freqs.weight"  # follows from config.json, and is no tensor in Hugging Face's layout
_ROTATED = re.compile(r"self_attn\.([qk])_proj$")


@dataclass(frozen=True)
class GgufSide:
    """A GGUF file; see `sides.Side`. Nothing of the data has been read."""

    modules: Mapping[str, Mapping[str, str]]
    plain: Mapping[str, Values]
    metadata: Mapping[str, Any]
    _linears: Mapping[str, GgufWeights]

    @classmethod
    def open(cls, path: Path, linears: Collection[str], dtype: str = "F16") -> GgufSide:
        """Open `path`. linears: the modules whose values are to be compared as quantised linears.

        dtype: what quantised tensors besides those are rounded to, from float32, once. Raises BadInput for a file that
        cannot be read, MissingDependency without the `gguf` package.
        """
        try:
            import gguf
        except ImportError:
            raise MissingDependency(
                "reading GGUF files needs the package gguf", "pip install 'edgetool[demo]'"
            ) from None
        metadata, table = read_header(path)
        try:
            arch = metadata["general.architecture"]
            by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
            layers = int(metadata[f"{arch}.block_count"])
            if layers > len(table):  # a damaged count must not make a table of its own size
                raise ValueError(f"{len(table)} tensors are too few for {layers} layers")
            mapping = gguf.get_tensor_name_map(by_name[arch], layers).mapping
            names = {theirs: ours for ours, (_, theirs) in mapping.items() if _OURS.fullmatch(ours)}
            tensors = {}
            for row in table:
                if row.name == _DERIVED:
                    continue
                stem, _, suffix = row.name.rpartition(".")
                module = names.get(stem, f"GGUF tensor {stem}")
                kind = gguf.GGMLQuantizationType(row.type_number)
                heads = _heads(metadata, arch, module)
                tensors[f"{module}.{suffix}"] = GgufWeights(path, row.name, row.shape, kind.name, row.offset, heads)
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise BadInput(f"{path}: cannot be read as GGUF: {error}") from error
        found = {name.removesuffix(".weight"): weights for name, weights in tensors.items()}
        chosen = {module: weights for module, weights in found.items() if module in linears}
        return cls(
            modules={module: {"codes": weights.name} for module, weights in chosen.items()},
            plain={
                name: weights.values(dtype)
                for name, weights in tensors.items()
                if name.removesuffix(".weight") not in chosen
            },
            metadata=metadata,
            _linears=chosen,
        )

    def linear(self, module: str) -> Weights:
        return self._linears[module]


@dataclass(frozen=True)
class GgufWeights:
    """One tensor of the file. offset: in bytes. heads: how many heads' rows llama.cpp has interleaved, or 0."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    heads: int

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    def weight(self, rows: Rows) -> Array:
        """float32 [len(rows), in_features], rows in Hugging Face's order."""
        if len(self.shape) == 1:
            return self._decoded(0, 1)
        wanted = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        if self.heads:
            # row i of the first half of a head is stored at 2 * i, of the second half at 2 * i + 1
            size = self.out_features // self.heads
            head, inside = wanted // size, wanted % size
            wanted = head * size + inside % (size // 2) * 2 + inside // (size // 2)
        first = int(wanted.min())
        decoded: Array = self._decoded(first, int(wanted.max()) + 1)[wanted - first]
        return decoded

    def values(self, dtype: str) -> Values:
        """The tensor as one that is no quantised linear: floats as they are stored, others rounded to `dtype`."""
        return Values(self.kind if self.kind in _FLOATS else dtype, self.shape, partial(self._pieces, dtype))

    def _pieces(self, dtype: str, count: int) -> Iterator[Array]:
        rows = 1 if len(self.shape) == 1 else self.out_features
        step = max(1, count // self.in_features)
        kept = np.empty(0, dtype=_FLOATS[self.kind if self.kind in _FLOATS else dtype])
        for start in range(0, rows, step):
            made = _rounded(self.weight(slice(start, min(start + step, rows))), kept.dtype)
            kept = np.concatenate([kept, made.reshape(-1)])
            whole = len(kept) if start + step >= rows else len(kept) // count * count
            yield from (kept[begin : min(begin + count, whole)] for begin in range(0, whole, count))
            kept = kept[whole:]

    def _decoded(self, start: int, stop: int) -> Array:
        """float32 [stop - start, in_features] in the file's own order."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.kind]
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = self.in_features // block_values * block_bytes
        stored = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=self.offset + start * row_bytes)
        if len(stored) != (stop - start) * row_bytes:
            raise BadInput(f"{self.path}: {self.name} is cut off")
        decoded: Array = dequantize(stored.reshape(stop - start, row_bytes), kind)
        return decoded


def _heads(metadata: Mapping[str, Any], arch: str, module: str) -> int:
    match = _ROTATED.search(module)
    if arch != "llama" or match is None:
        return 0
    heads = metadata[f"{arch}.attention.head_count"]
    return int(heads if match[1] == "q" else metadata.get(f"{arch}.attention.head_count_kv", heads))


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """float32 to the nearest float16, bfloat16 (as uint16) or itself."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
