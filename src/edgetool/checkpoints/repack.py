"""Packed layers from one format into another as words, without a code ever being a byte.

GPTQ's words are compressed-tensors' transposed (both are a bit stream along the inputs), AWQ's are their 8 x 8 blocks
transposed (awq_words), and GPTQ's versions differ in the zeros alone. What comes out is what reading and writing over
`QuantizedLinear` gives, byte for byte, several times as fast and without the memory for the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints import awq_format, compressed_tensors_format
from edgetool.checkpoints.awq_words import from_awq, to_awq
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.scratch import Scratch

Array = npt.NDArray[Any]
Adapt = Callable[[QuantizedLinear], QuantizedLinear | None]

_TILE_ROWS, _TILE_COLUMNS = 32, 512  # 64 KiB, which a transpose reads and writes about once from the L2 cache


def repack(
    tensors: Mapping[str, Array],
    source: str,
    target: str,
    source_spec: Spec,
    target_spec: Spec,
    name: str = "",
    adapt: Adapt | None = None,
    scratch: Scratch | None = None,
) -> dict[str, Array] | None:
    """Suffix -> array as `FORMATS[target].write` returns it, or None where the words themselves must change.

    tensors, source_spec, target_spec, name: as for `FORMATS[source].read` and `FORMATS[target].write`; an array whose
    bytes stay the same (GPTQ version 1 to 2, for example) is passed on, not copied.
    adapt: what happens between reading and writing, for example narrower scales. It gets the layer with
    `absent_codes` and returns it changed in anything but codes, or None where codes would have to change.
    scratch: where the packed words are made; they are then good until the thread's next call.
    None is also returned for 3-bit words of compressed-tensors 0.17 and where AWQ's rows do not fill blocks of eight.
    Raises BadInput as `read` and `write` do.
    """
    layer = FORMATS[source].read_rest(tensors, source_spec, name)
    if not _words_move(tensors, source, target, layer):
        return None
    if adapt is not None:
        adapted = adapt(layer)
        if adapted is None:
            return None
        layer = adapted
    rest = FORMATS[target].write_rest(layer, target_spec, name)
    codes = FORMATS[target].suffixes[0]
    return {codes: _words(tensors[FORMATS[source].suffixes[0]], source, target, scratch), **rest}


def _words_move(tensors: Mapping[str, Array], source: str, target: str, layer: QuantizedLinear) -> bool:
    if source == "compressed-tensors" and compressed_tensors_format.has_sparse_words(tensors, layer.bits):
        return False
    if _along(source) == _along(target) == "inputs":
        # Bits behind a row's last code are zero where edgetool writes; what others leave there is not passed on.
        return layer.in_features * layer.bits % 32 == 0
    if _along(source) == _along(target):
        return True
    return layer.bits == awq_format.BITS and layer.in_features % 8 == 0 and layer.out_features % 8 == 0


def _along(name: str) -> str:
    return "outputs" if name == "awq" else "inputs"


def _words(packed: Array, source: str, target: str, scratch: Scratch | None) -> Array:
    """The packed codes in the target's order of words."""

    def empty(*shape: int) -> Array:
        return np.empty(shape, np.int32) if scratch is None else scratch.empty("repacked", shape, np.int32)

    if source == target or {source, target} == {"gptq", "gptq_v2"}:
        return np.ascontiguousarray(packed)
    # Both ways of packing along the inputs are handled as GPTQ's [words, out_features].
    words = packed.T if source == "compressed-tensors" else packed
    if target == "awq":
        out = empty(8 * words.shape[0], words.shape[1] // 8)
        to_awq(words, out)
        return out
    if source == "awq":
        rows, out_features = packed.shape[0] // 8, 8 * packed.shape[1]
        transposed = target == "compressed-tensors"
        out = empty(out_features, rows) if transposed else empty(rows, out_features)
        from_awq(packed, out.T if transposed else out)
        return out
    out = empty(packed.shape[1], packed.shape[0])
    _transpose(packed, out)
    return out


def _transpose(words: Array, out: Array) -> None:
    """Fill `out` with words.T, a tile at a time."""
    rows, columns = words.shape
    for top in range(0, rows, _TILE_ROWS):
        for left in range(0, columns, _TILE_COLUMNS):
            bottom, right = top + _TILE_ROWS, left + _TILE_COLUMNS
            out[left:right, top:bottom] = words[top:bottom, left:right].T
