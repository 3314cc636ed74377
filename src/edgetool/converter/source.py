"""What is converted: one interface for checkpoints in Hugging Face layout and for GGUF files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.detect import (
    ModuleLayout,
    QuantizationFound,
    detect,
    module_format,
    read_linear,
    read_rest,
    read_stored,
)
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.scratch import Scratch
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorInfo, iter_chunks, read_tensor
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

FLOAT_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
"""safetensors dtype -> what a checkpoint that is mostly made of it is called."""

_GPTQ = ("gptq", "gptq_v2")
_WORDS_AND_BYTES = {"I32", "U32", "U8", "I8"}


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that belongs to no quantised linear.

    dtype: the safetensors name under which its values are delivered. pieces() gives them as flat consecutive arrays of
    numpy dtype NUMPY_DTYPES[dtype] (BF16 as uint16), a few MiB each, from the start at each call and from any thread.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]] = field(repr=False)

    def chunks(self) -> Iterator[Array]:
        """The values in order, as flat arrays."""
        return self.pieces()


class Source(Protocol):
    """A model that can be converted. Reading is safe from several threads."""

    @property
    def format(self) -> str:
        """gptq, gptq_v2, awq, compressed-tensors, gguf, or fp16, bf16, fp32 where nothing is quantised."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json; for a GGUF file what it would be."""

    @property
    def spec(self) -> Spec | None:
        """What holds for most quantised linears; None when there are none."""

    @property
    def layouts(self) -> Mapping[str, ModuleLayout]:
        """Every quantised linear, also those of `inexact`; group_size is the actual one."""

    @property
    def inexact(self) -> Mapping[str, str]:
        """Module -> why it has no integer codes with a scale and a zero for each group (K-quants, for example)."""

    @property
    def plain(self) -> Mapping[str, PlainTensor]:
        """Every tensor that belongs to no quantised linear, by name; biases are among them."""

    @property
    def order(self) -> Sequence[str]:
        """Names of modules and plain tensors in the order of the files; a module once, at its first tensor."""

    @property
    def disagreements(self) -> tuple[str, ...]:
        """Sentences about a configuration that says something else than the tensors."""

    @property
    def files(self) -> Sequence[Path]:
        """The weight files."""

    def linear(self, module: str) -> QuantizedLinear:
        """A quantised linear. Raises BadInput for one that is `inexact`."""

    def weight(self, module: str) -> Array:
        """Any quantised linear's weights, float32 [out_features, in_features]."""

    def rest(self, module: str) -> QuantizedLinear:
        """The same for planning: codes may be absent (`absent_codes`) where they can be done without."""

    def write_side_files(self, directory: Path) -> None:
        """Tokenizer, generation config, chat template and so on; not config.json."""


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint directory; see `Source`. `found` is None when nothing in it is quantised."""

    checkpoint: Checkpoint
    found: QuantizationFound | None
    format: str
    layouts: Mapping[str, ModuleLayout]
    plain: Mapping[str, PlainTensor]
    order: Sequence[str]
    disagreements: tuple[str, ...]
    inexact: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, from_: str = "auto") -> CheckpointSource:
        """Open the checkpoint at `path`; `from_` overrules what the zeros suggest about GPTQ's version.

        Raises BadInput for a damaged checkpoint, for one whose tensors are in no known format, and for a `from_` that
        the tensors' shapes contradict.
        """
        checkpoint = Checkpoint.open(path)
        tensors, read, config = checkpoint.tensors, checkpoint.read, checkpoint.config
        found = detect(tensors, read, config)
        if found is None:
            return cls._unquantized(checkpoint, from_)
        if from_ in _GPTQ and found.format in _GPTQ:
            found = detect(tensors, read, config, written_as=from_) or found
        elif from_ not in ("auto", found.format):
            raise BadInput(
                f"{path}: --from {from_} was given, and the shapes of its tensors are those of {found.format}",
                "leave --from out",
            )
        owned = {
            f"{module}.{suffix}": module
            for module, layout in found.layouts.items()
            for suffix in _suffixes(layout)
            if f"{module}.{suffix}" in tensors
        }
        order = list(dict.fromkeys(owned.get(name, name) for name in tensors))
        plain = {name: _plain(info) for name, info in tensors.items() if name not in owned}
        return cls(checkpoint, found, found.format, found.layouts, plain, order, found.disagreements)

    @classmethod
    def _unquantized(cls, checkpoint: Checkpoint, from_: str) -> CheckpointSource:
        tensors = checkpoint.tensors
        claim = claimed_quantization(checkpoint.config)
        packed = [
            info.name
            for info in tensors.values()
            if len(info.shape) == 2 and (info.dtype.startswith("F8") or info.dtype in _WORDS_AND_BYTES)
        ]
        if packed:
            said = f"config.json says {claim.get('quant_method', 'unknown')}; " if claim is not None else ""
            raise BadInput(
                f"{checkpoint.directory}: {packed[0]} ({tensors[packed[0]].dtype}) is packed in a way that edgetool"
                f" does not read ({said}known are {', '.join(FORMATS)}, GGUF and plain floats)"
            )
        sizes = dict.fromkeys(FLOAT_NAMES, 0)
        for info in tensors.values():
            if info.dtype in sizes:
                sizes[info.dtype] += info.nbytes
        name = FLOAT_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]
        if from_ not in ("auto", name):
            raise BadInput(
                f"{checkpoint.directory}: --from {from_} was given, and nothing in it is quantised ({name})",
                "leave --from out",
            )
        notes: tuple[str, ...] = ()
        if claim is not None:
            method = claim.get("quant_method", "quantised")
            notes = (f"config.json says {method}, the tensors are plain {name}",)
        plain = {info.name: _plain(info) for info in tensors.values()}
        return cls(checkpoint, None, name, {}, plain, list(tensors), notes)

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return self.checkpoint.config

    @property
    def spec(self) -> Spec | None:
        """What holds for most quantised linears; None when there are none."""
        return None if self.found is None else self.found.spec

    @property
    def files(self) -> Sequence[Path]:
        """The weight files."""
        return self.checkpoint.weight_files

    def linear(self, module: str) -> QuantizedLinear:
        """A quantised linear in canonical form."""
        return read_linear(self.checkpoint, module, self._quantized())

    def weight(self, module: str) -> Array:
        """A quantised linear's weights, float32 [out_features, in_features]."""
        return self.linear(module).dequantize()

    def rest(self, module: str) -> QuantizedLinear:
        """The linear, checked as `linear` does, but with `absent_codes`; its codes are not read."""
        return read_rest(self.checkpoint, module, self._quantized())

    def format_of(self, module: str) -> tuple[str, Spec]:
        """The name in FORMATS of this very module's layout, and the specification to read it with."""
        entry, spec = module_format(self._quantized(), module)
        return entry.name, spec

    def packed(self, module: str, scratch: Scratch | None = None) -> dict[str, Array]:
        """The module's tensors as they are stored, by suffix (BF16 as uint16).

        scratch: where its codes are put; they are then good until the thread's next call.
        """
        codes, *others = FORMATS[self.format_of(module)[0]].suffixes
        info = self.checkpoint.tensors[f"{module}.{codes}"]
        out = None if scratch is None else scratch.empty("packed", info.shape, NUMPY_DTYPES[info.dtype])
        return {codes: read_tensor(info, out), **read_stored(self.checkpoint, module, others)}

    def write_side_files(self, directory: Path) -> None:
        """Copy tokenizer, generation config, chat template and so on into `directory`."""
        with disk_errors(directory):
            for path in self.checkpoint.side_files:
                shutil.copyfile(path, directory / path.name)

    def _quantized(self) -> QuantizationFound:
        if self.found is None:
            raise BadInput(f"{self.checkpoint.directory}: nothing in it is quantised")
        return self.found


def _suffixes(layout: ModuleLayout) -> tuple[str, ...]:
    return FORMATS[layout.kind].suffixes


def _plain(info: TensorInfo) -> PlainTensor:
    return PlainTensor(info.name, info.dtype, info.shape, partial(iter_chunks, info))
