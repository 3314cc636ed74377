"""GPTQ's tensors: `qweight`, `qzeros`, `scales`, `g_idx` of each linear layer.

    qweight  int32 [in_features * bits / 32, out_features]   codes packed along the input channels, low bits first
    qzeros   int32 [n_groups, out_features * bits / 32]      zeros packed along the output channels, low bits first
    scales   float16 [n_groups, out_features]
    g_idx    int32 [in_features]                             group of each input channel

Version 1 (`checkpoint_format: gptq`) stores zero - 1, version 2 (`gptq_v2`) stores the zero itself. The layout is that
of AutoGPTQ 0.7 and gptqmodel 7.6 (bits 2, 3, 4, 8; 3 bits as a stream of 32 codes in 3 words).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import BITS, QuantizedLinear, absent_codes, normal_g_idx
from edgetool.checkpoints.packing import pack_rows, unpack_rows, words_per_row
from edgetool.checkpoints.scale_storage import loaded_scales, stored_scales
from edgetool.errors import BadInput

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

Array = npt.NDArray[Any]


def read(
    tensors: Mapping[str, Array], bits: int, zero_offset: int, group_size: int | None = None, name: str = ""
) -> QuantizedLinear:
    """The layer that `tensors` (suffix -> array, see the module's text; g_idx optional) holds.

    zero_offset: 1 for version 1, 0 for version 2; see `detect` for finding out which.
    group_size: channels a group, or -1 for one group; only needed where g_idx is missing and the last group is short.
    A stored version 1 zero of 2**bits - 1 reads as 0 (AutoGPTQ's mask), field by field.
    Raises BadInput, naming `name`, when a tensor is missing or its shape or dtype does not fit the others.
    """
    rest = read_rest(tensors, bits, zero_offset, group_size, name)
    return replace(rest, codes=unpack_rows(tensors["qweight"].T, bits, rest.in_features))


def read_rest(
    tensors: Mapping[str, Array], bits: int, zero_offset: int, group_size: int | None = None, name: str = ""
) -> QuantizedLinear:
    """What `read` gives, checked as there, but with `absent_codes`."""
    qweight, qzeros = (_words(tensors, suffix, name) for suffix in ("qweight", "qzeros"))
    if bits not in BITS:
        raise BadInput(f"GPTQ with {bits} bits{_of(name)}; must be one of {', '.join(map(str, BITS))}")
    if "scales" not in tensors:
        raise BadInput(f"no scales{_of(name)}")
    scales, scale_dtype = loaded_scales(tensors["scales"], name)
    if scales.ndim != 2:
        raise BadInput(f"scales have shape {scales.shape}; must be [n_groups, out_features]{_of(name)}")
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = scales.shape[0]
    if qweight.shape[0] * 32 % bits or 0 in qweight.shape:
        raise BadInput(f"qweight has {qweight.shape[0]} rows; {bits}-bit codes need a multiple of {bits}{_of(name)}")
    if scales.shape[1] != out_features:
        raise BadInput(f"scales have shape {scales.shape}; qweight has {out_features} output channels{_of(name)}")
    if qzeros.shape != (groups, words_per_row(out_features, bits)):
        needed = (groups, words_per_row(out_features, bits))
        raise BadInput(f"qzeros have shape {qzeros.shape}; must be {needed}{_of(name)}")
    g_idx = tensors.get("g_idx")
    if g_idx is not None and g_idx.size == 0:
        g_idx = None
    if g_idx is not None and (g_idx.shape != (in_features,) or g_idx.dtype != np.int32):
        raise BadInput(f"g_idx is {g_idx.dtype} {g_idx.shape}; must be int32 {(in_features,)}{_of(name)}")
    size = _group_size(group_size, in_features, groups, g_idx, name)
    zeros = read_zeros(qzeros, bits, out_features, zero_offset)
    linear = QuantizedLinear(
        codes=absent_codes(out_features, in_features),
        scales=np.ascontiguousarray(scales.T),
        zeros=zeros,
        g_idx=normal_g_idx(g_idx, in_features, size),
        bits=bits,
        group_size=size,
        scale_dtype=scale_dtype,
    )
    linear.validate(name)
    return linear


def read_zeros(qzeros: Array, bits: int, out_features: int, zero_offset: int) -> Array:
    """uint8 [out_features, n_groups] from `qzeros`, with `zero_offset` (1 for version 1, 0 for version 2) added."""
    zeros = np.empty((out_features, qzeros.shape[0]), dtype=np.uint8)
    unpack_rows(qzeros, bits, out_features, out=zeros.T)
    if zero_offset:
        zeros += np.uint8(zero_offset)
        zeros &= np.uint8((1 << bits) - 1)
    return zeros


def write(linear: QuantizedLinear, version: int = 1, name: str = "") -> dict[str, Array]:
    """Suffix -> array as the module's text describes; bfloat16 scales as uint16 bit patterns.

    Raises BadInput, naming `name`, for what `refusal` refuses.
    """
    rest = write_rest(linear, version, name)
    qweight = np.empty((words_per_row(linear.in_features, linear.bits), linear.out_features), dtype=np.int32)
    pack_rows(linear.codes, linear.bits, out=qweight.T)
    return {"qweight": qweight, **rest}


def write_rest(linear: QuantizedLinear, version: int = 1, name: str = "") -> dict[str, Array]:
    """What `write` gives, refused as there, but without `qweight`; the codes are not looked at."""
    if version not in (1, 2):
        raise ValueError(f"GPTQ version {version}; must be 1 or 2")
    reason = refusal(linear, version)
    if reason is not None:
        raise BadInput(f"{reason}{_of(name)}")
    zeros = linear.zeros.T
    if version == 1:
        zeros = zeros - np.uint8(1)
    return {
        "qzeros": pack_rows(zeros, linear.bits),
        "scales": np.ascontiguousarray(stored_scales(linear).T),
        "g_idx": np.ascontiguousarray(linear.group_index()),
    }


def refusal(linear: QuantizedLinear, version: int = 1) -> str | None:
    """Why this layer cannot be stored so that every reader sees the same weights; None when it can."""
    bits = linear.bits
    for label, count in (("in_features", linear.in_features), ("out_features", linear.out_features)):
        multiple = 32 if bits == 3 else 32 // bits
        if count % multiple:
            return f"{label} {count} is not a multiple of {multiple}, which {bits}-bit GPTQ needs"
    if linear.ragged:
        return f"group_size {linear.group_size} does not divide in_features {linear.in_features}"
    if version == 1 and not linear.zeros.all():
        # Stored as -1. AutoGPTQ masks each field, gptqmodel subtracts from the whole word and so borrows from the next
        # field, vLLM's old kernels did not mask at all: three readings of one file.
        count = int((linear.zeros == 0).sum())
        return f"{count} zeros are 0, which GPTQ version 1 cannot store unambiguously (gptq_v2 can)"
    return None


def quantization_config(
    *,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    version: int = 1,
    ignore: Sequence[str] = ("lm_head",),
    lm_head: bool = False,
    damp_percent: float | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`quantization_config` of config.json, and word for word the content of quantize_config.json.

    Keys are those that vLLM 0.32 (`auto_gptq.py`), transformers 5 (`GPTQConfig`) and gptqmodel 7.6 read.
    group_size: as the user gave it, -1 for one group. ignore: modules (with all below them, and under any prefix) left
    in 16 bit; those other than lm_head become gptqmodel's negative `dynamic` rules, which vLLM follows too.
    """
    checkpoint_format = "gptq" if version == 1 else "gptq_v2"
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": desc_act,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": lm_head,
        "true_sequential": True,
    }
    if damp_percent is not None:
        config["damp_percent"] = damp_percent
    rules: dict[str, dict[str, Any]] = {
        rf"-:(.*\.)?{re.escape(name)}(\..*)?$": {} for name in ignore if name != "lm_head"
    }
    if rules:
        config["dynamic"] = rules
    if meta:
        config["meta"] = dict(meta)
    return config


def _group_size(given: int | None, in_features: int, groups: int, g_idx: Array | None, name: str) -> int:
    if g_idx is not None and g_idx.min() >= 0:
        size = int(np.bincount(g_idx).max())
    elif given is not None:
        size = in_features if given == -1 else given
    else:
        size = -(-in_features // groups)
    if size < 1 or -(-in_features // size) != groups:
        raise BadInput(f"{groups} groups for in_features {in_features} and group_size {size}{_of(name)}")
    return size


def _words(tensors: Mapping[str, Array], suffix: str, name: str) -> Array:
    if suffix not in tensors:
        raise BadInput(f"no {suffix}{_of(name)}")
    array = tensors[suffix]
    if array.dtype != np.int32 or array.ndim != 2:
        raise BadInput(f"{suffix} is {array.dtype} {array.shape}; must be int32 of two dimensions{_of(name)}")
    return array


def _of(name: str) -> str:
    return f" ({name})" if name else ""
