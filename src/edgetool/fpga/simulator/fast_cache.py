"""The KV cache of `fast` on a device: float16 [layers, keys and values, kv_heads, head_dim, capacity] in its memory.

On the CPU the cache is the image's own, byte for byte (kv_cache.py). A device reads it in one piece instead.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from edgetool.fpga.simulator.kv_cache import KvGeometry, KvSnapshot
from edgetool.fpga.simulator.traffic import KV, PORTS, Traffic


class DeviceKvCache:
    """Read and written as KvCache is, and counted like it."""

    def __init__(self, geometry: KvGeometry, device: torch.device) -> None:
        self.geometry = geometry
        shape = (geometry.layers, 2, geometry.kv_heads, geometry.head_dim, geometry.capacity_tokens)
        self._data = torch.zeros(shape, dtype=torch.float16, device=device)
        self._bytes_per_token = np.full(PORTS, geometry.channels // PORTS * 2, dtype=np.int64)

    def write(self, layer: int, values: bool, position: int, rows: Tensor) -> None:
        """rows: [tokens, channels], of the tokens from `position` on."""
        tokens = rows.shape[0]
        heads = rows.reshape(tokens, self.geometry.kv_heads, self.geometry.head_dim)
        self._data[layer, int(values), :, :, position : position + tokens] = heads.permute(1, 2, 0)

    def read(self, layer: int, values: bool, tokens: int, traffic: Traffic) -> Tensor:
        """float32 [kv_heads, head_dim, tokens] of the first tokens."""
        traffic.read(KV, self._bytes_per_token * tokens)
        return self._data[layer, int(values), :, :, :tokens].float()

    def write_both(self, layer: int, position: int, rows: Tensor) -> None:
        """rows: [tokens, 2 x channels], keys and then values."""
        tokens = rows.shape[0]
        heads = rows.reshape(tokens, 2, self.geometry.kv_heads, self.geometry.head_dim)
        self._data[layer, :, :, :, position : position + tokens] = heads.permute(1, 2, 3, 0)

    def read_both(self, layer: int, tokens: int, traffic: Traffic) -> Tensor:
        """float32 [2, kv_heads, head_dim, tokens]."""
        traffic.read(KV, 2 * self._bytes_per_token * tokens)
        return self._data[layer, :, :, :, :tokens].float()

    def snapshot(self, tokens: int) -> KvSnapshot:
        return KvSnapshot(self._data[..., :tokens].clone())

    def restore(self, snapshot: KvSnapshot, tokens: int) -> None:
        kept = cast(Tensor, snapshot.data)
        self._data[..., :tokens] = kept[..., :tokens]
