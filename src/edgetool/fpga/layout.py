"""Where each weight of a matrix lies in the 32 pseudo-channels, and packed rows to those bytes and back. Pure.

A matrix W [N = out_features, K = in_features] is padded with zeros to Np (a multiple of 32) and Kp (of 128). Row n lies
on port n % 32 as local row r = n // 32; on each port the local rows follow one another. Along K a row is a run of
packages of 16 groups: one beat (32 B) of 16 fp16 scales, with zero points a second beat of 16 fp16 offsets, then
16 * group / 2 bytes of 4-bit weights. The last package is short in weights, never in its beats. docs/image-format.md
has the formulas; the format with groups of 128 and one beat is that of EdgeLLM's public compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.fpga.hardware import VCU128, align_up

Array = npt.NDArray[Any]

ENCODINGS = ("twos", "signmag")
"""twos: two's complement, w & 15. signmag: w for w >= 0, 8 - w for w < 0 (bit 3 is the sign); it has no -8."""

_PORTS = VCU128.pseudo_channels
_BEAT = VCU128.axi_beat_bytes
_SCALES = VCU128.scales_per_beat
_MIDDLE = np.uint32(0x88888888)
_TILE_ROWS = 256  # rows dealt at a time: what is read of a transposed view then stays in the L2 cache until it is used


def _signmag_table() -> Array:
    """uint8 [256]: two unsigned codes (one a nibble) to two nibbles of sign and magnitude. Code 0 (-8) becomes 8."""
    nibble = [code - 8 if code >= 8 else min(16 - code, 15) if code else 8 for code in range(16)]
    return np.array([nibble[byte & 15] | nibble[byte >> 4] << 4 for byte in range(256)], dtype=np.uint8)


_SIGNMAG = _signmag_table()


@dataclass(frozen=True)
class MatrixLayout:
    """Shape of one matrix in HBM.

    n, k: out_features and in_features before padding. group: input channels a scale; 0 for a matrix of plain fp16.
    zeros: whether a beat of offsets follows each beat of scales.
    """

    n: int
    k: int
    group: int
    zeros: bool = False

    @property
    def padded_n(self) -> int:
        return align_up(self.n, VCU128.out_channels_per_step)

    @property
    def padded_k(self) -> int:
        return align_up(self.k, VCU128.in_channels_per_step)

    @property
    def rows(self) -> int:
        """Local rows on each port."""
        return self.padded_n // _PORTS

    @property
    def groups(self) -> int:
        """Scales a row that mean something; the rest of the last beat is zero."""
        return -(-self.k // self.group) if self.group else 0

    @property
    def package_channels(self) -> int:
        return _SCALES * self.group

    @property
    def packages(self) -> int:
        return -(-self.padded_k // self.package_channels) if self.group else 0

    @property
    def header_bytes(self) -> int:
        """Beats in front of the weights of a package."""
        return _BEAT * (2 if self.zeros else 1)

    @property
    def package_bytes(self) -> int:
        """A whole package: 1056 for groups of 128 without zero points."""
        return self.header_bytes + self.package_channels // 2

    @property
    def row_bytes(self) -> int:
        if not self.group:
            return 2 * self.padded_k
        return self.padded_k // 2 + self.header_bytes * self.packages

    @property
    def port_bytes(self) -> int:
        """What the matrix takes on each port."""
        return self.rows * self.row_bytes

    @property
    def port_stride(self) -> int:
        """From this matrix to the next on each port."""
        return align_up(self.port_bytes, VCU128.hbm_alignment_bytes)

    @property
    def read_bytes(self) -> int:
        """Bytes read from all ports together for one product."""
        return _PORTS * self.port_bytes

    @property
    def macs(self) -> int:
        """Multiplications of one product, padding included: the array runs over it."""
        return self.padded_n * self.padded_k


def pack_int4(
    words: Array,
    scales: Array,
    offsets: Array | None,
    layout: MatrixLayout,
    encoding: str,
    out: Array | None = None,
) -> Array:
    """Rows of a 4-bit matrix as port bytes: uint8 [32, ceil(rows / 32), row_bytes].

    words: uint32 [rows, ceil(k / 8)], unsigned codes 0..15 that mean code - 8, along K, lowest nibble first; may be a
        transposed view. The rows start at one that lies on port 0.
    scales, offsets: float16 [rows, groups]; offsets as `layout.zeros` says.
    out: what an earlier call for the same layout returned; it is filled again where that leaves padding zero.
    Raises ValueError for shapes that do not fit, and for signmag codes 0 (`count_unrepresentable` counts them).
    """
    rows = words.shape[0]
    if words.shape[1] != -(-layout.k // 8) or scales.shape != (rows, layout.groups):
        raise ValueError(f"words {words.shape} and scales {scales.shape} do not fit {layout}")
    if (offsets is not None) != layout.zeros:
        raise ValueError("offsets must be given exactly where the layout has zeros")
    local_rows = -(-rows // _PORTS)
    shape = (_PORTS, local_rows, layout.row_bytes)
    if out is None or out.shape != shape or rows % _PORTS:  # what was a row may now be padding
        out = np.zeros(shape, dtype=np.uint8)
    for first in range(0, rows, _TILE_ROWS):
        here = slice(first, first + _TILE_ROWS)
        part = None if offsets is None else offsets[here]
        _fill(out[:, first // _PORTS : (first + _TILE_ROWS) // _PORTS], words[here], scales[here], part, layout)
    if layout.k % 8:
        _clear_padding(out, layout)
    if encoding == "signmag":
        if lost := count_unrepresentable(words, layout.k):
            raise ValueError(f"{lost} weights are -8, which signmag cannot hold")
        _to_signmag(out, layout)
    elif encoding != "twos":
        raise ValueError(f"encoding {encoding!r}; must be one of {', '.join(ENCODINGS)}")
    return out


def pack_fp16(values: Array, layout: MatrixLayout) -> Array:
    """Rows of a plain matrix, float16 [rows, k], as port bytes: uint8 [32, ceil(rows / 32), 2 * Kp]."""
    out = np.zeros((_PORTS, -(-values.shape[0] // _PORTS), layout.row_bytes), dtype=np.uint8)
    _deal(values.view("<u2"), out.view("<u2"), 0)
    return out


def unpack_int4(ports: Array, layout: MatrixLayout, encoding: str) -> tuple[Array, Array, Array | None]:
    """Undo `pack_int4`: uint8 [32, R, row_bytes] to codes - 8 and what they are multiplied with.

    Returns int8 [32 * R, k] (-8..7), float16 scales [32 * R, groups], and offsets of the same shape or None. Rows
    beyond the matrix's n are padding.
    """
    local_rows = ports.shape[1]
    packed = np.empty((_PORTS, local_rows, layout.padded_k // 2), dtype=np.uint8)
    headers = 2 if layout.zeros else 1
    beats = np.empty((headers, _PORTS, local_rows, layout.packages * _SCALES), dtype=np.float16)
    step = layout.package_channels // 2
    for package in range(layout.packages):
        start = package * layout.package_bytes
        for beat in range(headers):
            raw = np.ascontiguousarray(ports[:, :, start + beat * _BEAT : start + (beat + 1) * _BEAT])
            beats[beat, :, :, package * _SCALES : (package + 1) * _SCALES] = raw.view("<f2")
        body = ports[:, :, start + layout.header_bytes : start + layout.package_bytes]
        packed[:, :, package * step : package * step + body.shape[2]] = body
    nibbles = np.empty((*packed.shape, 2), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=nibbles[..., 0])
    np.right_shift(packed, 4, out=nibbles[..., 1])
    values = _NIBBLE_VALUES[encoding][nibbles.reshape(_PORTS, local_rows, -1)[:, :, : layout.k]]
    offsets = _gather(beats[1][:, :, : layout.groups]) if layout.zeros else None
    return _gather(values), _gather(beats[0][:, :, : layout.groups]), offsets


def unpack_fp16(ports: Array, layout: MatrixLayout) -> Array:
    """Undo `pack_fp16`: float16 [32 * R, k]."""
    return _gather(ports.view("<f2")[:, :, : layout.k])


def count_unrepresentable(words: Array, k: int) -> int:
    """How many codes are 0 (that is -8), which signmag cannot hold, among the first `k` of each row of words."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    low, high = (octets & 15) == 0, (octets >> 4) == 0
    return int(low[:, : -(-k // 2)].sum()) + int(high[:, : k // 2].sum())


def bias_words(bias: Array | None, layout: MatrixLayout) -> Array:
    """One int32 an output channel, [Np]: fp16 1.0 in the upper half (a multiplier), the fp16 bias in the lower."""
    words = np.full(layout.padded_n, 0x3C00 << 16, dtype="<u4")
    if bias is not None:
        words[: layout.n] |= bias.astype(np.float16, copy=False).view(np.uint16)
    return words.view("<i4")


_NIBBLE_VALUES = {
    "twos": np.array([*range(8), *range(-8, 0)], dtype=np.int8),
    "signmag": np.array([*range(8), *(-w for w in range(8))], dtype=np.int8),
}


def _fill(out: Array, words: Array, scales: Array, offsets: Array | None, layout: MatrixLayout) -> None:
    """Packages of a tile of rows: beats of scales (and offsets), then weights."""
    out16, out32 = out.view("<u2"), out.view("<u4")
    per_package = layout.package_channels // 8
    for package in range(layout.packages):
        start = package * layout.package_bytes
        for beat, values in enumerate((scales,) if offsets is None else (scales, offsets)):
            some = values[:, package * _SCALES : (package + 1) * _SCALES]
            _deal(some.view("<u2"), out16, (start + beat * _BEAT) // 2)
        some = words[:, package * per_package : (package + 1) * per_package]
        if some.shape[1]:
            _deal(some, out32, (start + layout.header_bytes) // 4, flip=True)


def _deal(source: Array, out: Array, column: int, flip: bool = False) -> None:
    """Deal rows out to the ports: out[n % 32, n // 32, column:] = source[n] (its nibbles moved by 8 where `flip`)."""
    rows, width = source.shape
    whole = rows // _PORTS
    target = out[:, :whole, column : column + width]
    dealt = source[: whole * _PORTS].reshape(whole, _PORTS, width).transpose(1, 0, 2)
    rest = out[: rows - whole * _PORTS, whole, column : column + width] if rows % _PORTS else None
    if flip:
        np.bitwise_xor(dealt, _MIDDLE, out=target)
        if rest is not None:
            np.bitwise_xor(source[whole * _PORTS :], _MIDDLE, out=rest)
    else:
        target[...] = dealt
        if rest is not None:
            rest[...] = source[whole * _PORTS :]


def _gather(dealt: Array) -> Array:
    return np.ascontiguousarray(dealt.transpose(1, 0, 2)).reshape(-1, dealt.shape[2])


def _clear_padding(out: Array, layout: MatrixLayout) -> None:
    """Make the nibbles of the last word that are beyond k zero again: dealing had made -8 of them."""
    for k in range(layout.k, align_up(layout.k, 8)):
        package, inside = divmod(k, layout.package_channels)
        byte = package * layout.package_bytes + layout.header_bytes + inside // 2
        out[:, :, byte] &= 0x0F if k % 2 else 0xF0


def _to_signmag(out: Array, layout: MatrixLayout) -> None:
    for package in range(layout.packages):
        start = package * layout.package_bytes
        body = out[:, :, start + layout.header_bytes : start + layout.package_bytes]
        body[...] = _SIGNMAG[body ^ 0x88]
