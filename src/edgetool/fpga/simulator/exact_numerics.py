"""The numerics `et1`: what docs/image-format.md says, operation by operation, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgetool.fpga.simulator import exact_attention
from edgetool.fpga.simulator.exact_half import ExactHalf
from edgetool.fpga.simulator.exact_int4 import ExactInt4
from edgetool.fpga.simulator.exact_sums import tree_sum
from edgetool.fpga.simulator.interfaces import BoundOp, Call, Int4Matrix, MatrixKernel, NumericsName, Resources, Step
from edgetool.fpga.simulator.kv_cache import KvCache, KvGeometry

Array = npt.NDArray[Any]
Run = Callable[[Call], None]

_INFINITE = 0x7C00
_LITTLE_WORK = 1 << 30
"""Weights x tokens of a call: 8 tokens of a model of 135 million weights, but every token of one of 7 billion."""


class ExactNumerics:
    """Numerics `et1` on the CPU. Buffers are float16, and every operation of the program is one step."""

    name: NumericsName = "et1"
    logits_dtype = torch.float16

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._weights = 0

    def new_cache(self) -> KvCache:
        return KvCache(self._geometry)

    def compile(self, ops: Sequence[BoundOp], resources: Resources, traced: bool) -> list[Step]:
        """One step for each operation; constants that several share are read once."""
        builder = _Builder(resources)
        steps = [Step(op, getattr(builder, op.kind.lower())(op)) for op in ops]
        self._weights += builder.weights
        return steps

    def threads(self, tokens: int, available: int) -> int:
        """One for little work: its operations take microseconds, and meeting at the end of each takes as long."""
        return available if tokens * self._weights > _LITTLE_WORK else 1


class _Builder:
    """Makes a function of each operation, with its constants at hand."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._kept: dict[str, Array] = {}
        self.weights = 0

    def _constant(self, name: str, dtype: Any = np.float32) -> Array:
        key = f"{name} {np.dtype(dtype)}"
        if key not in self._kept:
            self._kept[key] = self._resources.constant(name).astype(dtype)
        return self._kept[key]

    def embed(self, op: BoundOp) -> Run:
        table, out = self._resources.embedding(), op.fields["out"]

        def run(call: Call) -> None:
            _put(call, op, out, table[call.ids.numpy()].astype(np.float16))

        return run

    def rmsnorm(self, op: BoundOp) -> Run:
        source, out, width, rows = op.fields["in"], op.fields["out"], op.fields["width"], op.fields.get("rows")
        gamma, beta = self._constant(op.fields["gamma"])
        eps, count = np.float32(op.fields["eps"]), np.float32(width)

        def run(call: Call) -> None:
            x = call.rows(source, rows).numpy()
            runs = x.astype(np.float32).reshape(len(x), -1, width)
            mean = tree_sum(runs * runs) / count
            runs /= np.sqrt(mean + eps)[..., None]  # torch's sqrt is off by one bit now and then
            runs *= gamma
            runs += beta
            _put(call, op, out, runs.astype(np.float16).reshape(x.shape))

        return run

    def perm(self, op: BoundOp) -> Run:
        source, out = op.fields["in"], op.fields["out"]
        index = self._resources.constant(op.fields["index"]).astype(np.int64)

        def run(call: Call) -> None:
            _put(call, op, out, np.take(call.buffers[source].numpy(), index, axis=1))

        return run

    def mvm(self, op: BoundOp) -> Run:
        fields = op.fields
        source, out, rows = fields["in"], fields["out"], fields.get("rows")
        residual, factor = fields.get("residual"), fields.get("mul")
        matrix = self._resources.matrix(fields["weight"])
        role, read = matrix.role, matrix.read_bytes_per_pc
        self.weights += matrix.n * matrix.k
        bias = self._resources.bias(fields["bias"])[: matrix.n].astype(np.float32)
        kernel: MatrixKernel = ExactInt4(matrix) if isinstance(matrix, Int4Matrix) else ExactHalf(matrix)
        del matrix

        def run(call: Call) -> None:
            y = kernel(call.rows(source, rows)).numpy()
            y += bias
            if residual:
                y += call.rows(residual, rows).numpy()
            if factor:
                y *= call.rows(factor, rows).numpy()
            call.traffic.read(role, read)
            _put(call, op, out, y.astype(np.float16))

        return run

    def rope(self, op: BoundOp) -> Run:
        fields = op.fields
        source, out, heads, width = fields["in"], fields["out"], fields["heads"], fields["head_dim"]
        cosines, sines = self._constant(fields["cos"]), self._constant(fields["sin"])
        turned = fields["rotary_dim"]
        if fields["style"] == "half":
            first, second = slice(0, turned // 2), slice(turned // 2, turned)
        else:
            first, second = slice(0, turned, 2), slice(1, turned, 2)

        def run(call: Call) -> None:
            x = call.buffers[source].numpy()
            here = slice(call.position, call.position + call.tokens)
            c, s = cosines[here, None], sines[here, None]
            wide = x.astype(np.float32).reshape(call.tokens, heads, width)
            a, b = wide[..., first], wide[..., second]
            result = x.reshape(wide.shape).copy()
            result[..., first] = a * c - b * s
            result[..., second] = b * c + a * s
            _put(call, op, out, result.reshape(x.shape))

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
            _flag(call, op, scored.numpy())
            call.buffers[out] = scored if masked is None else scored.masked_fill_(masked, -torch.inf)

        return run

    def softmax(self, op: BoundOp) -> Run:
        source, out, table = op.fields["in"], op.fields["out"], torch.from_numpy(self._constant(op.fields["exp"]))

        def run(call: Call) -> None:
            _put(call, op, out, exact_attention.softmax(call.buffers[source], _masked(call), table).numpy())

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
            _put(call, op, out, result.reshape(call.tokens, -1).numpy())

        return run

    def act(self, op: BoundOp) -> Run:
        source, out, table = op.fields["in"], op.fields["out"], self._constant(op.fields["table"], np.float16)

        def run(call: Call) -> None:
            _put(call, op, out, table[call.buffers[source].numpy().view(np.uint16)])

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


def _put(call: Call, op: BoundOp, out: str, result: Array) -> None:
    _flag(call, op, result)
    call.buffers[out] = torch.from_numpy(result)


def _flag(call: Call, op: BoundOp, result: Array) -> None:
    """Count what fp16 could not hold."""
    bits = result.view(np.uint16) & _INFINITE
    if bits.max(initial=0) == _INFINITE:
        count = int(np.count_nonzero(bits == _INFINITE))
        call.overflows[op.label] = call.overflows.get(op.label, 0) + count
