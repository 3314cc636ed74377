"""Runs an image from its own files alone, in float64: shows that manifest and program say everything that is needed.

Written from docs/image-format.md. It does not follow the numerics `et1` (no fp16 between operations); what it shows is
that every weight, order, table and operation is the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgetool.fpga.image import Image
from edgetool.fpga.scalar_reader import ScalarReader


class Runner:
    """One sequence through the image at `directory`."""

    def __init__(self, directory: Path, dtype: Any = np.float64) -> None:
        self.image = Image.open(directory)
        self.program = self.image.program
        self._dtype = dtype
        self._ports = [np.asarray(self.image.port(pc)) for pc in range(32)]
        self._weights: dict[str, np.ndarray] = {}
        self.cache: dict[tuple[int, str], np.ndarray] = {}
        self.position = 0

    def feed(self, ids: list[int]) -> np.ndarray:
        """Logits of the last token, float64 [vocab]; the KV cache keeps all of `ids`."""
        self.buffers: dict[str, np.ndarray] = {}
        self.ids = ids
        for op in self.program["prologue"]:
            self._do(op, 0)
        for layer in range(self.program["layers"]):
            for op in self.program["layer"]:
                self._do(op, layer)
        for op in self.program["epilogue"]:
            self._do(op, 0)
        self.position += len(ids)
        return self.buffers["logits"][-1]

    def weight(self, name: str) -> np.ndarray:
        """[N, K] of a matrix in HBM, in this runner's dtype."""
        if name not in self._weights:
            record = self.image.tensors[name]
            reader, rows = ScalarReader(self._ports, record, self.image.encoding), np.arange(record["N"])
            if not record["group"]:
                self._weights[name] = reader.halves(rows).astype(self._dtype)
            else:
                scales, offsets = (
                    np.repeat(x.astype(self._dtype), record["group"], axis=1) for x in reader.scales(rows)
                )
                wide = reader.codes(rows) * scales[:, : record["K"]] + offsets[:, : record["K"]]
                self._weights[name] = wide
        return self._weights[name]

    def _do(self, op: dict[str, Any], layer: int) -> None:
        fields = {
            key: value.replace("{layer}", str(layer)) if isinstance(value, str) else value for key, value in op.items()
        }
        getattr(self, f"_{fields.pop('op').lower()}")(
            layer, **{f"{key}_" if key == "in" else key: v for key, v in fields.items()}
        )

    def _embed(self, layer: int, table: str, out: str) -> None:
        embedding = self.image.manifest[table]
        rows = np.memmap(self.image.directory / embedding["file"], "<f2", "r", shape=tuple(embedding["shape"]))
        self.buffers[out] = rows[self.ids].astype(np.float64)

    def _rmsnorm(self, layer: int, in_: str, out: str, gamma: str, eps: float, width: int, rows: str = "seq") -> None:
        x = self.buffers[in_][-1:] if rows == "last" else self.buffers[in_]
        heads = x.reshape(len(x), -1, width)
        scale, beta = self.image.constant(gamma).astype(np.float64)
        normed = heads / np.sqrt(np.mean(heads**2, axis=2, keepdims=True) + eps) * scale + beta
        self.buffers[out] = normed.reshape(x.shape)

    def _perm(self, layer: int, in_: str, out: str, index: str) -> None:
        self.buffers[out] = self.buffers[in_][:, self.image.constant(index)]

    def _mvm(
        self,
        layer: int,
        in_: str,
        out: str,
        weight: str,
        bias: str,
        residual: str = "",
        mul: str = "",
        rows: str = "seq",
    ) -> None:
        words = self.image.constant(bias).view(np.uint32)
        n = self.image.tensors[weight]["N"]
        assert np.all(words >> 16 == 0x3C00)
        y = self.buffers[in_] @ self.weight(weight).T
        y = y + (words & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)[:n]
        if residual:
            y = y + self.buffers[residual]
        if mul:
            y = y * self.buffers[mul]
        self.buffers[out] = y

    def _rope(
        self, layer: int, in_: str, out: str, heads: int, head_dim: int, rotary_dim: int, style: str, cos: str, sin: str
    ) -> None:
        x = self.buffers[in_].reshape(len(self.ids), heads, head_dim).copy()
        here = slice(self.position, self.position + len(self.ids))
        c, s = (self.image.constant(name)[here].astype(np.float64)[:, None, :] for name in (cos, sin))
        if style == "half":
            first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
        else:
            assert style == "interleaved"
            first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * c - b * s, b * c + a * s
        self.buffers[out] = x.reshape(len(self.ids), -1)

    def _kv_write(self, layer: int, in_: str, cache: str, kv_heads: int, head_dim: int) -> None:
        new = self.buffers[in_].reshape(-1, kv_heads, head_dim)
        old = self.cache.get((layer, cache), np.zeros((0, kv_heads, head_dim)))
        self.cache[layer, cache] = np.concatenate([old, new])

    def _qk(
        self, layer: int, in_: str, out: str, heads: int, kv_heads: int, head_dim: int, scale: float, mask: str
    ) -> None:
        assert mask == "causal"
        q = self.buffers[in_].reshape(-1, heads, head_dim)
        k = np.repeat(self.cache[layer, "k"], heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * scale
        position = self.position + np.arange(len(q))
        scores[:, np.arange(k.shape[0])[None, :] > position[:, None]] = -np.inf
        self.buffers[out] = scores

    def _softmax(self, layer: int, in_: str, out: str, heads: int, exp: str) -> None:
        shifted = self.buffers[in_] - self.buffers[in_].max(axis=2, keepdims=True)
        table = self.image.constant(exp).astype(np.float64)
        weights = table[shifted.astype(np.float16).view(np.uint16)]
        exact = np.exp(shifted)
        assert np.allclose(weights, exact, atol=2e-3)  # an fp16 argument is off by 2^-11 of itself
        self.buffers[out] = exact / exact.sum(axis=2, keepdims=True)

    def _pv(self, layer: int, in_: str, out: str, heads: int, kv_heads: int, head_dim: int) -> None:
        v = np.repeat(self.cache[layer, "v"], heads // kv_heads, axis=1)
        mixed = np.einsum("hqk,khd->qhd", self.buffers[in_], v)
        self.buffers[out] = mixed.reshape(mixed.shape[0], -1)

    def _act(self, layer: int, in_: str, out: str, table: str) -> None:
        x = self.buffers[in_]
        looked_up = self.image.constant(table).astype(np.float64)[x.astype(np.float16).view(np.uint16)]
        exact = x / (1 + np.exp(-x))
        assert np.allclose(looked_up, exact, rtol=4e-3, atol=1e-4)  # fp16 in, fp16 out
        self.buffers[out] = exact

    def _logits(self, layer: int, in_: str, rows: str) -> None:
        assert self.buffers[in_].shape[0] == 1

    def _argmax(self, layer: int, in_: str, out: str, rows: str) -> None:
        self.buffers[out] = np.argmax(self.buffers[in_], axis=1)
