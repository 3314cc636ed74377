"""Reads an image element by element, each by its own address: the oracle that packing is held against.

Written from the formulas of docs/image-format.md and nothing else; it shares no code with layout.py, so an error would
have to be made twice to go unseen. `weight` is the formula for one element; `rows` evaluates it for many at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        for port, mine, n in self._by_port(rows):
            _, _, at_pair = self._offset(n, columns)
            out[mine] = table[self._nibbles(port, at_pair, columns)]
        return out

    def scales(self, rows: Array) -> tuple[Array, Array]:
        """float16 [len(rows), groups]: scale and offset of every group (offset 0 where there are none)."""
        firsts = np.arange(0, self.record["K"], self.record["group"])
        out = np.zeros((2, len(rows), len(firsts)), dtype="<u2")
        for port, mine, n in self._by_port(rows):
            at_scale, at_offset, _ = self._offset(n, firsts)
            out[0, mine] = self._words(port, at_scale)
            if self.record["zeros"]:
                out[1, mine] = self._words(port, at_offset)
        return out[0].view("<f2"), out[1].view("<f2")

    def halves(self, rows: Array) -> Array:
        """float16 [len(rows), K] of a matrix of plain fp16 (group 0)."""
        out = np.empty((len(rows), self.record["K"]), dtype="<u2")
        for port, mine, n in self._by_port(rows):
            out[mine] = self._words(port, self._half_at(n, np.arange(self.record["K"])))
        return out.view("<f2")

    def padding(self, rows: Array) -> int:
        """How many values in the columns beyond K of some rows are not 0."""
        beyond = np.arange(self.record["K"], self.record["Kp"])
        count = 0
        for port, _, n in self._by_port(rows):
            if self.record["group"]:
                count += int(np.count_nonzero(self._nibbles(port, self._offset(n, beyond)[2], beyond)))
            else:
                count += int(np.count_nonzero(self._words(port, self._half_at(n, beyond))))
        return count

    def _by_port(self, rows: Array) -> Iterator[tuple[Array, Array, Array]]:
        """For each port: its bytes, which of `rows` lie on it, and these as a column."""
        for number, port in enumerate(self.ports):
            mine = np.flatnonzero(rows % 32 == number)
            if mine.size:
                yield port, mine, rows[mine][:, None]

    def _half_at(self, n: Array, k: Array) -> Array:
        at: Array = self.record["addr"] + n // 32 * 2 * self.record["Kp"] + 2 * k
        return at

    @staticmethod
    def _nibbles(port: Array, at: Array, k: Array) -> Array:
        nibbles: Array = port[at] >> np.where(k % 2, 4, 0).astype(np.uint8) & 15
        return nibbles

    @staticmethod
    def _words(port: Array, at: Array) -> Array:
        words: Array = port[at] | port[at + 1].astype("<u2") << 8
        return words
