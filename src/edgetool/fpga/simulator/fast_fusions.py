"""Neighbouring operations of a layer that `fast` computes as one: fewer, larger steps, and weights read in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetool.fpga.simulator.fast_matrices import PackedInt4
from edgetool.fpga.simulator.fast_operations import FastOperations, Run, visible
from edgetool.fpga.simulator.interfaces import BoundOp, Call, Int4Matrix

_SELF_ATTENTION = ["MVM", "MVM", "MVM", "ROPE", "ROPE", "KV_WRITE", "KV_WRITE", "QK", "SOFTMAX", "PV"]
_SAME_TURN = ("head_dim", "rotary_dim", "style", "cos", "sin")
_SAME_HEADS = ("heads", "kv_heads", "head_dim")

Fused = tuple[int, Run] | None


class Fusions(FastOperations):
    """Rules that look at the first operations of a list, and take some of them where they fit together.

    Buffers between fused operations are never filled, so nobody may read them afterwards; a rule asks `_unread`.
    """

    def fused(self, ops: Sequence[BoundOp]) -> tuple[int, Run]:
        """How many of the first operations (at least one) the returned step does."""
        for rule in (self._self_attention, self._gated, self._products, self._attention):
            found = rule(ops)
            if found is not None:
                return found
        return 1, self.single(ops[0])

    def _self_attention(self, ops: Sequence[BoundOp]) -> Fused:
        """From the normed input to mixed values: q, k and v are one matrix, and turned, written and read together."""
        if [op.kind for op in ops[:10]] != _SELF_ATTENTION or not _plain(ops[:3]):
            return None
        q, k, v, turn_q, turn_k, write_k, write_v, qk, _, pv = (op.fields for op in ops[:10])
        turned = turn_q["in"] == turn_q["out"] == q["out"] and turn_k["in"] == turn_k["out"] == k["out"]
        written = [(write_k["cache"], write_k["in"]), (write_v["cache"], write_v["in"])]
        used = written == [("k", k["out"]), ("v", v["out"])] and qk["in"] == q["out"]
        alike = all(turn_q[name] == turn_k[name] for name in _SAME_TURN)
        attend = self._attend(ops[7:10])
        hidden = {q["out"], k["out"], v["out"], qk["out"]} - {pv["out"]}
        if not (turned and used and alike) or attend is None or not _unread(hidden, ops[10:]):
            return None
        padded = any(self._look(op.fields["weight"]).n % 32 for op in ops[:2])  # rows of nothing in between
        stack = None if padded else self._stack(ops[:3])
        if stack is None:
            return None
        rotation, layer, head_dim = self._rotation(ops[3]), ops[0].layer, turn_q["head_dim"]
        source, out = q["in"], pv["out"]
        queries, turning = stack.parts[0].stop, stack.parts[1].stop

        def run(call: Call) -> None:
            product = stack(call, source)
            rotation.turn(product[:, :turning].view(call.tokens, -1, head_dim), call.position)
            call.cache.write_both(layer, call.position, product[:, queries : stack.parts[2].stop])
            call.buffers[out] = attend(call, product[:, :queries])

        return 10, run

    def _gated(self, ops: Sequence[BoundOp]) -> Fused:
        """gate, its ACT, and up times it: one matrix."""
        if [op.kind for op in ops[:3]] != ["MVM", "ACT", "MVM"]:
            return None
        gate, act, up = (op.fields for op in ops[:3])
        passes = gate["out"] == act["in"] == act["out"] == up.get("mul") and gate["in"] == up["in"] != gate["out"]
        extra = {"residual", "mul", "rows"} & set(gate) or {"residual", "rows"} & set(up)
        if not passes or extra or not _unread({gate["out"]} - {up["out"]}, ops[3:]):
            return None
        stack = self._stack([ops[0], ops[2]])
        if stack is None:
            return None
        function = self._function(act["table"], "silu")
        source, out = gate["in"], up["out"]
        first, second = stack.parts

        def run(call: Call) -> None:
            product = stack(call, source)
            call.buffers[out] = function(product[:, first]).mul_(product[:, second])

        return 3, run

    def _products(self, ops: Sequence[BoundOp]) -> Fused:
        """Neighbouring products of the same input: one matrix, whose result is cut."""
        count = 0
        while count < len(ops) and _plain(ops[: count + 1]) and ops[count].layer == ops[0].layer:
            count += 1
        stack = self._stack(ops[:count]) if count > 1 else None
        if stack is None:
            return None
        source, outs = ops[0].fields["in"], [op.fields["out"] for op in ops[:count]]

        def run(call: Call) -> None:
            product = stack(call, source)
            for out, part in zip(outs, stack.parts, strict=True):
                call.buffers[out] = product[:, part]

        return count, run

    def _attention(self, ops: Sequence[BoundOp]) -> Fused:
        """QK, SOFTMAX and PV: scores that nobody else sees."""
        attend = self._attend(ops[:3])
        if attend is None or not _unread({ops[0].fields["out"]} - {ops[2].fields["out"]}, ops[3:]):
            return None
        source, out = ops[0].fields["in"], ops[2].fields["out"]

        def run(call: Call) -> None:
            call.buffers[out] = attend(call, call.buffers[source])

        return 3, run

    def _attend(self, ops: Sequence[BoundOp]) -> Callable[[Call, Tensor], Tensor] | None:
        """From queries, float32 [tokens, heads x head_dim], to mixed values of the same shape."""
        if [op.kind for op in ops] != ["QK", "SOFTMAX", "PV"]:
            return None
        qk, softmax, pv = (op.fields for op in ops)
        passed = qk["out"] == softmax["in"] == softmax["out"] == pv["in"]
        exact = self._function(softmax["exp"], "exp") is torch.exp
        if not passed or not exact or any(qk[name] != pv[name] for name in _SAME_HEADS):
            return None
        layer, scale, nothing = ops[0].layer, float(qk["scale"]), torch.zeros(1, device=self._device)
        heads, kv_heads, head_dim = (qk[name] for name in _SAME_HEADS)

        def attend(call: Call, queries: Tensor) -> Tensor:
            keys, values = call.cache.read_both(layer, call.position + call.tokens, call.traffic)
            if call.tokens > 1:
                return _attend(queries.view(call.tokens, heads, head_dim), keys, values, scale, call.position)
            grouped = queries.reshape(kv_heads, heads // kv_heads, head_dim)
            scores = torch.baddbmm(nothing, grouped, keys, beta=0, alpha=scale)
            return torch.bmm(scores.softmax(2), values.transpose(1, 2)).view(1, -1)

        return attend

    def _stack(self, ops: Sequence[BoundOp]) -> _Stack | None:
        """The matrices of `ops` one above the other; None where they cannot be one."""
        matrices = [self._look(op.fields["weight"]) for op in ops]
        packable = [matrix for matrix in matrices if isinstance(matrix, Int4Matrix)]
        if len(packable) != len(matrices) or len({(matrix.k, matrix.group) for matrix in packable}) != 1:
            return None
        for op in ops:
            self._take(op.fields["weight"])
        biases = [self._bias(op, matrix.n) for op, matrix in zip(ops, packable, strict=True)]
        return _Stack(packable, biases, self._device)


class _Stack:
    """Several matrices as one. parts: which columns of the product are whose."""

    def __init__(self, matrices: Sequence[Int4Matrix], biases: Sequence[Tensor | None], device: torch.device) -> None:
        self._packed = PackedInt4(matrices, device)
        self._reads = [(matrix.role, matrix.read_bytes_per_pc) for matrix in matrices]
        self.parts = self._packed.parts
        self._bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self._bias = torch.zeros(sum(len(matrix.scales) for matrix in matrices), device=device)
            for part, bias in zip(self.parts, biases, strict=True):
                if bias is not None:
                    self._bias[part] = bias

    def __call__(self, call: Call, source: str) -> Tensor:
        """float32 [tokens, all rows] of the buffer `source`, biases included; the reading is counted."""
        product = self._packed(call.buffers[source]).float()
        for role, read in self._reads:
            call.traffic.read(role, read)
        return product if self._bias is None else product.add_(self._bias)


def _plain(ops: Sequence[BoundOp]) -> bool:
    """Whether all are products of the same input without anything added, which none of them overwrites."""
    return all(
        op.kind == "MVM"
        and not {"residual", "mul", "rows"} & set(op.fields)
        and op.fields["in"] == ops[0].fields["in"] != op.fields["out"]
        for op in ops
    )


def _unread(hidden: set[str], later: Sequence[BoundOp]) -> bool:
    """Whether buffers are written again, or never used, before anyone reads them."""
    waiting = set(hidden)
    for op in later:
        if waiting & {op.fields.get(name) for name in ("in", "residual", "mul")}:
            return False
        waiting.discard(op.fields.get("out"))
        if not waiting:
            break
    return True


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, position: int) -> Tensor:
    """float32 [tokens, heads * head_dim]. queries: [tokens, heads, head_dim]; keys, values: [kv_heads, head_dim, n]."""
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(1, 2)[None].contiguous(),
        values.transpose(1, 2)[None].contiguous(),
        attn_mask=visible(queries.shape[0], position, queries.device),
        scale=scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1).reshape(queries.shape[0], -1)
