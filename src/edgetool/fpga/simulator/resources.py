"""What an image's files hold, taken apart by the formulas of docs/image-format.md; bytes are counted as they are read.

It shares no code with the compiler's layout.py, nor with scalar_reader.py, which the tests hold it against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.errors import BadInput
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.interfaces import HalfMatrix, Int4Matrix
from edgetool.fpga.simulator.traffic import PORTS

Array = npt.NDArray[Any]

_SCALES_PER_PACKAGE = 16
_BEAT_BYTES = 32
_MULTIPLIER_ONE = 0x3C00


def _pairs(encoding: str) -> Array:
    """uint16 [256]: a byte of two weights as two int8 in memory order, the even channel (low nibble) first."""
    nibbles = np.arange(16, dtype=np.int8)
    negative = 8 - nibbles if encoding == "signmag" else nibbles - 16
    values = np.where(nibbles < 8, nibbles, negative).astype(np.int8)
    octets = np.arange(256)
    return np.stack([values[octets & 15], values[octets >> 4]], axis=1).view("<u2").reshape(256)


class ImageResources:
    """Matrices and constants of one image. Nothing that is returned refers to its files, but the mapped embedding."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._ports = [image.port(pc) for pc in range(PORTS)]
        self._records = image.tensors
        self._pairs = _pairs(image.encoding)
        self.read_bytes_by_role: dict[str, int] = {}
        """What one reading of every matrix that was asked for took."""

    def matrix(self, name: str) -> Int4Matrix | HalfMatrix:
        """A matrix with all its padding."""
        record = self._records[name]
        found = self._int4(record) if record["group"] else self._half(record)
        total = int(found.read_bytes_per_pc.sum())
        self.read_bytes_by_role[found.role] = self.read_bytes_by_role.get(found.role, 0) + total
        return found

    def constant(self, name: str) -> Array:
        return self._image.constant(name)

    def bias(self, name: str) -> Array:
        """float16 [Np]. Raises BadInput where a multiplier is not 1."""
        words = self.constant(name).view("<u4")
        if np.any(words >> 16 != _MULTIPLIER_ONE):
            raise BadInput(f"{self._image.directory}: {name} has multipliers other than 1.0", "compile it again")
        return (words & 0xFFFF).astype("<u2").view("<f2")

    def embedding(self) -> Array:
        record = self._image.manifest["embedding"]
        path = self._image.directory / record["file"]
        return np.memmap(path, dtype="<f2", mode="r", shape=tuple(record["shape"]))

    def _rows(self, record: Mapping[str, Any], row_bytes: int) -> list[Array]:
        """The matrix's bytes on each port, uint8 [local rows, row_bytes]."""
        local = record["Np"] // PORTS
        start = record["addr"]
        return [port[start : start + local * row_bytes].reshape(local, row_bytes) for port in self._ports]

    def _int4(self, record: Mapping[str, Any]) -> Int4Matrix:
        group, width = record["group"], record["Kp"]
        beats = 2 if record["zeros"] else 1
        header, body = beats * _BEAT_BYTES, _SCALES_PER_PACKAGE * group // 2
        packages = -(-width // (_SCALES_PER_PACKAGE * group))
        ports = self._rows(record, width // 2 + header * packages)
        local = record["Np"] // PORTS
        # row n is local row n // 32 of port n % 32: [local row, port] in memory order are the rows in order
        packed = np.empty((local, PORTS, width // 2), dtype=np.uint8)
        scales = np.empty((beats, local, PORTS, packages * _BEAT_BYTES), dtype=np.uint8)
        read = np.zeros(PORTS, dtype=np.int64)
        for pc, rows in enumerate(ports):
            for package in range(packages):
                start = package * (header + body)
                for beat in range(beats):
                    one = rows[:, start + beat * _BEAT_BYTES : start + (beat + 1) * _BEAT_BYTES]
                    scales[beat, :, pc, package * _BEAT_BYTES : (package + 1) * _BEAT_BYTES] = one
                    read[pc] += one.size
                weights = rows[:, start + header : start + header + body]
                packed[:, pc, package * body : package * body + weights.shape[1]] = weights
                read[pc] += weights.size
        codes = np.take(self._pairs, packed).view(np.int8).reshape(record["Np"], width)
        groups = -(-width // group)
        factors = [beat.view("<f2").reshape(record["Np"], -1)[:, :groups] for beat in scales]
        return Int4Matrix(
            record["name"],
            record["role"],
            record["N"],
            record["K"],
            group,
            codes,
            factors[0],
            factors[1] if record["zeros"] else None,
            read,
        )

    def _half(self, record: Mapping[str, Any]) -> HalfMatrix:
        ports = self._rows(record, 2 * record["Kp"])
        values = np.stack(ports, axis=1).view("<f2").reshape(record["Np"], record["Kp"])
        read = np.array([rows.size for rows in ports], dtype=np.int64)
        return HalfMatrix(record["name"], record["role"], record["N"], record["K"], values, read)
