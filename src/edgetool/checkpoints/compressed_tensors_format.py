"""compressed-tensors' `pack-quantized` tensors, as llm-compressor writes and vLLM reads them.

    weight_packed      int32 [out_features, ceil(in_features * bits / 32)]   codes along the input channels
    weight_scale       float16, bfloat16 or float32 [out_features, n_groups]
    weight_shape       int64 [2] = out_features, in_features
    weight_zero_point  int32 [ceil(out_features * bits / 32), n_groups]      asymmetric only; packed along the outputs
    weight_g_idx       int32 [in_features]                                   activation order with scattered groups only

The package counts codes and zeros from -2**(bits - 1) and adds 2**(bits - 1) before packing, so the stored fields are
`QuantizedLinear`'s unsigned codes and zeros as they are; a symmetric layer is one with all zeros at 2**(bits - 1).

Two versions exist for 3 bits: up to 0.17 ten codes a word with the top two bits idle, since 0.19 (and in vLLM 0.32) a
dense stream. The reader tells them apart, the writer is dense, and 0.17 must not be used to read that. For 2, 4 and 8
bits both are the same. `weight_g_idx` is known up to 0.17; 0.19 and vLLM 0.32 refuse checkpoints that have it.
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

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
WRITTEN_AS_VERSION = "0.19.0"
LAST_VERSION_WITH_G_IDX = "0.17.0"

Array = npt.NDArray[Any]


def read(tensors: Mapping[str, Array], bits: int, group_size: int | None = None, name: str = "") -> QuantizedLinear:
    """The layer that `tensors` (suffix -> array, see the module's text) holds; the last two may be absent.

    group_size: channels a group, or -1 for one group; only needed where the last group is short.
    weight_zero_point may also be int8 [out_features, n_groups] counted from -2**(bits - 1), as old releases left it.
    Raises BadInput, naming `name`, when a tensor is missing or its shape or dtype does not fit the others.
    """
    rest = read_rest(tensors, bits, group_size, name)
    packed, shape = tensors["weight_packed"], (rest.out_features, rest.in_features)
    return replace(rest, codes=_unpack(packed, bits, shape, has_sparse_words(tensors, bits)))


def read_rest(
    tensors: Mapping[str, Array], bits: int, group_size: int | None = None, name: str = ""
) -> QuantizedLinear:
    """What `read` gives, checked as there, but with `absent_codes`."""
    where = f" ({name})" if name else ""
    if bits not in BITS:
        raise BadInput(f"pack-quantized with {bits} bits{where}; must be one of {', '.join(map(str, BITS))}")
    for suffix in SUFFIXES[:3]:
        if suffix not in tensors:
            raise BadInput(f"no {suffix}{where}")
    packed, shape = tensors["weight_packed"], tensors["weight_shape"]
    if shape.shape != (2,) or shape.dtype.kind != "i" or int(shape.min()) < 1:
        raise BadInput(f"weight_shape is {shape.dtype} {shape.tolist()}; must be two positive integers{where}")
    out_features, in_features = (int(size) for size in shape)
    scales, scale_dtype = loaded_scales(tensors["weight_scale"], name)
    if scales.ndim != 2 or scales.shape[0] != out_features or scales.shape[1] == 0:
        raise BadInput(f"weight_scale has shape {scales.shape}; must be [{out_features}, n_groups]{where}")
    groups = int(scales.shape[1])
    sparse = has_sparse_words(tensors, bits)
    _check_words(packed, bits, (out_features, in_features), sparse, "weight_packed", where)
    zeros = read_zeros(tensors.get("weight_zero_point"), bits, scales.shape, sparse, name)
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None:
        if g_idx.shape != (in_features,) or g_idx.dtype != np.int32:
            raise BadInput(f"weight_g_idx is {g_idx.dtype} {g_idx.shape}; must be int32 {(in_features,)}{where}")
        if np.all(g_idx == -1):  # the package's way of saying "never set": groups in column order
            g_idx = None
    size = -(-in_features // groups) if group_size is None else in_features if group_size == -1 else group_size
    if size < 1 or -(-in_features // size) != groups:
        raise BadInput(f"{groups} groups for in_features {in_features} and group_size {size}{where}")
    linear = QuantizedLinear(
        codes=absent_codes(out_features, in_features),
        scales=scales,
        zeros=zeros,
        g_idx=normal_g_idx(g_idx, in_features, size),
        bits=bits,
        group_size=size,
        scale_dtype=scale_dtype,
    )
    linear.validate(name)
    return linear


def read_zeros(stored: Array | None, bits: int, shape: tuple[int, ...], sparse: bool = False, name: str = "") -> Array:
    """uint8 `shape` = [out_features, n_groups] from weight_zero_point, or the middle code where there is none.

    sparse: the words hold whole 3-bit codes only, as up to 0.17.
    """
    if stored is None:
        return np.full(shape, 1 << (bits - 1), dtype=np.uint8)
    if stored.dtype == np.int8 and stored.shape == shape:
        return (stored.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    where = f" ({name})" if name else ""
    transposed = (shape[1], shape[0])
    _check_words(stored.T, bits, transposed, sparse, "weight_zero_point transposed", where)
    columns = _unpack(stored.T, bits, transposed, sparse)
    return np.ascontiguousarray(columns.T)


def write(linear: QuantizedLinear, sym: bool | None = None, name: str = "") -> dict[str, Array]:
    """Suffix -> array as the module's text describes; bfloat16 scales as uint16 bit patterns.

    sym: what the checkpoint's configuration says; False writes weight_zero_point even for a layer that happens to be
    symmetric, since readers expect it in every layer. None decides by the layer.
    Raises BadInput, naming `name`, for what `refusal` refuses.
    """
    rest = write_rest(linear, sym, name)
    return {"weight_packed": pack_rows(linear.codes, linear.bits), **rest}


def write_rest(linear: QuantizedLinear, sym: bool | None = None, name: str = "") -> dict[str, Array]:
    """What `write` gives, refused as there, but without `weight_packed`; the codes are not looked at."""
    reason = refusal(linear, sym)
    if reason is not None:
        raise BadInput(f"{reason} ({name})" if name else reason)
    tensors = {
        "weight_scale": np.ascontiguousarray(stored_scales(linear)),
        "weight_shape": np.array(linear.codes.shape, dtype=np.int64),
    }
    if not (linear.sym if sym is None else sym):
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_rows(linear.zeros.T, linear.bits).T)
    if linear.g_idx is not None:
        tensors["weight_g_idx"] = np.ascontiguousarray(linear.g_idx)
    return tensors


def refusal(linear: QuantizedLinear, sym: bool | None = None) -> str | None:
    """Why this layer cannot be stored (under a configuration that says `sym`); None when it can."""
    if linear.ragged:
        return f"group_size {linear.group_size} does not divide in_features {linear.in_features}"
    if sym and not linear.sym:
        return f"the layer is asymmetric: not every zero is {1 << (linear.bits - 1)}"
    return None


def quantization_config(
    *, bits: int, group_size: int, sym: bool, desc_act: bool = False, ignore: Sequence[str] = ("lm_head",)
) -> dict[str, Any]:
    """`quantization_config` of config.json, as compressed-tensors 0.17 and 0.19 and vLLM 0.32 parse it.

    group_size: as the user gave it; -1 becomes the strategy "channel". desc_act: scattered groups (weight_g_idx).
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": "group" if desc_act else None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    group = {
        # to vLLM an lm_head is no Linear
        "targets": ["Linear"] if "lm_head" in ignore else ["Linear", r"re:(.*\.)?lm_head$"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        # a bare name is one module to readers, of a part of the model only a pattern says all of it
        "ignore": [name if name == "lm_head" else rf"re:(.*\.)?{re.escape(name)}(\..*)?$" for name in ignore],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": LAST_VERSION_WITH_G_IDX if desc_act else WRITTEN_AS_VERSION,
    }


def has_sparse_words(tensors: Mapping[str, Array], bits: int) -> bool:
    """Whether 3-bit words are 0.17's: by their number, or where both kinds have as many, by the idle bits."""
    if bits != 3:
        return False
    words, count = tensors["weight_packed"], int(tensors["weight_shape"][1])
    dense, sparse = words_per_row(count, 3), -(-count // 10)
    if dense != sparse:
        return words.ndim == 2 and words.shape[1] == sparse
    return not bool(np.any(words.view(np.uint32) >> 30)) if words.dtype == np.int32 else False


def _check_words(words: Array, bits: int, shape: tuple[int, int], sparse: bool, label: str, where: str) -> None:
    rows, count = shape
    width = -(-count // (32 // bits)) if sparse else words_per_row(count, bits)
    if words.dtype != np.int32 or words.shape != (rows, width):
        raise BadInput(f"{label} is {words.dtype} {words.shape}; must be int32 {(rows, width)}{where}")


def _unpack(words: Array, bits: int, shape: tuple[int, int], sparse: bool) -> Array:
    """uint8 `shape` from dense words, or from words that hold whole codes only."""
    rows, count = shape
    if not sparse:
        return unpack_rows(words, bits, count)
    per_word = 32 // bits
    codes = np.empty((rows, words.shape[1] * per_word), dtype=np.uint8)
    for position in range(per_word):
        codes[:, position::per_word] = (words >> (bits * position)) & ((1 << bits) - 1)
    return np.ascontiguousarray(codes[:, :count])
