"""Reads an image element by element, each by its own address: the oracle that packing is held against.

Written from the formulas of docs/image-format.md and nothing else; it shares no code with layout.py, so an error would
have to be made twice to go unseen. `weight` is the formula for one element; `rows` evaluates it for many at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ScalarReader:
    """One matrix of an image.

    ports: the 32 pseudo-channels as uint8 arrays. record: the tensor's record in the manifest. encoding: twos, signmag.
    """

    ports: Sequence[Array]
    record: Mapping[str, Any]
    encoding: str = "twos"

    def _offset(self, n: Any, k: Any) -> tuple[Any, Any, Any]:
        """Of element (n, k), in its port: byte of the scale, of the offset, and of the nibble pair."""
        group = self.record["group"]
        beats = 64 if self.record["zeros"] else 32
        package = beats + 8 * group  # 16 groups of group / 2 bytes
        whole = -(-self.record["Kp"] // (16 * group))
        row = self.record["Kp"] // 2 + beats * whole
        start = self.record["addr"] + n // 32 * row + k // (16 * group) * package
        inside = k % (16 * group)
        return start + 2 * (inside // group), start + 32 + 2 * (inside // group), start + beats + inside // 2

    def weight(self, n: int, k: int) -> tuple[int, np.float16, np.float16]:
        """(q, scale, offset) of one element: the weight is scale * q + offset, q in -8..7."""
        port = self.ports[n % 32]
        at_scale, at_offset, at_pair = self._offset(n, k)
        pair = int(port[at_pair])
        nibble = pair >> 4 if k % 2 else pair & 15
        scale = np.frombuffer(bytes(port[at_scale : at_scale + 2]), dtype="<f2")[0]
        offset = np.float16(0)
        if self.record["zeros"]:
            offset = np.frombuffer(bytes(port[at_offset : at_offset + 2]), dtype="<f2")[0]
        return self._value(nibble), scale, offset

    def _value(self, nibble: int) -> int:
        if self.encoding == "signmag":
            return nibble if nibble < 8 else 8 - nibble
        return nibble if nibble < 8 else nibble - 16

    def codes(self, rows: Array) -> Array:
        """int8 [len(rows), K]: q of every element of some rows."""
        columns = np.arange(self.record["K"])
        table = np.array([self._value(nibble) for nibble in range(16)], dtype=np.int8)
        out = np.empty((len(rows), len(columns)), dtype=np.int8)
        shift = np.where(columns % 2, 4, 0).astype(np.uint8)
        for index, n in enumerate(rows):
            _, _, at_pair = self._offset(int(n), columns)
            out[index] = table[self.ports[int(n) % 32][at_pair] >> shift & 15]
        return out

    def scales(self, rows: Array) -> tuple[Array, Array]:
        """float16 [len(rows), groups]: scale and offset of every group (offset 0 where there are none)."""
        firsts = np.arange(0, self.record["K"], self.record["group"])
        out = np.zeros((2, len(rows), len(firsts)), dtype="<u2")
        for index, n in enumerate(rows):
            port = self.ports[int(n) % 32]
            at_scale, at_offset, _ = self._offset(int(n), firsts)
            out[0, index] = port[at_scale] | port[at_scale + 1].astype("<u2") << 8
            if self.record["zeros"]:
                out[1, index] = port[at_offset] | port[at_offset + 1].astype("<u2") << 8
        return out[0].view("<f2"), out[1].view("<f2")

    def halves(self, rows: Array) -> Array:
        """float16 [len(rows), K] of a matrix of plain fp16 (group 0)."""
        columns = np.arange(self.record["K"])
        out = np.empty((len(rows), len(columns)), dtype="<u2")
        for index, n in enumerate(rows):
            port = self.ports[int(n) % 32]
            at = self.record["addr"] + int(n) // 32 * 2 * self.record["Kp"] + 2 * columns
            out[index] = port[at] | port[at + 1].astype("<u2") << 8
        return out.view("<f2")

    def padding(self, rows: Array) -> int:
        """How many bytes that belong to padding of some rows are not 0: columns beyond K, scales of no group."""
        group = self.record["group"]
        count = 0
        for n in rows:
            port = self.ports[int(n) % 32]
            beyond = np.arange(self.record["K"], self.record["Kp"])
            if not group:
                at = self.record["addr"] + int(n) // 32 * 2 * self.record["Kp"] + 2 * beyond
                count += int(np.count_nonzero(port[at])) + int(np.count_nonzero(port[at + 1]))
                continue
            _, _, at_pair = self._offset(int(n), beyond)
            count += int(np.count_nonzero(port[at_pair] >> np.where(beyond % 2, 4, 0).astype(np.uint8) & 15))
        return count
