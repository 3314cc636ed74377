"""The table of storage formats: one entry a format, one interface for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints import gptq_format
from edgetool.checkpoints.canonical import QuantizedLinear

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """What a whole checkpoint is quantised to; `group_size` as the user gave it (-1: one group a row)."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    """Whether any layer's g_idx is not trivial, i.e. activation order that a kernel must follow at run time."""


@dataclass(frozen=True)
class Format:
    """One storage format.

    name: as in `--format` and in reports. suffixes: tensor names after `<module>.`, in the order of the file.
    read(tensors, spec, name) -> QuantizedLinear; tensors maps suffix -> array. Raises BadInput.
    write(linear, name) -> suffix -> array (uint16 means bfloat16 bits). Raises BadInput where `refusal` has a reason.
    refusal(linear) -> why this layer cannot be stored, or None.
    check(spec) -> why no checkpoint of this kind can be stored, or None; known before any layer is quantised.
    quantization_config(spec, ignore) -> what goes into config.json. ignore: module names or name endings in 16 bit.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Mapping[str, Array], Spec, str], QuantizedLinear]
    write: Callable[[QuantizedLinear, str], dict[str, Array]]
    refusal: Callable[[QuantizedLinear], str | None]
    check: Callable[[Spec], str | None]
    quantization_config: Callable[[Spec, Sequence[str]], dict[str, Any]]
    side_config: str | None = None
    """Name of a second file that repeats quantization_config, for readers that look there."""


def _gptq(version: int) -> Format:
    name = "gptq" if version == 1 else "gptq_v2"

    def read(tensors: Mapping[str, Array], spec: Spec, where: str) -> QuantizedLinear:
        return gptq_format.read(tensors, spec.bits, 2 - version, group_size=spec.group_size, name=where)

    def config(spec: Spec, ignore: Sequence[str]) -> dict[str, Any]:
        return gptq_format.quantization_config(
            bits=spec.bits,
            group_size=spec.group_size,
            sym=spec.sym,
            desc_act=spec.desc_act,
            version=version,
            ignore=ignore,
            lm_head="lm_head" not in ignore,
        )

    return Format(
        name=name,
        suffixes=gptq_format.SUFFIXES,
        read=read,
        write=lambda linear, where: gptq_format.write(linear, version, where),
        refusal=lambda linear: gptq_format.refusal(linear, version),
        check=lambda spec: None if spec.bits in (2, 3, 4, 8) else f"GPTQ has no {spec.bits}-bit layout",
        quantization_config=config,
        side_config="quantize_config.json",
    )


FORMATS: dict[str, Format] = {entry.name: entry for entry in (_gptq(1), _gptq(2))}
"""Format name -> format."""


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
