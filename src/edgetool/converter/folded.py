"""A source without activation order: the original with rows, columns and groups where a fold plan puts them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.detect import ModuleLayout
from edgetool.checkpoints.formats import Spec
from edgetool.converter.compare import UNCHANGED, Order
from edgetool.converter.fold import FoldPlan
from edgetool.converter.source import PlainTensor, Source

Array = npt.NDArray[Any]


class FoldedSource:
    """`source` as `plan` folds it; see `Source`. Everything is moved when it is read."""

    def __init__(self, source: Source, plan: FoldPlan) -> None:
        self.source = source
        self.plan = plan
        self.format = source.format
        self.config: Mapping[str, Any] = source.config
        self.inexact: Mapping[str, str] = source.inexact
        self.order: Sequence[str] = source.order
        self.disagreements = source.disagreements
        self.files: Sequence[Path] = source.files

    @cached_property
    def layouts(self) -> Mapping[str, ModuleLayout]:
        """Every quantised linear."""
        folded = {module: replace(self.source.layouts[module], g_idx_trivial=True) for module in self.plan.folded}
        return {**self.source.layouts, **folded}

    @cached_property
    def spec(self) -> Spec | None:
        """What holds for most quantised linears; desc_act only if some could not be folded."""
        left = any(not layout.g_idx_trivial for layout in self.layouts.values())
        return None if self.source.spec is None else replace(self.source.spec, desc_act=left)

    @cached_property
    def plain(self) -> Mapping[str, PlainTensor]:
        """Every tensor that belongs to no quantised linear."""
        order = self.plan.order
        return {name: _moved(t, order[name]) if name in order else t for name, t in self.source.plain.items()}

    def linear(self, module: str) -> QuantizedLinear:
        """A quantised linear; only where it could not be folded with a g_idx that is not trivial."""
        return self._in_order(module, self.source.linear(module))

    def rest(self, module: str) -> QuantizedLinear:
        """The same for planning; codes may be absent."""
        return self._in_order(module, self.source.rest(module))

    def _in_order(self, module: str, linear: QuantizedLinear) -> QuantizedLinear:
        order = self.plan.order.get(module, UNCHANGED)
        if order.rows is not None:
            scales, zeros = (a.take(order.rows, axis=0) for a in (linear.scales, linear.zeros))
            linear = replace(linear, codes=_taken(linear.codes, order.rows, 0), scales=scales, zeros=zeros)
        if module not in self.plan.folded:
            return linear
        codes, groups = linear.codes, linear.group_index()
        if order.columns is not None:
            codes, groups = _taken(codes, order.columns, 1), groups[order.columns]
        # Every group is a run of neighbours now; they are numbered in their order.
        present = groups[:: linear.group_size]
        scales, zeros = (a.take(present, axis=1) for a in (linear.scales, linear.zeros))
        return replace(linear, codes=codes, scales=scales, zeros=zeros, g_idx=None)

    def weight(self, module: str) -> Array:
        """A quantised linear's weights, float32 [out_features, in_features]."""
        if module in self.plan.order or module in self.plan.folded:
            return self.linear(module).dequantize()
        return self.source.weight(module)

    def write_side_files(self, directory: Path) -> None:
        """Those of the original."""
        self.source.write_side_files(directory)


def _taken(codes: Array, places: Array, axis: int) -> Array:
    """Rows or columns of `codes`; absent ones stay absent."""
    return codes.take(places, axis=axis) if any(codes.strides) else codes


def _moved(tensor: PlainTensor, order: Order) -> PlainTensor:
    return PlainTensor(tensor.name, tensor.dtype, tensor.shape, partial(_pieces, tensor, order))


def _pieces(tensor: PlainTensor, order: Order) -> Iterator[Array]:
    """The tensor in `order`: whole where rows move, else some rows at a time."""
    width = math.prod(tensor.shape[1:])
    if order.rows is not None:
        whole = np.concatenate(list(tensor.chunks())).reshape(-1, width)[order.rows]
        yield (whole if order.columns is None else whole[:, order.columns]).reshape(-1)
        return
    rest = None
    for chunk in tensor.chunks():
        flat = chunk if rest is None or not rest.size else np.concatenate([rest, chunk])
        end = flat.size // width * width
        yield flat[:end].reshape(-1, width)[:, order.columns].reshape(-1)
        rest = flat[end:]
