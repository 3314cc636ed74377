"""Activation order (desc_act) taken out of the weights: columns sorted by group, and what gathers that needs.

perm = stable argsort of g_idx. A matrix whose columns are sorted by it has trivial groups and wants its input in that
order. down_proj's input order is free and exact: the rows of gate and up (and their biases) move. q, k, v and gate, up
share one gather behind the norm where their orders agree in every layer, else each operation has its own. o_proj's
input crosses heads (under grouped queries one value head feeds several), so it is gathered at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound
from edgetool.errors import BadInput
from edgetool.fpga.model import BoardModel, Linear
from edgetool.fpga.program import Gathers

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Orders:
    """By name of the image's matrices: int64 [k] orders of columns, int64 [n] orders of rows, only where not trivial.

    constants: what goes into ddr.bin by name: the gathers' indexes, and orders that only extracting needs.
    columns_from, rows_from: matrix -> the constant that has its order.
    """

    columns: Mapping[str, Array] = field(default_factory=dict)
    rows: Mapping[str, Array] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    columns_from: Mapping[str, str] = field(default_factory=dict)
    rows_from: Mapping[str, str] = field(default_factory=dict)
    gathers: Gathers = field(default_factory=Gathers)


def fold_order(model: BoardModel, checkpoint: Checkpoint, found: QuantizationFound, kept: set[str]) -> Orders:
    """The orders of all matrices named in `kept` (those whose codes stay as they are).

    Raises BadInput naming a module some group of which has not exactly group_size members.
    """
    columns: dict[str, Array] = {}
    for linear in model.linears():
        layout = found.layouts.get(linear.module)
        if linear.name in kept and layout is not None and not layout.g_idx_trivial:
            columns[linear.name] = _order(checkpoint, linear, layout.group_size)
    if not columns:
        return Orders()
    if "lm_head" in columns:
        raise BadInput(
            f"{model.lm_head.module} is in activation order (desc_act), which cannot be compiled for the output matrix",
            "quantise without --quantize-lm-head and use --lm-head rtn4",
        )
    rows: dict[str, Array] = {}
    rows_from: dict[str, str] = {}
    constants: dict[str, Array] = {}
    columns_from: dict[str, str] = {}
    for layer in model.layers:
        down = layer["down"].name
        if down in columns:
            constants[f"{down}.order"] = columns[down]
            columns_from[down] = f"{down}.order"
            for role in ("gate", "up"):
                rows[layer[role].name] = columns[down]
                rows_from[layer[role].name] = f"{down}.order"
    gathers = Gathers(
        qkv=_stage(model, columns, ("q", "k", "v")),
        o=any(layer["o"].name in columns for layer in model.layers),
        gate_up=_stage(model, columns, ("gate", "up")),
    )
    for stage, roles, kind in (
        ("qkv", ("q", "k", "v"), gathers.qkv),
        ("o", ("o",), "each" if gathers.o else "none"),
        ("gate_up", ("gate", "up"), gathers.gate_up),
    ):
        for number, layer in enumerate(model.layers):
            for role in roles if kind != "none" else ():
                linear = layer[role]
                constant = f"layers.{number}.{stage if kind == 'shared' else role}.order"
                constants[constant] = columns.get(linear.name, np.arange(linear.k))
                if linear.name in columns:
                    columns_from[linear.name] = constant
    return Orders(columns, rows, constants, columns_from, rows_from, gathers)


def _order(checkpoint: Checkpoint, linear: Linear, group_size: int) -> Array:
    name = next(n for n in (f"{linear.module}.g_idx", f"{linear.module}.weight_g_idx") if n in checkpoint.tensors)
    g_idx = checkpoint.read(name)
    members = np.bincount(g_idx)
    if not bool((members == group_size).all()):
        odd = int(np.flatnonzero(members != group_size)[0])
        raise BadInput(
            f"{name}: group {odd} has {int(members[odd])} members; groups in activation order must all have exactly"
            f" group_size {group_size}"
        )
    order: Array = np.argsort(g_idx, kind="stable")
    return order


def _stage(model: BoardModel, columns: Mapping[str, Array], roles: tuple[str, ...]) -> str:
    """none, shared (in every layer all orders of the stage agree) or each."""
    if not any(layer[role].name in columns for layer in model.layers for role in roles):
        return "none"
    for layer in model.layers:
        orders = [columns.get(layer[role].name) for role in roles]
        first = orders[0]
        for other in orders[1:]:
            if (first is None) != (other is None):
                return "each"
            if first is not None and other is not None and not np.array_equal(first, other):
                return "each"
    return "shared"
