"""What an image's operations should give: torch in float32, with the weights of the checkpoint that it was made of.

Shares no code with the simulator nor with the compiler's packing: matrices are dequantised by the checkpoint's plain
reader (what the compiler rounded itself: by scalar_reader.py), and each operation is its formula in
docs/image-format.md without a word of `et1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import detect
from edgetool.errors import BadInput
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from edgetool.fpga.scalar_reader import ScalarReader
from edgetool.fpga.verify import Array, CheckpointSide

_KEEP_BYTES = 1 << 30


class ReferenceWeights:
    """Dense matrices for an image's names. Raises BadInput where the checkpoint is another model's."""

    def __init__(self, image: Image, checkpoint: Checkpoint) -> None:
        self.image = image
        self._side = CheckpointSide(checkpoint, detect(checkpoint.tensors, checkpoint.read, checkpoint.config))
        self._ports = [image.port(pc) for pc in range(VCU128.pseudo_channels)]
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        for record in image.tensors.values():
            self._check(record["name"], record["source"], record["K"])

    def _check(self, name: str, source: Mapping[str, Any], width: int) -> None:
        """The checkpoint must have the rows that a matrix comes from."""
        layouts = {} if self._side.found is None else self._side.found.layouts
        module, rows = source["module"], source["rows"][1]
        if module in layouts:
            shape = (layouts[module].out_features, layouts[module].in_features)
        else:
            info = self._side.checkpoint.tensors.get(f"{module}.weight")
            shape = (0, 0) if info is None or len(info.shape) != 2 else (info.shape[0], info.shape[1])
        if shape[0] < rows or shape[1] != width:
            found = f"{module} is {list(shape)}" if any(shape) else f"there is no {module}"
            raise BadInput(
                f"{self._side.checkpoint.directory}: {found}; {name} of the image comes from {rows} rows of {width}",
                "name the checkpoint that the image was compiled from",
            )

    def rounded(self, name: str) -> bool:
        """Whether the compiler rounded this matrix itself, so that the checkpoint does not have its values."""
        return str(self.image.tensors[name]["source"]["as"]) == "rounded"

    def stored(self, name: str) -> Tensor:
        """float32 [N, K] as the image has it, element by element through its own address."""
        record = self.image.tensors[name]
        reader, rows = ScalarReader(self._ports, record, self.image.encoding), np.arange(record["N"])
        wide = (np.repeat(each.astype(np.float32), record["group"], axis=1) for each in reader.scales(rows))
        scales, offsets = (each[:, : record["K"]] for each in wide)
        return torch.from_numpy(reader.codes(rows) * scales + offsets)

    def matrix(self, name: str) -> Tensor:
        """float32 [N, K] in the image's order of rows and columns. The first ones are kept, up to _KEEP_BYTES."""
        if name not in self._kept:
            dense = self._read(name)
            if self._kept_bytes + dense.nbytes > _KEEP_BYTES:
                return dense
            self._kept[name] = dense
            self._kept_bytes += dense.nbytes
        return self._kept[name]

    def _read(self, name: str) -> Tensor:
        if self.rounded(name):
            return self.stored(name)
        record = self.image.tensors[name]
        rows, columns = (self._order(record, key) for key in ("rows", "columns"))
        there = record["source"]["rows"][0] + (np.arange(record["N"]) if rows is None else rows)
        module = record["source"]["module"]
        dense = self._side.weights(module, self._side.linear(module), there)
        return torch.from_numpy(np.ascontiguousarray(dense if columns is None else dense[:, columns]))

    def _order(self, record: Mapping[str, Any], key: str) -> Array | None:
        name = record.get("perm", {}).get(key)
        return None if name is None else self.image.constant(name).astype(np.int64)

    def constant(self, name: str) -> Tensor:
        """An array of DDR in float32."""
        return torch.from_numpy(self.image.constant(name).astype(np.float32))

    def bias(self, name: str) -> Tensor:
        """float32 [Np]."""
        words = self.image.constant(name).view(np.uint32)
        return torch.from_numpy((words & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32))

    def embedding(self, ids: Tensor) -> Tensor:
        record = self.image.manifest["embedding"]
        path = self.image.directory / record["file"]
        rows = np.memmap(path, dtype="<f2", mode="r", shape=tuple(record["shape"]))
        return torch.from_numpy(rows[ids.numpy()].astype(np.float32))


class Reference:
    """One sequence from its beginning, all tokens at once.

    `buffers` are what operations read; whoever runs them decides what is put there: their own results, or another
    executor's.
    """

    def __init__(self, weights: ReferenceWeights, ids: Tensor) -> None:
        self.weights = weights
        self.ids = ids
        self.buffers: dict[str, Tensor] = {}
        self._cache: dict[str, Tensor] = {}

    def run(self, kind: str, fields: Mapping[str, Any]) -> Tensor:
        """The result of one operation on `buffers`, float32; KV_WRITE and LOGITS give their input."""
        result: Tensor = getattr(self, f"_{kind.lower()}")(fields)
        return result

    def _embed(self, op: Mapping[str, Any]) -> Tensor:
        return self.weights.embedding(self.ids)

    def _rmsnorm(self, op: Mapping[str, Any]) -> Tensor:
        x = self.buffers[op["in"]]
        runs = x.reshape(len(x), -1, op["width"])
        gamma, beta = self.weights.constant(op["gamma"])
        normed = runs / torch.sqrt(runs.square().mean(2, keepdim=True) + op["eps"])
        result: Tensor = (normed * gamma + beta).reshape(x.shape)
        return result

    def _perm(self, op: Mapping[str, Any]) -> Tensor:
        order = torch.from_numpy(self.weights.image.constant(op["index"]).astype(np.int64))
        return self.buffers[op["in"]][:, order]

    def _mvm(self, op: Mapping[str, Any]) -> Tensor:
        weight = self.weights.matrix(op["weight"])
        y = self.buffers[op["in"]] @ weight.t() + self.weights.bias(op["bias"])[: len(weight)]
        if "residual" in op:
            y = y + self.buffers[op["residual"]]
        return y * self.buffers[op["mul"]] if "mul" in op else y

    def _rope(self, op: Mapping[str, Any]) -> Tensor:
        x = self.buffers[op["in"]].reshape(len(self.ids), op["heads"], op["head_dim"])
        turning, rest = x[..., : op["rotary_dim"]], x[..., op["rotary_dim"] :]
        cos, sin = (self.weights.constant(op[name])[: len(x)][:, None] for name in ("cos", "sin"))
        if op["style"] == "half":
            a, b = turning.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1).flatten(1)

    def _kv_write(self, op: Mapping[str, Any]) -> Tensor:
        heads = self.buffers[op["in"]].reshape(len(self.ids), op["kv_heads"], op["head_dim"]).transpose(0, 1)
        self._cache[op["cache"]] = heads.half().float()  # what the image's cache holds
        return self.buffers[op["in"]]

    def _qk(self, op: Mapping[str, Any]) -> Tensor:
        queries = self.buffers[op["in"]].reshape(len(self.ids), op["heads"], op["head_dim"]).transpose(0, 1)
        keys = self._cache["k"].repeat_interleave(op["heads"] // op["kv_heads"], 0)
        scores: Tensor = queries @ keys.transpose(1, 2) * op["scale"]
        behind = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).triu(1)
        return scores.masked_fill(behind, -torch.inf)

    def _softmax(self, op: Mapping[str, Any]) -> Tensor:
        behind = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).triu(1)
        return self.buffers[op["in"]].masked_fill(behind, -torch.inf).softmax(2)

    def _pv(self, op: Mapping[str, Any]) -> Tensor:
        values = self._cache["v"].repeat_interleave(op["heads"] // op["kv_heads"], 0)
        return (self.buffers[op["in"]] @ values).transpose(0, 1).reshape(len(self.ids), -1)

    def _act(self, op: Mapping[str, Any]) -> Tensor:
        return torch.nn.functional.silu(self.buffers[op["in"]])

    def _logits(self, op: Mapping[str, Any]) -> Tensor:
        return self.buffers[op["in"]]

    def _argmax(self, op: Mapping[str, Any]) -> Tensor:
        return self.buffers[op["in"]].argmax(1, keepdim=True).float()
