"""The KV cache, byte for byte where the image says: channel C on PC C % 32, its tokens one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetool.fpga.simulator.traffic import KV, PORTS, Traffic

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KvGeometry:
    """What a cache is like. channels: key/value heads x head_dim. base, capacity_tokens: the manifest's `kv`."""

    layers: int
    kv_heads: int
    head_dim: int
    base: int
    capacity_tokens: int

    @property
    def channels(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, kv: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int) -> KvGeometry:
        return cls(layers, kv_heads, head_dim, kv["base"], kv["capacity_tokens"])


@dataclass(frozen=True)
class KvSnapshot:
    """What a cache holds of some first tokens, float16, tokens last: here [32, layers, 2, channels / 32, tokens].

    A device's cache (fast_cache.py) has its own order, in its own memory.
    """

    data: Array | Tensor

    @property
    def tokens(self) -> int:
        return int(self.data.shape[-1])

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class KvCache:
    """float16 [32 PCs, layers, 2, channels / 32, capacity]: each PC's part is its memory from kv.base on."""

    def __init__(self, geometry: KvGeometry) -> None:
        self.geometry = geometry
        shape = (PORTS, geometry.layers, 2, geometry.channels // PORTS, geometry.capacity_tokens)
        self.data = np.zeros(shape, dtype=np.float16)  # zeroed pages are free until they are written
        self._tensor = torch.from_numpy(self.data)
        self._bytes_per_token = np.full(PORTS, geometry.channels // PORTS * 2, dtype=np.int64)

    def write(self, layer: int, values: bool, position: int, rows: Tensor) -> None:
        """rows: float16 [tokens, channels], of the tokens from `position` on."""
        tokens = rows.shape[0]
        dealt = rows.reshape(tokens, -1, PORTS).permute(2, 1, 0)  # channel C is block C // 32 of PC C % 32
        self._tensor[:, layer, int(values), :, position : position + tokens] = dealt

    def read(self, layer: int, values: bool, tokens: int, traffic: Traffic) -> Tensor:
        """float32 [kv_heads, head_dim, tokens] of the first tokens, a copy; counted as one reading of each of them."""
        traffic.read(KV, self._bytes_per_token * tokens)
        view = self._tensor[:, layer, int(values), :, :tokens]
        g = self.geometry
        whole = view.permute(1, 0, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return whole.view(g.kv_heads, g.head_dim, tokens)

    def write_both(self, layer: int, position: int, rows: Tensor) -> None:
        """rows: [tokens, 2 x channels], keys and then values of the tokens from `position` on; rounded to float16."""
        tokens = rows.shape[0]
        dealt = rows.reshape(tokens, 2, -1, PORTS).permute(3, 1, 2, 0)
        self._tensor[:, layer, :, :, position : position + tokens] = dealt

    def read_both(self, layer: int, tokens: int, traffic: Traffic) -> Tensor:
        """float32 [2, kv_heads, head_dim, tokens]: `read` of keys and of values."""
        traffic.read(KV, 2 * self._bytes_per_token * tokens)
        view = self._tensor[:, layer, :, :, :tokens].permute(1, 2, 0, 3)
        g = self.geometry
        whole = view.to(torch.float32, memory_format=torch.contiguous_format)
        return whole.view(2, g.kv_heads, g.head_dim, tokens)

    def port(self, pc: int) -> Array:
        """The bytes of one PC from kv.base on: uint8, not a copy."""
        octets: Array = self.data[pc].reshape(-1).view(np.uint8)
        return octets

    def snapshot(self, tokens: int) -> KvSnapshot:
        return KvSnapshot(self.data[..., :tokens].copy())

    def restore(self, snapshot: KvSnapshot, tokens: int) -> None:
        self.data[..., :tokens] = snapshot.data[..., :tokens]
