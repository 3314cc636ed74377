"""The table of storage formats: one entry a format, one interface for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints import awq_format, compressed_tensors_format, gptq_format
from edgetool.checkpoints.canonical import BITS, QuantizedLinear
from edgetool.errors import BadInput

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """What a whole checkpoint is quantised to; `group_size` as the user gave it (-1: one group a row)."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    """Whether any layer's g_idx is not trivial, i.e. an activation order that a kernel must follow at run time."""


class Format(Protocol):
    """One storage format, without state."""

    @property
    def name(self) -> str:
        """As in `--format` and in reports."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Tensor names after `<module>.`, in the order of the file; a layer may lack the optional ones."""

    @property
    def side_config(self) -> str | None:
        """Name of a second file that repeats `quantization_config`, for readers that look there."""

    def check(self, spec: Spec) -> str | None:
        """Why no new checkpoint should be made of this kind, or None. Known before any layer is quantised."""

    def refusal(self, linear: QuantizedLinear, spec: Spec) -> str | None:
        """Why this very layer cannot be stored in a checkpoint of this kind, or None."""

    def read(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        """The layer that `tensors` (suffix -> array; uint16 means bfloat16 bits) holds. Raises BadInput naming it."""

    def read_rest(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        """What `read` gives, checked as there, but with `absent_codes`: for those who move the packed words alone."""

    def write_rest(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        """What `write` gives, refused as there, but without the packed codes (the first of `suffixes`)."""

    def write(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        """Suffix -> array (uint16 means bfloat16 bits). Raises BadInput where `refusal` has a reason."""

    def layout(self, out_features: int, in_features: int, spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (safetensors dtype, shape) of what `write` gives for a layer with float16 scales."""

    def quantization_config(self, spec: Spec, ignore: Sequence[str]) -> dict[str, Any]:
        """What goes into config.json. ignore: modules left in 16 bit, with all below them and under any prefix."""


def _groups(in_features: int, spec: Spec) -> int:
    return 1 if spec.group_size == -1 else -(-in_features // spec.group_size)


@dataclass(frozen=True)
class _Gptq:
    version: int
    suffixes: tuple[str, ...] = gptq_format.SUFFIXES
    side_config: str | None = "quantize_config.json"

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def check(self, spec: Spec) -> str | None:
        return None if spec.bits in BITS else f"GPTQ has no {spec.bits}-bit layout"

    def refusal(self, linear: QuantizedLinear, spec: Spec) -> str | None:
        return gptq_format.refusal(linear, self.version) or _sym_refusal(linear, spec)

    def read(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return gptq_format.read(tensors, spec.bits, 2 - self.version, group_size=spec.group_size, name=name)

    def read_rest(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return gptq_format.read_rest(tensors, spec.bits, 2 - self.version, group_size=spec.group_size, name=name)

    def write(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        _raise(_sym_refusal(linear, spec), name)
        return gptq_format.write(linear, self.version, name)

    def write_rest(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        _raise(_sym_refusal(linear, spec), name)
        return gptq_format.write_rest(linear, self.version, name)

    def layout(self, out_features: int, in_features: int, spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = _groups(in_features, spec)
        return {
            "qweight": ("I32", (in_features * spec.bits // 32, out_features)),
            "qzeros": ("I32", (groups, out_features * spec.bits // 32)),
            "scales": ("F16", (groups, out_features)),
            "g_idx": ("I32", (in_features,)),
        }

    def quantization_config(self, spec: Spec, ignore: Sequence[str]) -> dict[str, Any]:
        return gptq_format.quantization_config(
            bits=spec.bits,
            group_size=spec.group_size,
            sym=spec.sym,
            desc_act=spec.desc_act,
            version=self.version,
            ignore=ignore,
            lm_head="lm_head" not in ignore,
        )


@dataclass(frozen=True)
class _Awq:
    name: str = "awq"
    suffixes: tuple[str, ...] = awq_format.SUFFIXES
    side_config: str | None = None

    def check(self, spec: Spec) -> str | None:
        if spec.bits != awq_format.BITS:
            return f"AWQ's gemm layout has 4-bit codes only, not {spec.bits}"
        if spec.desc_act:
            return "AWQ has no g_idx, so groups in activation order cannot be stored"
        return None

    def refusal(self, linear: QuantizedLinear, spec: Spec) -> str | None:
        return awq_format.refusal(linear)

    def read(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return awq_format.read(tensors, group_size=spec.group_size, name=name)

    def read_rest(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return awq_format.read_rest(tensors, group_size=spec.group_size, name=name)

    def write(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        return awq_format.write(linear, name)

    def write_rest(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        return awq_format.write_rest(linear, name)

    def layout(self, out_features: int, in_features: int, spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = _groups(in_features, spec)
        return {
            "qweight": ("I32", (in_features, out_features // 8)),
            "qzeros": ("I32", (groups, out_features // 8)),
            "scales": ("F16", (groups, out_features)),
        }

    def quantization_config(self, spec: Spec, ignore: Sequence[str]) -> dict[str, Any]:
        return awq_format.quantization_config(group_size=spec.group_size, ignore=ignore)


@dataclass(frozen=True)
class _CompressedTensors:
    name: str = "compressed-tensors"
    suffixes: tuple[str, ...] = compressed_tensors_format.SUFFIXES
    side_config: str | None = None

    def check(self, spec: Spec) -> str | None:
        if spec.bits not in BITS:
            return f"pack-quantized with {spec.bits} bits is not supported"
        if spec.desc_act and spec.group_size != -1:
            return "compressed-tensors 0.19 and vLLM 0.32 no longer read groups in activation order (weight_g_idx)"
        return None

    def refusal(self, linear: QuantizedLinear, spec: Spec) -> str | None:
        return compressed_tensors_format.refusal(linear, spec.sym)

    def read(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return compressed_tensors_format.read(tensors, spec.bits, group_size=spec.group_size, name=name)

    def read_rest(self, tensors: Mapping[str, Array], spec: Spec, name: str = "") -> QuantizedLinear:
        return compressed_tensors_format.read_rest(tensors, spec.bits, group_size=spec.group_size, name=name)

    def write(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        return compressed_tensors_format.write(linear, spec.sym, name)

    def write_rest(self, linear: QuantizedLinear, spec: Spec, name: str = "") -> dict[str, Array]:
        return compressed_tensors_format.write_rest(linear, spec.sym, name)

    def layout(self, out_features: int, in_features: int, spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = _groups(in_features, spec)
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out_features, -(-in_features * spec.bits // 32))),
            "weight_scale": ("F16", (out_features, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not spec.sym:
            tensors["weight_zero_point"] = ("I32", (-(-out_features * spec.bits // 32), groups))
        if spec.desc_act:
            tensors["weight_g_idx"] = ("I32", (in_features,))
        return tensors

    def quantization_config(self, spec: Spec, ignore: Sequence[str]) -> dict[str, Any]:
        return compressed_tensors_format.quantization_config(
            bits=spec.bits, group_size=spec.group_size, sym=spec.sym, desc_act=spec.desc_act, ignore=ignore
        )


FORMATS: dict[str, Format] = {
    entry.name: entry for entry in (_Gptq(version=1), _Gptq(version=2), _Awq(), _CompressedTensors())
}
"""Format name -> format: gptq, gptq_v2, awq, compressed-tensors."""


def stored_dtype(array: Array) -> str:
    """safetensors' name of the dtype of an array that `Format.write` returned (uint16 stands for BF16)."""
    return _STORED[array.dtype.type]


_STORED: dict[type, str] = {
    np.int32: "I32",
    np.int64: "I64",
    np.float16: "F16",
    np.float32: "F32",
    np.uint16: "BF16",
}


def _sym_refusal(linear: QuantizedLinear, spec: Spec) -> str | None:
    # GPTQ kernels do not look at qzeros when the configuration says sym.
    if spec.sym and not linear.sym:
        return f"the layer is asymmetric (not every zero is {1 << (linear.bits - 1)}) in a symmetric checkpoint"
    return None


def _raise(reason: str | None, name: str) -> None:
    if reason is not None:
        raise BadInput(f"{reason} ({name})" if name else reason)
