"""The numerics `et1`: what docs/image-format.md says, operation by operation, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetool.fpga.simulator import exact_attention
from edgetool.fpga.simulator.exact_half import ExactHalf
from edgetool.fpga.simulator.exact_int4 import ExactInt4
from edgetool.fpga.simulator.exact_sums import tree_sum
from edgetool.fpga.simulator.interfaces import BoundOp, Call, Int4Matrix, MatrixKernel, NumericsName, Resources, Step
from edgetool.fpga.simulator.kv_cache import KvCache, KvGeometry

Run = Callable[[Call], None]

_INFINITE = 0x7C00


class ExactNumerics:
    """Numerics `et1` on the CPU. Buffers are float16, and every operation of the program is one step."""

    name: NumericsName = "et1"
    logits_dtype = torch.float16

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry

    def new_cache(self) -> KvCache:
        return KvCache(self._geometry)

    def compile(self, ops: Sequence[BoundOp], resources: Resources, traced: bool) -> list[Step]:
        """One step for each operation; constants that several share are read once."""
        builder = _Builder(resources)
        return [Step(op, getattr(builder, f"{op.kind.lower()}")(op)) for op in ops]


class _Builder:
    """Makes a function of each operation, with its constants at hand."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._kept: dict[str, Tensor] = {}

    def _half(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = torch.from_numpy(self._resources.constant(name).astype(np.float16))
        return self._kept[name]

    def _single(self, name: str) -> Tensor:
        if f"{name}:32" not in self._kept:
            self._kept[f"{name}:32"] = torch.from_numpy(self._resources.constant(name).astype(np.float32))
        return self._kept[f"{name}:32"]

    def embed(self, op: BoundOp) -> Run:
        table, out = self._resources.embedding(), op.fields["out"]

        def run(call: Call) -> None:
            call.buffers[out] = torch.from_numpy(table[call.ids.numpy()].astype(np.float16))

        return run

    def rmsnorm(self, op: BoundOp) -> Run:
        source, out, width, rows = op.fields["in"], op.fields["out"], op.fields["width"], op.fields.get("rows")
        gamma, beta = self._single(op.fields["gamma"])
        eps, count = torch.tensor(op.fields["eps"], dtype=torch.float32), torch.tensor(width, dtype=torch.float32)

        def run(call: Call) -> None:
            x = call.rows(source, rows)
            runs = x.float().view(x.shape[0], -1, width)
            mean = tree_sum(runs * runs, 2).div_(count)
            root = torch.from_numpy(np.sqrt(mean.add_(eps).numpy()))  # torch's is off by one bit now and then
            normed = runs.div_(root[..., None]).mul_(gamma).add_(beta)
            _put(call, op, out, normed.half().view(x.shape))

        return run

    def perm(self, op: BoundOp) -> Run:
        source, out = op.fields["in"], op.fields["out"]
        index = torch.from_numpy(self._resources.constant(op.fields["index"]).astype(np.int64))

        def run(call: Call) -> None:
            call.buffers[out] = call.buffers[source][:, index]

        return run

    def mvm(self, op: BoundOp) -> Run:
        fields = op.fields
        source, out, rows = fields["in"], fields["out"], fields.get("rows")
        residual, factor = fields.get("residual"), fields.get("mul")
        matrix = self._resources.matrix(fields["weight"])
        role, read = matrix.role, matrix.read_bytes_per_pc
        bias = torch.from_numpy(self._resources.bias(fields["bias"])[: matrix.n].astype(np.float32))
        kernel: MatrixKernel = ExactInt4(matrix) if isinstance(matrix, Int4Matrix) else ExactHalf(matrix)
        del matrix

        def run(call: Call) -> None:
            y = kernel(call.rows(source, rows)).add_(bias)
            if residual:
                y.add_(call.rows(residual, rows))
            if factor:
                y.mul_(call.rows(factor, rows))
            call.traffic.read(role, read)
            _put(call, op, out, y.half())

        return run

    def rope(self, op: BoundOp) -> Run:
        fields = op.fields
        source, out, heads, width = fields["in"], fields["out"], fields["heads"], fields["head_dim"]
        cosines, sines = self._single(fields["cos"]), self._single(fields["sin"])
        turned = fields["rotary_dim"]
        if fields["style"] == "half":
            first, second = slice(0, turned // 2), slice(turned // 2, turned)
        else:
            first, second = slice(0, turned, 2), slice(1, turned, 2)

        def run(call: Call) -> None:
            x = call.buffers[source]
            here = slice(call.position, call.position + call.tokens)
            c, s = cosines[here, None], sines[here, None]
            split = x.float().view(call.tokens, heads, width)
            a, b = split[..., first], split[..., second]
            result = x.clone().view(call.tokens, heads, width)
            result[..., first] = (a * c).sub_(b * s).half()
            result[..., second] = (b * c).add_(a * s).half()
            _put(call, op, out, result.view(x.shape))

        return run

    def kv_write(self, op: BoundOp) -> Run:
        source, values, layer = op.fields["in"], op.fields["cache"] == "v", op.layer

        def run(call: Call) -> None:
            call.cache.write(layer, values, call.position, call.buffers[source])

        return run

    def qk(self, op: BoundOp) -> Run:
        fields, layer = op.fields, op.layer
        source, out, heads, width = fields["in"], fields["out"], fields["heads"], fields["head_dim"]
        scale = float(fields["scale"])

        def run(call: Call) -> None:
            keys = call.cache.read(layer, False, call.position + call.tokens, call.traffic)
            query = call.buffers[source].float().view(call.tokens, heads, width)
            scored = exact_attention.scores(query, keys, scale)
            masked = _masked(call)
            if masked is not None:
                scored.masked_fill_(masked, 0)
            _flag(call, op, scored)
            call.buffers[out] = scored if masked is None else scored.masked_fill_(masked, -torch.inf)

        return run

    def softmax(self, op: BoundOp) -> Run:
        source, out, table = op.fields["in"], op.fields["out"], self._half(op.fields["exp"])

        def run(call: Call) -> None:
            _put(call, op, out, exact_attention.softmax(call.buffers[source], _masked(call), table))

        return run

    def pv(self, op: BoundOp) -> Run:
        source, out, layer = op.fields["in"], op.fields["out"], op.layer

        def run(call: Call) -> None:
            keys = call.position + call.tokens
            values = call.cache.read(layer, True, keys, call.traffic)
            weights = call.buffers[source]
            if call.tokens == 1 or bool(values[..., call.position :].isfinite().all()):
                result = exact_attention.mixed(weights, values)
            else:  # 0 times infinity: a query must not even meet the values behind it
                ends = range(call.position + 1, keys + 1)
                alone = [
                    exact_attention.mixed(weights[:, number, None, :end], values[..., :end])
                    for number, end in enumerate(ends)
                ]
                result = torch.cat(alone)
            _put(call, op, out, result.view(call.tokens, -1))

        return run

    def act(self, op: BoundOp) -> Run:
        source, out, table = op.fields["in"], op.fields["out"], self._half(op.fields["table"])

        def run(call: Call) -> None:
            _put(call, op, out, table[call.buffers[source].view(torch.int16).int() & 0xFFFF])

        return run

    def logits(self, op: BoundOp) -> Run:
        return lambda call: None

    def argmax(self, op: BoundOp) -> Run:
        source, out = op.fields["in"], op.fields["out"]

        def run(call: Call) -> None:
            call.buffers[out] = torch.from_numpy(np.argmax(call.buffers[source].numpy(), axis=1))  # the first of equals

        return run


def _masked(call: Call) -> Any:
    """bool [tokens, keys]: keys behind the query; None for one token, which sees all there are."""
    if call.tokens == 1:
        return None
    keys = torch.arange(call.position + call.tokens)
    return keys[None, :] > keys[call.position :, None]


def _put(call: Call, op: BoundOp, out: str, result: Tensor) -> None:
    _flag(call, op, result)
    call.buffers[out] = result


def _flag(call: Call, op: BoundOp, result: Tensor) -> None:
    """Count what fp16 could not hold."""
    bits = result.numpy().view(np.int16) & _INFINITE
    if bits.max(initial=0) == _INFINITE:
        count = int(np.count_nonzero(bits == _INFINITE))
        call.overflows[op.label] = call.overflows.get(op.label, 0) + count
