"""AWQ's tensors in the `gemm` layout (autoawq 0.2.9, gptqmodel 7.6, auto-round 0.16), 4 bits only.

    qweight  int32 [in_features, out_features / 8]   codes packed along the OUTPUT channels
    qzeros   int32 [n_groups, out_features / 8]      zeros packed the same way, stored as they are
    scales   float16 [n_groups, out_features]        (gptqmodel: bfloat16)

Nibble k (bits 4k .. 4k+3) of a word holds output channel 8*word + (0, 2, 4, 6, 1, 3, 5, 7)[k]. Groups are always of
neighbouring input channels. The scaling of input channels that AWQ computes lies in the tensors before (norms, other
linears), not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.awq_words import ORDER, from_awq, to_awq
from edgetool.checkpoints.canonical import QuantizedLinear, absent_codes
from edgetool.checkpoints.packing import pack_rows, unpack_rows, words_per_row
from edgetool.checkpoints.scale_storage import loaded_scales, stored_scales
from edgetool.errors import BadInput

SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4

Array = npt.NDArray[Any]


def read(tensors: Mapping[str, Array], group_size: int | None = None, name: str = "") -> QuantizedLinear:
    """The layer that `tensors` (suffix -> array, see the module's text) holds.

    group_size: channels a group, or -1 for one group; only needed where the last group is short.
    Raises BadInput, naming `name`, when a tensor is missing or its shape or dtype does not fit the others.
    """
    return replace(read_rest(tensors, group_size, name), codes=_unpacked(tensors["qweight"]))


def read_rest(tensors: Mapping[str, Array], group_size: int | None = None, name: str = "") -> QuantizedLinear:
    """What `read` gives, checked as there, but with `absent_codes`."""
    where = f" ({name})" if name else ""
    for suffix in SUFFIXES:
        if suffix not in tensors:
            raise BadInput(f"no {suffix}{where}")
        if tensors[suffix].ndim != 2:
            raise BadInput(f"{suffix} has shape {tensors[suffix].shape}; must have two dimensions{where}")
    qweight, qzeros = tensors["qweight"], tensors["qzeros"]
    scales, scale_dtype = loaded_scales(tensors["scales"], name)
    for suffix, array in (("qweight", qweight), ("qzeros", qzeros)):
        if array.dtype != np.int32:
            raise BadInput(f"{suffix} is {array.dtype}; must be int32{where}")
    in_features, out_features = int(qweight.shape[0]), int(qweight.shape[1]) * 8
    groups = int(scales.shape[0])
    if 0 in qweight.shape or groups == 0:
        raise BadInput(f"qweight {qweight.shape} and scales {scales.shape} are empty{where}")
    if scales.shape[1] != out_features:
        raise BadInput(f"scales have shape {scales.shape}; qweight has {out_features} output channels{where}")
    if qzeros.shape != (groups, qweight.shape[1]):
        raise BadInput(f"qzeros have shape {qzeros.shape}; must be {(groups, qweight.shape[1])}{where}")
    size = -(-in_features // groups) if group_size is None else in_features if group_size == -1 else group_size
    if size < 1 or -(-in_features // size) != groups:
        raise BadInput(f"{groups} groups for in_features {in_features} and group_size {size}{where}")
    linear = QuantizedLinear(
        codes=absent_codes(out_features, in_features),
        scales=np.ascontiguousarray(scales.T),
        zeros=read_zeros(qzeros),
        g_idx=None,
        bits=BITS,
        group_size=size,
        scale_dtype=scale_dtype,
    )
    linear.validate(name)
    return linear


def read_zeros(qzeros: Array) -> Array:
    """uint8 [out_features, n_groups] from `qzeros`."""
    zeros = np.empty((8 * qzeros.shape[1], qzeros.shape[0]), dtype=np.uint8)
    unpack_rows(qzeros, BITS, zeros.shape[0], out=zeros.T)
    return _reordered(zeros, np.argsort(ORDER))


def write(linear: QuantizedLinear, name: str = "") -> dict[str, Array]:
    """Suffix -> array as the module's text describes; bfloat16 scales as uint16 bit patterns.

    Raises BadInput, naming `name`, for what `refusal` refuses.
    """
    rest = write_rest(linear, name)
    return {"qweight": _packed(linear.codes), **rest}


def write_rest(linear: QuantizedLinear, name: str = "") -> dict[str, Array]:
    """What `write` gives, refused as there, but without `qweight`; the codes are not looked at."""
    reason = refusal(linear)
    if reason is not None:
        raise BadInput(f"{reason} ({name})" if name else reason)
    return {
        "qzeros": pack_rows(_reordered(linear.zeros, ORDER).T, BITS),
        "scales": np.ascontiguousarray(stored_scales(linear).T),
    }


def refusal(linear: QuantizedLinear) -> str | None:
    """Why this layer has no AWQ form; None when it has one."""
    if linear.bits != BITS:
        return f"AWQ's gemm layout has 4-bit codes only; these have {linear.bits}"
    if linear.g_idx is not None:
        return "AWQ has no g_idx: its groups are neighbouring input channels, and this layer's are in activation order"
    if linear.out_features % 8:
        return f"out_features {linear.out_features} is not a multiple of 8, which AWQ's packing needs"
    if linear.ragged:
        return f"group_size {linear.group_size} does not divide in_features {linear.in_features}"
    return None


def quantization_config(*, group_size: int, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """`quantization_config` of config.json with the keys of autoawq 0.2.9, which vLLM 0.32 and transformers 5 read.

    zero_point is always true: symmetric layers are stored with zeros of 8, since readers expect the tensor. Without
    lm_head among `ignore`, vLLM is told that it is quantised too (autoawq and transformers have no word for that).
    """
    # vLLM looks for a name anywhere in a module's, transformers at its start or end: parts go by two names
    names = [full for name in ignore for full in ((name,) if name == "lm_head" else (name, f"model.{name}"))]
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": names or None,
        **({} if "lm_head" in ignore else {"lm_head": True}),
    }


def _packed(codes: Array) -> Array:
    """int32 [in_features, out_features / 8] of uint8 [out_features, in_features]."""
    out_features, in_features = codes.shape
    words = pack_rows(codes, BITS)
    packed = np.empty((8 * words.shape[1], out_features // 8), dtype=np.int32)
    to_awq(words.T, packed)
    return packed[:in_features]


def _unpacked(packed: Array) -> Array:
    """uint8 [out_features, in_features] of int32 [in_features, out_features / 8]."""
    in_features, out_features = packed.shape[0], 8 * packed.shape[1]
    words = np.empty((out_features, words_per_row(in_features, BITS)), dtype=np.int32)
    whole = np.pad(packed, ((0, -in_features % 8), (0, 0))) if in_features % 8 else np.ascontiguousarray(packed)
    from_awq(whole, words.T)
    return unpack_rows(words, BITS, in_features)


def _reordered(zeros: Array, order: Sequence[int] | Array) -> Array:
    """uint8 [out_features, n_groups] with the rows of every eight in `order`."""
    return zeros.reshape(-1, 8, zeros.shape[1])[:, order].reshape(zeros.shape)
