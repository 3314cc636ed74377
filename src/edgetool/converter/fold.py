"""Groups in activation order (desc_act, a g_idx that is not trivial) removed where that is exact.

Channels between two linears have no order of their own: the reader's columns can be sorted by group if the rows that
make them are sorted the same way.

- down_proj: its columns are the rows of gate_proj and up_proj, which meet value by value. Always exact.
- o_proj: its columns are the rows of v_proj, head by head, and several query heads may share a value head. Exact only
  where the order stays inside every head and is the same for all heads that share one.
- What reads the residual stream (q, k, v, gate and up projections, lm_head): exact only where all of them in all
  layers want one and the same order; then embedding, norms and what writes to the stream follow it.

Only rows, columns and whole groups move: no weight changes, just the order in which products are added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.converter.compare import Order
from edgetool.converter.source import Source

Array = npt.NDArray[Any]

_LAYER = re.compile(r"(?P<decoder>.*)layers\.\d+\.(?P<part>.+)")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_WITHIN_HEADS = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.rotary_emb")  # of queries and keys, not of values
_HEADS = ("lm_head", "language_model.lm_head")


class _NotExact(Exception):
    """Why a module keeps its g_idx."""


@dataclass(frozen=True)
class FoldPlan:
    """folded: modules that lose their g_idx. not_folded: module -> why it keeps it.

    order: module or plain tensor -> where its rows and columns come from; only those that change.
    """

    folded: tuple[str, ...]
    not_folded: Mapping[str, str]
    order: Mapping[str, Order]


def plan_fold(source: Source) -> FoldPlan:
    """What can be folded in `source`. Reads the g_idx of every module that has one which is not trivial."""
    planner = _Planner(source)
    planner.fold_residual()
    for module, perm in planner.wanted.items():
        try:
            if module in planner.not_folded or planner.reads_residual(module):
                continue
            if planner.part(module) == "mlp.down_proj":
                planner.fold_down(module, perm)
            elif planner.part(module) == "self_attn.o_proj":
                planner.fold_output(module, perm)
            else:
                raise _NotExact("edgetool does not know what makes its input channels")
        except _NotExact as reason:
            planner.not_folded[module] = str(reason)
    scattered = [module for module, layout in source.layouts.items() if not layout.g_idx_trivial]
    rows, columns = planner.rows, planner.columns
    return FoldPlan(
        folded=tuple(module for module in scattered if module not in planner.not_folded),
        not_folded={module: planner.not_folded[module] for module in scattered if module in planner.not_folded},
        order={name: Order(rows.get(name), columns.get(name)) for name in source.order if name in rows | columns},
    )


def sorted_by_group(g_idx: Array) -> Array:
    """int64 [in_features]: the channels group by group, groups by their first channel, in a group as they were."""
    _, first, group = np.unique(g_idx, return_index=True, return_inverse=True)
    return np.argsort(first[group], kind="stable")


class _Planner:
    """What was found so far. Entry i of a permutation is the old place of what comes to place i."""

    def __init__(self, source: Source) -> None:
        self.layouts, self.plain = source.layouts, source.plain
        self.names = (*source.layouts, *source.plain)
        ends = "embed_tokens.weight"
        self.decoder = next((name.removesuffix(ends) for name in source.plain if name.endswith(ends)), None)
        inner = source.config.get("text_config")
        self.config = {**source.config, **(inner if isinstance(inner, Mapping) else {})}
        self.rows: dict[str, Array] = {}
        self.columns: dict[str, Array] = {}
        self.not_folded: dict[str, str] = {}
        self.wanted: dict[str, Array] = {}  # linears whose columns have to move, and how
        for module, layout in source.layouts.items():
            if layout.g_idx_trivial:
                continue
            g_idx = source.rest(module).group_index()
            members = np.bincount(g_idx, minlength=-(-layout.in_features // layout.group_size))
            if np.any(members != layout.group_size):
                spread = f"{members.min()} to {members.max()}"
                self.not_folded[module] = f"its groups have {spread} channels; all must have {layout.group_size}"
            perm = sorted_by_group(g_idx)
            if np.any(perm != np.arange(len(perm))):  # else its groups just have other numbers
                self.wanted[module] = perm

    def part(self, module: str) -> str:
        """The module's name inside a layer of the decoder, or nothing."""
        match = _LAYER.fullmatch(module)
        return match["part"] if match is not None and match["decoder"] == self.decoder else ""

    def reads_residual(self, module: str) -> bool:
        return self.part(module) in _READERS or module in _HEADS

    def fold_down(self, down: str, perm: Array) -> None:
        """Sort the columns of `down`, and with them the rows of gate_proj and up_proj."""
        block = down.removesuffix("down_proj")
        self.refuse_unknown(block, _MLP)
        makers = [block + name for name in ("gate_proj", "up_proj")]
        for maker in makers:
            if self.shape(maker)[:1] != (len(perm),):
                raise _NotExact(f"there is no {maker} with {len(perm)} rows")
        self.columns[down] = perm
        for maker in makers:
            self.sort_rows(maker, perm)

    def fold_output(self, output: str, perm: Array) -> None:
        """Sort the columns of `output` (o_proj), and with them the rows of v_proj."""
        block = output.removesuffix("o_proj")
        self.refuse_unknown(block, _ATTENTION)
        heads = self.config.get("num_attention_heads")
        shared = self.config.get("num_key_value_heads") or heads
        if not isinstance(heads, int) or not isinstance(shared, int) or min(heads, shared) < 1 or heads % shared:
            raise _NotExact("config.json does not tell how many attention heads there are")
        size = len(perm) // heads
        for name, count in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
            if self.shape(block + name)[:1] != (count * size,) or heads * size != len(perm):
                raise _NotExact(f"{block + name} is not {count} heads of {size} rows")
        inside = perm.reshape(heads, size) - size * np.arange(heads)[:, None]
        if inside.min() < 0 or inside.max() >= size:
            raise _NotExact(f"its groups reach across attention heads (of {size} channels)")
        by_value_head = inside.reshape(shared, heads // shared, size)
        if np.any(by_value_head != by_value_head[:, :1]):
            raise _NotExact(f"the {heads // shared} query heads that share a value head want different orders")
        self.columns[output] = perm
        self.sort_rows(block + "v_proj", (by_value_head[:, 0] + size * np.arange(shared)[:, None]).reshape(-1))

    def fold_residual(self) -> None:
        """Sort the residual stream, if all that read it want the same order; else note why it stays."""
        wanted = {module: perm for module, perm in self.wanted.items() if self.reads_residual(module)}
        if not wanted:
            return
        first, perm = next(iter(wanted.items()))
        try:
            for module in filter(self.reads_residual, self.layouts):
                if module in self.not_folded:
                    raise _NotExact(f"the residual stream has one order; {module}: {self.not_folded[module]}")
                if module not in wanted or not np.array_equal(wanted[module], perm):
                    raise _NotExact(f"the residual stream has one order; {first} and {module} want different ones")
            self.sort_residual(perm)
        except _NotExact as reason:
            self.not_folded = {**dict.fromkeys(wanted, str(reason)), **self.not_folded}

    def sort_residual(self, perm: Array) -> None:
        """Everything that reads or writes the residual stream, or _NotExact before anything is changed."""
        rows: list[str] = []
        columns: list[str] = []
        for name in self.names:
            module = name if name in self.layouts else name.rpartition(".")[0]
            part = self.part(module)
            if self.reads_residual(module) or module == f"{self.decoder}embed_tokens":
                if not name.endswith(".bias"):
                    columns.append(name)
            elif part in _WRITERS or re.fullmatch(r"\w*norm", part) or module == f"{self.decoder}norm":
                rows.append(name)
            elif part not in _WITHIN_HEADS:
                raise _NotExact(f"{name} may use the residual stream in a way that edgetool does not know")
        for names, axis in ((rows, 0), (columns, 1)):
            for name in names:
                if self.shape(name)[axis : axis + 1] != (len(perm),):
                    raise _NotExact(f"{name} of shape {list(self.shape(name))} does not fit {len(perm)} channels")
        self.rows |= dict.fromkeys(rows, perm)
        self.columns |= dict.fromkeys(columns, perm)

    def refuse_unknown(self, block: str, linears: tuple[str, ...]) -> None:
        """Raise _NotExact where something lies in `block` that may depend on the order of channels."""
        for name in self.names:
            linear, _, suffix = name.removeprefix(block).partition(".")
            known = linear in linears and suffix in ("", "weight", "bias")
            if name.startswith(block) and not known and self.part(name.rpartition(".")[0]) not in _WITHIN_HEADS:
                raise _NotExact(f"{name} may depend on the order of its channels")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a quantised linear, of a tensor, or of a linear that is not quantised; () if there is none."""
        if name in self.layouts:
            return self.layouts[name].out_features, self.layouts[name].in_features
        tensor = self.plain.get(name) or self.plain.get(f"{name}.weight")
        return () if tensor is None else tensor.shape

    def sort_rows(self, linear: str, perm: Array) -> None:
        """The outputs of `linear`, quantised or not, and its bias."""
        self.rows |= {name: perm for name in (linear, f"{linear}.weight", f"{linear}.bias") if name in self.names}
