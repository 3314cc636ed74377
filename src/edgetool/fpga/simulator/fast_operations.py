"""Every operation of the program by itself, as `fast` computes it: float32, on any device torch has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgetool.fpga.simulator.fast_matrices import kernel_of
from edgetool.fpga.simulator.fast_tables import Function, Rotation, function_of
from edgetool.fpga.simulator.interfaces import BoundOp, Call, HalfMatrix, Int4Matrix, Resources

Run = Callable[[Call], None]


class FastOperations:
    """Makes a step of one operation; what several of them use is made once."""

    def __init__(self, resources: Resources, device: torch.device) -> None:
        self._resources = resources
        self._device = device
        self._functions: dict[str, Function] = {}
        self._rotations: dict[tuple[object, ...], Rotation] = {}
        self._opened: dict[str, Int4Matrix | HalfMatrix] = {}
        self.weights = 0
        """Of all matrices taken so far."""

    def single(self, op: BoundOp) -> Run:
        """The step of `op` alone."""
        run: Run = getattr(self, f"_{op.kind.lower()}")(op)
        return run

    def _embed(self, op: BoundOp) -> Run:
        embedding = self._resources.embedding()

        def run(call: Call) -> None:
            rows = torch.from_numpy(embedding[call.ids.cpu().numpy()].astype(np.float32))
            call.buffers[op.fields["out"]] = rows.to(self._device)

        return run

    def _rmsnorm(self, op: BoundOp) -> Run:
        fields, width = op.fields, op.fields["width"]
        gamma, beta = torch.from_numpy(self._resources.constant(fields["gamma"]).astype(np.float32)).to(self._device)
        shift = beta if bool(beta.any()) else None
        eps, out, on_cpu = float(fields["eps"]), fields["out"], self._device.type == "cpu"
        nothing = torch.zeros(1)

        def run(call: Call) -> None:
            x = call.rows(fields["in"], fields.get("rows"))
            if len(x) == 1 and x.shape[1] == width and on_cpu and shift is None:
                flat = x.view(-1)  # one token's one run: the same in half as many steps
                inverse = (float(torch.dot(flat, flat)) / width + eps) ** -0.5
                call.buffers[out] = torch.addcmul(nothing, x, gamma, value=inverse)
                return
            normed = torch.rms_norm(x.reshape(len(x), -1, width), (width,), gamma, eps)
            call.buffers[out] = (normed if shift is None else normed + shift).view(x.shape)

        return run

    def _perm(self, op: BoundOp) -> Run:
        index = torch.from_numpy(self._resources.constant(op.fields["index"]).astype(np.int64)).to(self._device)

        def run(call: Call) -> None:
            call.buffers[op.fields["out"]] = call.buffers[op.fields["in"]].index_select(1, index)

        return run

    def _mvm(self, op: BoundOp) -> Run:
        fields = op.fields
        matrix = self._take(fields["weight"])
        kernel = kernel_of(matrix, self._device, refined=op.part == "epilogue")
        bias, role, read = self._bias(op, matrix.n), matrix.role, matrix.read_bytes_per_pc
        del matrix  # its codes are not needed any more

        def run(call: Call) -> None:
            y = kernel(call.rows(fields["in"], fields.get("rows")))
            call.traffic.read(role, read)
            if bias is not None:
                y = y + bias
            if "residual" in fields:
                y = y + call.rows(fields["residual"], fields.get("rows"))
            if "mul" in fields:
                y = y * call.rows(fields["mul"], fields.get("rows"))
            call.buffers[fields["out"]] = y if y.dtype == torch.float32 else y.float()

        return run

    def _rope(self, op: BoundOp) -> Run:
        rotation, fields = self._rotation(op), op.fields

        def run(call: Call) -> None:
            x = call.buffers[fields["in"]].reshape(call.tokens, fields["heads"], fields["head_dim"]).clone()
            call.buffers[fields["out"]] = rotation.turn(x, call.position).view(call.tokens, -1)

        return run

    def _kv_write(self, op: BoundOp) -> Run:
        source, values = op.fields["in"], op.fields["cache"] == "v"

        def run(call: Call) -> None:
            call.cache.write(op.layer, values, call.position, call.buffers[source])

        return run

    def _qk(self, op: BoundOp) -> Run:
        fields = op.fields
        heads, kv_heads, head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]

        def run(call: Call) -> None:
            upto = call.position + call.tokens
            keys = call.cache.read(op.layer, False, upto, call.traffic)
            queries = call.buffers[fields["in"]].view(call.tokens, heads, head_dim).transpose(0, 1)
            grouped = queries.reshape(kv_heads, -1, call.tokens, head_dim)
            scores = torch.matmul(grouped, keys[:, None]).flatten(0, 1) * fields["scale"]
            scores.masked_fill_(~visible(call.tokens, call.position, scores.device), -torch.inf)
            call.buffers[fields["out"]] = scores

        return run

    def _softmax(self, op: BoundOp) -> Run:
        exponential, fields = self._function(op.fields["exp"], "exp"), op.fields

        def run(call: Call) -> None:
            scores = call.buffers[fields["in"]]
            e = exponential(scores - scores.amax(2, keepdim=True))
            call.buffers[fields["out"]] = e / e.sum(2, keepdim=True)

        return run

    def _pv(self, op: BoundOp) -> Run:
        fields = op.fields

        def run(call: Call) -> None:
            values = call.cache.read(op.layer, True, call.position + call.tokens, call.traffic)
            weights = call.buffers[fields["in"]]
            weights = weights.reshape(fields["kv_heads"], -1, *weights.shape[1:])
            mixed = torch.matmul(weights, values.transpose(1, 2)[:, None]).flatten(0, 1)
            call.buffers[fields["out"]] = mixed.transpose(0, 1).reshape(call.tokens, -1)

        return run

    def _act(self, op: BoundOp) -> Run:
        function, fields = self._function(op.fields["table"], "silu"), op.fields

        def run(call: Call) -> None:
            call.buffers[fields["out"]] = function(call.buffers[fields["in"]])

        return run

    def _logits(self, op: BoundOp) -> Run:
        def run(call: Call) -> None:
            logits = call.buffers[op.fields["in"]]
            if not math.isfinite(float(logits.sum())):
                wrong = int(logits.isfinite().logical_not_().sum())
                call.overflows[op.label] = call.overflows.get(op.label, 0) + wrong

        return run

    def _argmax(self, op: BoundOp) -> Run:
        def run(call: Call) -> None:
            call.buffers[op.fields["out"]] = call.buffers[op.fields["in"]].argmax(1, keepdim=True)

        return run

    def _look(self, name: str) -> Int4Matrix | HalfMatrix:
        """A matrix that may be taken later; it is read once."""
        if name not in self._opened:
            self._opened[name] = self._resources.matrix(name)
        return self._opened[name]

    def _take(self, name: str) -> Int4Matrix | HalfMatrix:
        """A matrix that a step now has in a form of its own."""
        matrix = self._look(name)
        self.weights += matrix.n * matrix.k
        del self._opened[name]
        return matrix

    def _bias(self, op: BoundOp, n: int) -> Tensor | None:
        bias = torch.from_numpy(self._resources.bias(op.fields["bias"]).astype(np.float32)[:n]).to(self._device)
        return bias if bool(bias.any()) else None

    def _function(self, table: str, what: Literal["silu", "exp"]) -> Function:
        if table not in self._functions:
            exact: Function = F.silu if what == "silu" else torch.exp
            self._functions[table] = function_of(self._resources.constant(table), exact, self._device)
        return self._functions[table]

    def _rotation(self, op: BoundOp) -> Rotation:
        cos, sin, style = (op.fields[name] for name in ("cos", "sin", "style"))
        key = (cos, sin, style, op.fields["head_dim"], op.fields["rotary_dim"])
        if key not in self._rotations:
            cosines, sines = (self._resources.constant(name).astype(np.float32) for name in (cos, sin))
            self._rotations[key] = Rotation(cosines, sines, op.fields["head_dim"], style, self._device)
        return self._rotations[key]


def visible(tokens: int, position: int, device: torch.device) -> Tensor:
    """bool [tokens, position + tokens]: the keys that each token may see."""
    keys = torch.arange(position + tokens, device=device)
    return keys[None] <= torch.arange(position, position + tokens, device=device)[:, None]
