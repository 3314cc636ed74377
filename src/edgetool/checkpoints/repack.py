"""Packed layers from one format into another as words, without a code ever being a byte.

GPTQ's words are compressed-tensors' transposed (both are a bit stream along the inputs), AWQ's are their 8 x 8 blocks
transposed (awq_words), and GPTQ's versions differ in the zeros alone. What comes out is what reading and writing over
`QuantizedLinear` gives, byte for byte, several times as fast and without the memory for the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

_BLOCK_WORDS = 1 << 20  # 4 MiB, so that what is made is still in the cache when it is written to a file
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
) -> dict[str, Array | Iterator[Array]] | None:
    """Suffix -> array as `FORMATS[target].write` returns it, or None where the words themselves must change.

    tensors, source_spec, target_spec, name: as for `FORMATS[source].read` and `FORMATS[target].write`; an array whose
    bytes stay the same (GPTQ version 1 to 2, for example) is passed on, not copied.
    adapt: what happens between reading and writing, for example narrower scales. It gets the layer with
    `absent_codes` and returns it changed in anything but codes, or None where codes would have to change.
    scratch: where the packed words are made, some rows at a time, as an iterator over these rows; each of its arrays
    is good until the next. That is for whoever writes them to a file at once, out of the cache.
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
    blocks = _blocks(tensors[FORMATS[source].suffixes[0]], source, target, scratch)
    return {FORMATS[target].suffixes[0]: blocks if scratch is not None else next(blocks), **rest}


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


def _blocks(packed: Array, source: str, target: str, scratch: Scratch | None) -> Iterator[Array]:
    """The packed codes in the target's order of words, some rows at a time; without scratch memory all at once."""
    if source == target or {source, target} == {"gptq", "gptq_v2"}:
        yield np.ascontiguousarray(packed)
        return
    # Both ways of packing along the inputs are handled as GPTQ's [words, out_features].
    words = packed.T if source == "compressed-tensors" else packed
    if target == "awq":
        rows, columns = 8 * words.shape[0], words.shape[1] // 8
    elif source == "awq" and target != "compressed-tensors":
        rows, columns = packed.shape[0] // 8, 8 * packed.shape[1]
    elif source == "awq":
        rows, columns = 8 * packed.shape[1], packed.shape[0] // 8
    else:
        rows, columns = packed.shape[1], packed.shape[0]
    step = rows if scratch is None else max(8, _BLOCK_WORDS // columns // 8 * 8)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        shape = (stop - start, columns)
        out = np.empty(shape, np.int32) if scratch is None else scratch.empty("repacked", shape, np.int32)
        if target == "awq":
            to_awq(words[start // 8 : stop // 8], out)
        elif source == "awq" and target != "compressed-tensors":
            from_awq(packed[8 * start : 8 * stop], out)
        elif source == "awq":
            from_awq(packed[:, start // 8 : stop // 8], out.T)
        else:
            _transpose(packed[:, start:stop], out)
        yield out


def _transpose(words: Array, out: Array) -> None:
    """Fill `out` with words.T, a tile at a time."""
    rows, columns = words.shape
    for top in range(0, rows, _TILE_ROWS):
        for left in range(0, columns, _TILE_COLUMNS):
            bottom, right = top + _TILE_ROWS, left + _TILE_COLUMNS
            out[left:right, top:bottom] = words[top:bottom, left:right].T
