"""Small codes to 32-bit words and back: the bit layouts that all 4-bit checkpoints share.

A row of codes becomes a little-endian bit stream: code k occupies bits [k*bits, (k+1)*bits) of the row, counted from
bit 0 of word 0. For 2, 4 and 8 bits no code crosses a word; for 3 bits 32 codes fill 3 words and two codes cross.
This is GPTQ's order (AutoGPTQ's 3-bit words are the same stream) and compressed-tensors' order since its 0.19.

Eight codes, one a byte, are one 64-bit number, and three shift-or-mask steps squeeze its bytes together. That is done
a block of rows at a time so that the temporaries stay in cache. Inputs and outputs may be strided views (transposes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK_CODES = 1 << 17
_TILE = 512
_U64 = np.dtype("<u8")


def words_per_row(count: int, bits: int) -> int:
    """Number of 32-bit words that `count` codes of `bits` bits fill; the last one is padded with zero bits."""
    return -(-count * bits // 32)


def pack_rows(codes: Array, bits: int, out: Array | None = None) -> Array:
    """Pack each row of `codes`, uint8 [rows, count] with values below 2**bits, to int32 [rows, words_per_row].

    `out`, where given, is an int32 array or view of that shape to write into. Raises ValueError for a code that does
    not fit (it would spill into its neighbours).
    """
    rows, count = codes.shape
    width = words_per_row(count, bits)
    if out is None:
        out = np.empty((rows, width), dtype=np.int32)
    if out.shape != (rows, width) or out.dtype != np.int32:
        raise ValueError(f"out is {out.dtype} {out.shape}; must be int32 {(rows, width)}")
    if rows == 0 or count == 0:
        return out
    padded = -(-count // 32) * 32
    for start, stop in _blocks(rows, padded):
        block = codes[start:stop]
        if int(block.max()) >> bits:
            raise ValueError(f"code {int(block.max())} does not fit {bits} bits")
        if block.flags.c_contiguous and padded == count:
            whole = block
        else:
            whole = np.zeros((stop - start, padded), dtype=np.uint8)
            # A tile at a time: of a transposed view it lies in the first-level cache while it is turned.
            for left in range(0, count, _TILE):
                whole[:, left : left + _TILE][:, : count - left] = block[:, left : left + _TILE]
        words = _squeeze(whole.reshape(-1).view(_U64), bits).reshape(stop - start, -1)
        out[start:stop] = words[:, :width]
    return out


def unpack_rows(words: Array, bits: int, count: int, out: Array | None = None) -> Array:
    """Undo `pack_rows`: int32 [rows, words_per_row] to uint8 [rows, count]. `out` may be a view to write into.

    Raises ValueError when the words hold fewer or more than `count` codes need.
    """
    rows, width = words.shape
    if width != words_per_row(count, bits):
        raise ValueError(f"{width} words a row; {count} codes of {bits} bits fill {words_per_row(count, bits)}")
    if out is None:
        out = np.empty((rows, count), dtype=np.uint8)
    if out.shape != (rows, count) or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype} {out.shape}; must be uint8 {(rows, count)}")
    if rows == 0 or count == 0:
        return out
    padded = -(-count // 32) * 32
    for start, stop in _blocks(rows, padded):
        if padded != count:
            whole = np.zeros((stop - start, padded * bits // 32), dtype=np.int32)
            whole[:, :width] = words[start:stop]
        else:
            whole = np.ascontiguousarray(words[start:stop])
        codes = _spread(whole.reshape(-1), bits).view(np.uint8).reshape(stop - start, padded)
        out[start:stop] = codes[:, :count]
    return out


def _blocks(rows: int, row_codes: int) -> list[tuple[int, int]]:
    # At least 64 rows, so that a transposed view is read or written a whole cache line (64 codes) at a time.
    step = max(64, _BLOCK_CODES // row_codes)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _masks(bits: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Masks that keep one code in each byte, two in each 16 bits, four in each 32 bits."""

    def repeat(width: int, every: int) -> np.uint64:
        return np.uint64(sum(((1 << width) - 1) << shift for shift in range(0, 64, every)))

    return repeat(bits, 8), repeat(2 * bits, 16), repeat(4 * bits, 32)


def _squeeze(x: Array, bits: int) -> Array:
    """uint64 [n] holding 8 codes each, one a byte, to int32 [n * 8 * bits / 32]."""
    if bits == 8:
        return x.view(np.int32)
    _, pairs, fours = _masks(bits)
    shifted = np.right_shift(x, np.uint64(8 - bits))
    y = np.bitwise_or(x, shifted)
    y &= pairs
    np.right_shift(y, np.uint64(16 - 2 * bits), out=shifted)
    y |= shifted
    y &= fours
    np.right_shift(y, np.uint64(32 - 4 * bits), out=shifted)
    y |= shifted  # only the low 8 * bits are good from here on
    if bits == 4:
        return y.astype(np.uint32).view(np.int32)
    if bits == 2:
        return y.astype(np.uint16).view(np.int32)
    return np.ascontiguousarray(y.view(np.uint8).reshape(-1, 8)[:, :3]).reshape(-1).view(np.int32)


def _spread(words: Array, bits: int) -> Array:
    """int32 [n * 8 * bits / 32] to uint64 [n] holding 8 codes each, one a byte. Undoes `_squeeze`."""
    if bits == 8:
        return words.view(_U64)
    if bits == 4:
        y = words.view(np.uint32).astype(_U64)
    elif bits == 2:
        y = words.view(np.uint16).astype(_U64)
    else:
        wide = np.zeros((words.size * 4 // 3, 8), dtype=np.uint8)
        wide[:, :3] = words.view(np.uint8).reshape(-1, 3)
        y = wide.reshape(-1).view(_U64)
    ones, pairs, fours = _masks(bits)
    shifted = np.left_shift(y, np.uint64(32 - 4 * bits))
    y |= shifted
    y &= fours
    np.left_shift(y, np.uint64(16 - 2 * bits), out=shifted)
    y |= shifted
    y &= pairs
    np.left_shift(y, np.uint64(8 - bits), out=shifted)
    y |= shifted
    y &= ones
    return y
