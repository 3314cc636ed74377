"""Neighbouring operations of a layer that `fast` computes as one: fewer, larger steps, and weights read in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetool.fpga.simulator.fast_matrices import PackedInt4
from edgetool.fpga.simulator.fast_operations import FastOperations, Run, visible
from edgetool.fpga.simulator.interfaces import BoundOp, Call, Int4Matrix


class Fusions(FastOperations):
    """Rules that look at the first operations of a list, and take some of them where they fit together."""

    def fused(self, ops: Sequence[BoundOp]) -> tuple[int, Run]:
        """How many of the first operations (at least one) the returned step does."""
        for rule in (self._gated, self._products, self._ropes, self._attention):
            found = rule(ops)
            if found is not None:
                return found
        return 1, self.single(ops[0])

    def _gated(self, ops: Sequence[BoundOp]) -> tuple[int, Run] | None:
        """gate, its ACT, and up times it: one matrix."""
        if [op.kind for op in ops[:3]] != ["MVM", "ACT", "MVM"]:
            return None
        gate, act, up = ops[:3]
        passes = gate.fields["out"] == act.fields["in"] == act.fields["out"] == up.fields.get("mul")
        extra = {"residual", "mul", "rows"} & set(gate.fields) or {"residual", "rows"} & set(up.fields)
        if not passes or extra or gate.fields["in"] != up.fields["in"] or gate.fields["out"] == gate.fields["in"]:
            return None
        both = self._stack([gate, up])
        if both is None:
            return None
        packed, biases, count = both
        function = self._function(act.fields["table"], "silu")
        source, out = gate.fields["in"], up.fields["out"]
        first, second = packed.parts

        def run(call: Call) -> None:
            product = packed(call.buffers[source])
            count(call)
            left, right = product[:, first], product[:, second]
            if biases[0] is not None:
                left = left + biases[0]
            if biases[1] is not None:
                right = right + biases[1]
            call.buffers[out] = function(left).mul_(right)

        return 3, run

    def _products(self, ops: Sequence[BoundOp]) -> tuple[int, Run] | None:
        """Neighbouring products of the same input: one matrix, whose result is cut."""
        alike: list[BoundOp] = []
        for op in ops:
            plain = op.kind == "MVM" and not {"residual", "mul", "rows"} & set(op.fields)
            if not plain or op.fields["in"] != ops[0].fields["in"] or op.layer != ops[0].layer:
                break
            alike.append(op)
            if op.fields["out"] == op.fields["in"]:
                break
        stack = self._stack(alike) if len(alike) > 1 else None
        if stack is None:
            return None
        packed, biases, count = stack
        source, outs = ops[0].fields["in"], [op.fields["out"] for op in alike]

        def run(call: Call) -> None:
            product = packed(call.buffers[source])
            count(call)
            for out, part, bias in zip(outs, packed.parts, biases, strict=True):
                own = product[:, part]
                call.buffers[out] = own if bias is None else own + bias

        return len(alike), run

    def _stack(self, ops: Sequence[BoundOp]) -> tuple[PackedInt4, list[Tensor | None], Callable[[Call], None]] | None:
        """The matrices of `ops` one above the other; None where they cannot be one."""
        matrices = [self._resources.matrix(op.fields["weight"]) for op in ops]
        packable = [matrix for matrix in matrices if isinstance(matrix, Int4Matrix)]
        if len(packable) != len(matrices) or len({(matrix.k, matrix.group) for matrix in packable}) != 1:
            return None

        def count(call: Call) -> None:
            for matrix_role, read in reads:
                call.traffic.read(matrix_role, read)

        reads = [(matrix.role, matrix.read_bytes_per_pc) for matrix in packable]
        biases = [self._bias(op, matrix.n) for op, matrix in zip(ops, packable, strict=True)]
        return PackedInt4(packable, self._device), biases, count

    def _ropes(self, ops: Sequence[BoundOp]) -> tuple[int, Run] | None:
        """The turning of queries and of keys: one turning of all heads."""
        if [op.kind for op in ops[:2]] != ["ROPE", "ROPE"]:
            return None
        same = ("head_dim", "rotary_dim", "style", "cos", "sin")
        one, two = ops[0].fields, ops[1].fields
        if any(one[name] != two[name] for name in same) or one["out"] == two["in"] or one["out"] == two["out"]:
            return None
        rotation = self._rotation(ops[0])
        heads = [one["heads"], two["heads"]]
        cut = one["heads"] * one["head_dim"]

        def run(call: Call) -> None:
            both = torch.cat([call.buffers[one["in"]], call.buffers[two["in"]]], 1)
            turned = rotation(both.view(call.tokens, sum(heads), -1), call.position).view(call.tokens, -1)
            call.buffers[one["out"]], call.buffers[two["out"]] = turned[:, :cut], turned[:, cut:]

        return 2, run

    def _attention(self, ops: Sequence[BoundOp]) -> tuple[int, Run] | None:
        """QK, SOFTMAX and PV: scores that nobody else sees."""
        if [op.kind for op in ops[:3]] != ["QK", "SOFTMAX", "PV"]:
            return None
        qk, softmax, pv = (op.fields for op in ops[:3])
        passed = qk["out"] == softmax["in"] == softmax["out"] == pv["in"]
        exact = self._function(softmax["exp"], "exp") is torch.exp
        if not passed or not exact or any(qk[name] != pv[name] for name in ("heads", "kv_heads", "head_dim")):
            return None
        layer, scale = ops[0].layer, float(qk["scale"])
        heads, kv_heads, head_dim = qk["heads"], qk["kv_heads"], qk["head_dim"]

        def run(call: Call) -> None:
            upto = call.position + call.tokens
            keys = call.cache.read(layer, False, upto, call.traffic)
            values = call.cache.read(layer, True, upto, call.traffic)
            queries = call.buffers[qk["in"]]
            if call.tokens == 1:
                scores = torch.bmm(queries.reshape(kv_heads, heads // kv_heads, head_dim), keys)
                mixed = torch.bmm(scores.mul_(scale).softmax(2), values.transpose(1, 2)).view(1, -1)
            else:
                mixed = _attend(queries.view(call.tokens, heads, head_dim), keys, values, scale, call.position)
            call.buffers[pv["out"]] = mixed

        return 3, run


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, position: int) -> Tensor:
    """float32 [tokens, heads * head_dim]. queries: [tokens, heads, head_dim]; keys, values: [kv_heads, head_dim, n]."""
    mask = visible(queries.shape[0], position, queries.device)
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(1, 2)[None].contiguous(),
        values.transpose(1, 2)[None].contiguous(),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1).reshape(queries.shape[0], -1)
