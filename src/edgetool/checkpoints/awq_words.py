"""4-bit words along the inputs, as GPTQ and compressed-tensors have them, to AWQ's words along the outputs and back.

Eight words of neighbouring output channels hold 8 x 8 codes, and so do AWQ's words of eight input channels: one is the
other's transpose, with the outputs in AWQ's order. Three rounds of exchanges (halves of words, then bytes, then
nibbles; Hacker's Delight, section 7-3) transpose all 8 x 8 blocks of a tile at once, without a code ever being a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.scratch import Scratch

Array = npt.NDArray[Any]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble k (bits 4k .. 4k+3) of an AWQ word holds output channel 8 * word + ORDER[k]."""

_PLANES = Scratch()
_TILE = 128  # words each way: eight planes of them and what the exchanges need are 768 KiB, most of an L2 cache


def to_awq(words: Array, out: Array) -> None:
    """Fill `out`, int32 [8 * rows, out_features / 8] in AWQ's layout, from `words`.

    words: int32 [rows, out_features]; nibble j of words[r, n] is the code of input channel 8 * r + j, output n. Views
    are fine, and a transposed one (compressed-tensors' weight_packed.T) is as fast.
    """
    for inputs, outputs, planes, spare in _tiles(words, out):
        for plane, channel in zip(planes, ORDER, strict=True):
            plane[...] = inputs[channel]
        _transpose(planes, spare)
        outputs[...] = planes


def from_awq(awq: Array, out: Array) -> None:
    """Undo `to_awq`: fill `out`, int32 [rows, out_features] or a transposed view, from int32 [8 * rows, ...]."""
    for outputs, inputs, planes, spare in _tiles(out, awq):
        planes[...] = inputs
        _transpose(planes, spare)
        for plane, channel in zip(planes, ORDER, strict=True):
            outputs[channel] = plane


def _tiles(words: Array, awq: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Views [8, rows, columns] of a tile of both arrays, and memory for its eight planes and half as much beside."""
    rows, out_features = words.shape
    if out_features % 8 or awq.shape != (8 * rows, out_features // 8):
        raise ValueError(f"words {words.shape} do not fill AWQ's {awq.shape}")
    columns = out_features // 8
    by_input = _unsigned(awq).reshape(rows, 8, columns).transpose(1, 0, 2)
    by_channel = _unsigned(words).reshape(rows, columns, 8).transpose(2, 0, 1)
    # The planes lie in memory as the words do, so that they are gathered and scattered along neighbouring words.
    lies_transposed = abs(words.strides[0]) < abs(words.strides[1])
    memory = _PLANES.empty("planes", (12 * _TILE * _TILE,), np.uint32)
    for top in range(0, rows, _TILE):
        for left in range(0, columns, _TILE):
            tile = (slice(None), slice(top, top + _TILE), slice(left, left + _TILE))
            channels, inputs = by_channel[tile], by_input[tile]
            _, height, width = channels.shape
            planes, spare = memory[: channels.size], memory[channels.size : channels.size * 3 // 2]
            if lies_transposed:
                yield channels, inputs, planes.reshape(8, width, height).transpose(0, 2, 1), spare
            else:
                yield channels, inputs, planes.reshape(8, height, width), spare


def _unsigned(words: Array) -> Array:
    if words.dtype != np.int32:
        raise ValueError(f"words are {words.dtype}; must be int32")
    return words.view(np.uint32)


def _transpose(planes: Array, spare: Array) -> None:
    """In place: nibble k of plane p changes places with nibble p of plane k."""
    in_memory_order = planes if planes.flags.c_contiguous else planes.transpose(0, 2, 1)
    halves = in_memory_order.reshape(2, 4, -1)
    _exchange(halves[0], halves[1], 0x0000FFFF, 16, spare)
    pairs = halves.reshape(2, 2, 2, -1)
    _exchange(pairs[:, 0], pairs[:, 1], 0x00FF00FF, 8, spare)
    neighbours = halves.reshape(4, 2, -1)
    _exchange(neighbours[:, 0], neighbours[:, 1], 0x0F0F0F0F, 4, spare)


def _exchange(low: Array, high: Array, mask: int, shift: int, spare: Array) -> None:
    """In place: the bits of `low` that lie `shift` above `mask` change places with the bits of `high` under `mask`."""
    different = spare.reshape(low.shape)
    np.right_shift(low, np.uint32(shift), out=different)
    different ^= high
    different &= np.uint32(mask)
    high ^= different
    different <<= np.uint32(shift)
    low ^= different
