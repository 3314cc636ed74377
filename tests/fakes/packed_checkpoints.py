"""Small quantised checkpoints without torch: plain integers put into words by the scalar oracle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import scalar_layouts as oracle

HIDDEN, INNER, VOCAB = 96, 160, 48
DTYPES = {"float16": "F16", "float32": "F32", "uint16": "BF16", "int32": "I32", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Layer:
    """A linear as plain integers: codes and zeros uint8 [out, in] and [out, groups], scales as stored, g_idx [in]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray
    bits: int

    @property
    def sym(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def group_size(self) -> int:
        return int(np.bincount(self.g_idx).max())

    @property
    def act_order(self) -> bool:
        return not np.array_equal(self.g_idx, np.arange(self.codes.shape[1]) // self.group_size)

    def tensors(self, kind: str, sym: bool | None = None) -> dict[str, np.ndarray]:
        """Suffix -> array as format `kind` stores it."""
        codes, zeros = self.codes.tolist(), self.zeros.tolist()
        if kind == "awq":
            return oracle.awq_tensors(codes, zeros, self.scales)
        if kind == "compressed-tensors":
            g_idx = self.g_idx.tolist() if self.act_order else None
            sym = self.sym if sym is None else sym
            return oracle.compressed_tensors(codes, zeros, self.scales, g_idx, self.bits, sym)
        version = 2 if kind == "gptq_v2" else 1
        return oracle.gptq_tensors(codes, zeros, self.scales, self.g_idx.tolist(), self.bits, version)

    def weight(self) -> np.ndarray:
        """float32 [out, in] by the definition."""
        scales = self.scales
        wide = (scales.astype(np.uint32) << 16).view(np.float32) if scales.dtype == np.uint16 else np.float32(scales)
        steps = self.codes.astype(np.int64) - self.zeros.astype(np.int64)[:, self.g_idx]
        return wide[:, self.g_idx] * steps.astype(np.float32)


def random_layer(
    seed: int,
    out_features: int,
    in_features: int,
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = False,
    act_order: bool = False,
    lowest_zero: int = 1,
) -> Layer:
    """group_size -1: one group. Codes scatter around their zero, as those of trained weights do."""
    rng = np.random.default_rng(seed)
    size = in_features if group_size == -1 else group_size
    g_idx = np.arange(in_features) // size
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    zeros = rng.integers(lowest_zero, top + 1, (out_features, g_idx[-1] + 1)).astype(np.uint8)
    if not sym:
        near = np.clip(middle + np.rint(rng.normal(0, 1, zeros.shape)), max(lowest_zero, 1), top).astype(np.uint8)
        zeros = np.where(rng.random(zeros.shape) < 0.8, near, zeros)
        zeros[0, 0] = top if middle != top else middle - 1  # certainly asymmetric
    else:
        zeros[:] = middle
    if act_order:
        g_idx = rng.permutation(g_idx)
    drawn = zeros[:, g_idx] + np.rint(rng.normal(0, (1 << bits) / 6, (out_features, in_features)))
    codes = np.clip(drawn, 0, top).astype(np.uint8)
    codes[0, :2] = 0, top
    scales = (rng.normal(0, 0.02, zeros.shape)).astype(np.float16)
    scales[scales == 0] = np.float16(0.01)
    return Layer(codes, zeros, scales, g_idx.astype(np.int32), bits)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any] | None = None) -> None:
    """By hand. uint16 arrays are BF16. header: entries that replace or join the true ones."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        entries[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries | dict(header or {})).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By hand: name -> array, BF16 as uint16."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    dtypes = {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1"}
    arrays = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[start + begin : start + end], dtypes[entry["dtype"]])
            arrays[name] = data.reshape(entry["shape"]).copy()
    return arrays


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of all safetensors files in `directory`."""
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found = read_safetensors(path)
        assert not arrays.keys() & found.keys()
        arrays |= found
    return arrays
