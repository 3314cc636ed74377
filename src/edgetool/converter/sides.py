"""The two sides of a conversion, opened again for verification and read by the plain reader alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.plain_reader import SUFFIXES, PlainLinear, Rows, read_stored
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorInfo, iter_chunks

Array = npt.NDArray[Any]


class Weights(Protocol):
    """A quantised linear of which only the values are known."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    def weight(self, rows: Rows) -> Array:
        """float32 [len(rows), in_features]."""


@dataclass(frozen=True)
class Values:
    """A tensor that belongs to no quantised linear.

    dtype: safetensors' name. pieces(count) gives its values as flat arrays of `count` (the last one: of the rest),
    numpy dtype NUMPY_DTYPES[dtype], in order.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[int], Iterator[Array]] = field(repr=False)

    def whole(self) -> Array:
        """All values at once, of `shape`."""
        return np.concatenate([np.empty(0, NUMPY_DTYPES[self.dtype]), *self.pieces(1 << 24)]).reshape(self.shape)


class Side(Protocol):
    """A model that has been read back. Names are those of the Hugging Face layout."""

    @property
    def modules(self) -> Mapping[str, Mapping[str, str]]:
        """Quantised linear -> its parts (codes, zeros, scales, g_idx, shape) -> names of the tensors that hold them."""

    @property
    def plain(self) -> Mapping[str, Values]:
        """Every other tensor."""

    def linear(self, module: str) -> PlainLinear | Weights: ...


_PARTS = {
    "qweight": "codes",
    "weight_packed": "codes",
    "qzeros": "zeros",
    "weight_zero_point": "zeros",
    "scales": "scales",
    "weight_scale": "scales",
    "g_idx": "g_idx",
    "weight_g_idx": "g_idx",
    "weight_shape": "shape",
}


@dataclass(frozen=True)
class CheckpointSide:
    """A checkpoint directory; see `Side`. kinds: module -> gptq, gptq_v2, awq or compressed-tensors."""

    tensors: Mapping[str, TensorInfo]
    kinds: Mapping[str, str]
    modules: Mapping[str, Mapping[str, str]]
    plain: Mapping[str, Values]
    meant: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, format_name: str, meant: Mapping[str, tuple[int, int]]) -> CheckpointSide:
        """format_name decides GPTQ's version. meant: the quantised linears and their (bits, group_size)."""
        tensors = checkpoint.tensors
        kinds = {}
        for name in tensors:
            module, _, suffix = name.rpartition(".")
            if suffix == "weight_packed":
                kinds[module] = "compressed-tensors"
            elif suffix == "qweight":
                scales = tensors.get(f"{module}.scales")
                along_inputs = scales is not None and tensors[name].shape[-1:] == scales.shape[-1:]
                kinds[module] = ("gptq_v2" if format_name == "gptq_v2" else "gptq") if along_inputs else "awq"
        modules = {
            module: {_PARTS[suffix]: full for suffix in SUFFIXES[kind] if (full := f"{module}.{suffix}") in tensors}
            for module, kind in kinds.items()
        }
        owned = {name for parts in modules.values() for name in parts.values()}
        plain = {name: _values(info) for name, info in tensors.items() if name not in owned}
        return cls(tensors, kinds, modules, plain, meant)

    def linear(self, module: str) -> PlainLinear:
        bits, group_size = self.meant[module]
        return read_stored(self.tensors, module, self.kinds[module], bits, group_size)


def _values(info: TensorInfo) -> Values:
    itemsize = NUMPY_DTYPES[info.dtype].itemsize
    return Values(info.dtype, info.shape, lambda count: iter_chunks(info, count * itemsize))
