"""A source some of whose linears are rounded again, onto a grid that the target can store."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.awq_format import BITS as AWQ_BITS
from edgetool.checkpoints.canonical import BITS, QuantizedLinear, absent_codes
from edgetool.checkpoints.detect import ModuleLayout
from edgetool.checkpoints.formats import Spec
from edgetool.checkpoints.gguf.blocks import BLOCK
from edgetool.checkpoints.requant import RoundingError, error_report, requantize
from edgetool.converter.fit import Refused
from edgetool.converter.source import PlainTensor, Source

Array = npt.NDArray[Any]


def spec_after(source: Source, target: str, *, group_size: int | None, sym: bool) -> Spec:
    """What linears are rounded to for `target`: what the source is, as far as the target has it.

    group_size and sym: as asked for; None and False leave the source's. Widths that no format has (a GGUF file's 5 or
    6 bits) become the next that there is.
    """
    assert source.spec is not None
    wanted = min(source.spec.bits or AWQ_BITS, max(BITS))
    bits = AWQ_BITS if target == "awq" else min(width for width in BITS if width >= wanted)
    size = BLOCK if target == "gguf" else source.spec.group_size
    return Spec(bits, group_size or size, sym or source.spec.sym or target == "gguf", desc_act=False)


class RequantizedSource:
    """`source` with the linears `modules` rounded to nearest as `spec` says; see `Source`.

    A linear is rounded each time that it is read; how far that is off is remembered in `errors`, and the CRC-32 of its
    float32 weights in `crc32`.
    """

    def __init__(self, source: Source, modules: Collection[str], spec: Spec, *, lowest_zero: int) -> None:
        self.source = source
        self.modules = frozenset(modules)
        self.format = source.format
        self.config: Mapping[str, Any] = source.config
        self.plain: Mapping[str, PlainTensor] = source.plain
        self.order: Sequence[str] = source.order
        self.disagreements = source.disagreements
        self.files: Sequence[Path] = source.files
        self.errors: dict[str, RoundingError] = {}
        self.crc32: dict[str, int] = {}
        self._new = spec
        self._lowest_zero = lowest_zero
        self._lock = threading.Lock()

    @cached_property
    def spec(self) -> Spec | None:
        """Bits and group_size of the rounded linears, with which all others have to agree."""
        left = any(not layout.g_idx_trivial for layout in self.layouts.values())
        was_sym = self.source.spec is not None and self.source.spec.sym
        return replace(self._new, sym=was_sym, desc_act=left)

    @cached_property
    def layouts(self) -> Mapping[str, ModuleLayout]:
        """Every quantised linear."""
        return {name: self._layout(name, layout) for name, layout in self.source.layouts.items()}

    @cached_property
    def inexact(self) -> Mapping[str, str]:
        """Those that are not rounded to codes here."""
        return {name: reason for name, reason in self.source.inexact.items() if name not in self.modules}

    def linear(self, module: str) -> QuantizedLinear:
        """A quantised linear, rounded if it is one of `modules`."""
        if module not in self.modules:
            return self.source.linear(module)
        new = self._new
        origin = None if module in self.source.inexact else self.source.linear(module)
        made = requantize(
            self.source.weight(module) if origin is None else origin.dequantize(),
            bits=new.bits,
            group_size=new.group_size,
            sym=new.sym,
            lowest_zero=self._lowest_zero,
            origin=origin,
            name=module,
        )
        with self._lock:
            self.errors[module], self.crc32[module] = made.error, made.crc32
        return made.linear

    def rest(self, module: str) -> QuantizedLinear:
        """For planning: a rounded linear with zeros that it may have, and without codes and scales.

        Raises Refused where the group size does not fit it.
        """
        if module not in self.modules:
            return self.source.rest(module)
        layout, new = self.layouts[module], self._new
        if layout.in_features % layout.group_size:
            raise Refused(
                f"group_size {new.group_size} does not divide its in_features {layout.in_features}",
                "--group-size 32, or -1 for one group a row",
            )
        middle = 1 << (new.bits - 1)
        shape = (layout.out_features, -(-layout.in_features // layout.group_size))
        return QuantizedLinear(
            codes=absent_codes(layout.out_features, layout.in_features),
            scales=np.broadcast_to(np.float16(1), shape),
            zeros=np.broadcast_to(np.uint8(middle if new.sym else middle - 1), shape),
            g_idx=None,
            bits=new.bits,
            group_size=layout.group_size,
        )

    def weight(self, module: str) -> Array:
        """A quantised linear's weights, float32 [out_features, in_features], after the rounding."""
        return self.linear(module).dequantize() if module in self.modules else self.source.weight(module)

    def write_side_files(self, directory: Path) -> None:
        """Those of the original."""
        self.source.write_side_files(directory)

    def report(self) -> dict[str, Any]:
        """How far the rounded linears are off, for the result document."""
        return error_report(self.errors)

    def state(self, names: Collection[str]) -> dict[str, Any]:
        """What is known of the rounded ones among `names`, as JSON values; `restore` takes it back."""
        with self._lock:
            return {n: {**asdict(self.errors[n]), "crc32": self.crc32[n]} for n in names if n in self.errors}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what another process has found, as `state` gave it."""
        for name, record in state.items():
            fields = dict(record)
            self.crc32[name] = fields.pop("crc32")
            self.errors[name] = RoundingError(**fields)

    def _layout(self, module: str, layout: ModuleLayout) -> ModuleLayout:
        if module not in self.modules:
            return layout
        new = self._new
        size = layout.in_features if new.group_size == -1 else new.group_size
        return replace(layout, bits=new.bits, group_size=size, g_idx_trivial=True)
