"""The board's formats written from their formulas with plain loops, one weight at a time; shares nothing with edgetool.

rowbytes    = Kp/2 + header * ceil(Kp / package)        header: 32 bytes of scales, with zero points 64
scale(n,k)  : port n%32, offset (n//32)*rowbytes + (k//package)*(header + package/2) + 2*((k%package)//group)
weight(n,k) : port n%32, offset ... + header + (k%package)//2, low nibble = even k
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

PORTS = 32


def nibble(weight: int, encoding: str) -> int:
    """Four bits of a weight in -8..7."""
    if encoding == "twos":
        return weight & 0xF
    assert encoding == "signmag" and weight >= -7, weight
    return weight if weight >= 0 else 8 - weight


def half(value: Any) -> bytes:
    """Two bytes, little endian."""
    return struct.pack("<e", float(value))


def ports_of(
    weights: Sequence[Sequence[int]],
    scales: Sequence[Sequence[Any]],
    group: int,
    encoding: str = "twos",
    offsets: Sequence[Sequence[Any]] | None = None,
) -> list[bytes]:
    """The bytes of each port. weights: -8..7 [N][K]. scales, offsets: [N][groups]."""
    n_rows, width = len(weights), len(weights[0])
    padded_k = -(-width // 128) * 128
    package = 16 * group
    header = 32 if offsets is None else 64
    row_bytes = padded_k // 2 + header * math.ceil(padded_k / package)
    local_rows = -(-n_rows // PORTS)
    ports = [bytearray(local_rows * row_bytes) for _ in range(PORTS)]
    for n in range(n_rows):
        port, row = ports[n % PORTS], n // PORTS * row_bytes
        for k in range(width):
            start = row + k // package * (header + package // 2)
            at = start + 2 * (k % package // group)
            port[at : at + 2] = half(scales[n][k // group])
            if offsets is not None:
                port[at + 32 : at + 34] = half(offsets[n][k // group])
            at = start + header + k % package // 2
            port[at] |= nibble(int(weights[n][k]), encoding) << (4 * (k % 2))
    return [bytes(port) for port in ports]


def half_ports(values: Sequence[Sequence[Any]]) -> list[bytes]:
    """The bytes of each port for a matrix of plain fp16."""
    padded_k = -(-len(values[0]) // 128) * 128
    local_rows = -(-len(values) // PORTS)
    ports = [bytearray(local_rows * padded_k * 2) for _ in range(PORTS)]
    for n, row in enumerate(values):
        for k, value in enumerate(row):
            at = n // PORTS * padded_k * 2 + 2 * k
            ports[n % PORTS][at : at + 2] = half(value)
    return [bytes(port) for port in ports]


def bias_file(bias: Sequence[Any] | None, n_rows: int) -> bytes:
    """One int32 an output channel, padded to a multiple of 32."""
    padded = -(-n_rows // PORTS) * PORTS
    words = []
    for n in range(padded):
        (low,) = struct.unpack("<H", half(bias[n] if bias is not None and n < n_rows else 0.0))
        words.append(0x3C00 << 16 | low)
    return struct.pack(f"<{padded}I", *words)


def norm_file(gamma: Sequence[Any]) -> bytes:
    """fp16 gamma, then beta = 0."""
    return b"".join(half(value) for value in gamma) + bytes(2 * len(gamma))


def plain_codes(linear: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights -8..7 and scales of a symmetric canonical linear, as plain integers."""
    return linear.codes.astype(np.int64) - 8, linear.scales
