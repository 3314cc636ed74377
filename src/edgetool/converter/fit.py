"""One quantised linear made to fit another format without changing a single weight, or the reason why it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.scale_storage import with_scale_dtype
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

_SCALE_DTYPES = {"gptq": ("F16", "BF16"), "gptq_v2": ("F16", "BF16"), "awq": ("F16", "BF16")}
_GPTQ = ("gptq", "gptq_v2")
_BLOCK_CODES = 1 << 21

_FOLD = "--fold-act-order removes the activation order where that is exact; --to gptq keeps it"
_LESS_SYM = "leave --sym out, or add --requant to round again"
_V2 = "--to gptq_v2 stores these zeros; --sym or --requant may help too"
_WIDE = "--to compressed-tensors keeps float32 scales, --requant rounds them"


class Refused(Exception):
    """Why a linear has no lossless form in the target format; the caller adds the module's name.

    `hint` is what helps, where something does.
    """

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def fit(linear: QuantizedLinear, target: str, spec: Spec) -> QuantizedLinear:
    """`linear` as `target` (a name of FORMATS) stores it under `spec`, every weight bit-equal.

    Steps, each taken only where it is needed: scales of another dtype that has the same values; groups numbered in
    the order of their channels, where the target has no g_idx; codes and zero of a group moved by the same integer,
    where the target cannot store the zero (0 in GPTQ version 1, all but the middle in a symmetric one).
    Raises Refused with the first reason that stands against it.
    """
    if target not in _GPTQ:
        linear = _groups_in_order(linear)
    if linear.g_idx is not None and target == "awq":
        raise Refused(f"{target} has no g_idx, and the groups are in activation order (desc_act)", _FOLD)
    _check_same_grid(linear, spec)
    linear = _stored_scales(linear, target)
    if needs_codes(linear, target, spec):
        linear = _shifted(linear, target, spec)
    reason = FORMATS[target].refusal(linear, spec)
    if reason is not None:
        raise Refused(reason)
    return linear


def needs_codes(linear: QuantizedLinear, target: str, spec: Spec) -> bool:
    """Whether `fit` has to look at the codes; where not, it takes a linear with `absent_codes` as well."""
    if spec.sym:
        return not linear.sym
    return target == "gptq" and not bool(linear.zeros.all())


def _check_same_grid(linear: QuantizedLinear, spec: Spec) -> None:
    group_size = linear.in_features if spec.group_size == -1 else min(spec.group_size, linear.in_features)
    if linear.bits != spec.bits:
        raise Refused(f"it has {linear.bits} bits, most linears have {spec.bits}", "--to fp16 or bf16, or --requant")
    if linear.group_size != group_size:
        raise Refused(
            f"it has groups of {linear.group_size}, most linears have {spec.group_size}",
            "--to fp16 or bf16, or --requant",
        )


def _groups_in_order(linear: QuantizedLinear) -> QuantizedLinear:
    """Number groups of neighbouring channels in their order, so that no g_idx is left, where that is all it says."""
    if linear.g_idx is None or linear.ragged:
        return linear
    first = linear.g_idx[:: linear.group_size]
    if not np.array_equal(np.repeat(first, linear.group_size), linear.g_idx) or len(set(first.tolist())) != len(first):
        return linear
    return replace(linear, scales=linear.scales[:, first], zeros=linear.zeros[:, first], g_idx=None)


def _stored_scales(linear: QuantizedLinear, target: str) -> QuantizedLinear:
    allowed = _SCALE_DTYPES.get(target, (linear.scale_dtype,))
    reasons = []
    for dtype in (linear.scale_dtype, *allowed):
        if dtype not in allowed:
            continue
        try:
            return with_scale_dtype(linear, dtype)
        except BadInput as error:
            reasons.append(error.message)
    raise Refused(f"{target} has scales of 16 bit only: {'; '.join(reasons)}", _WIDE)


def _shifted(linear: QuantizedLinear, target: str, spec: Spec) -> QuantizedLinear:
    """Every group's codes and zero moved by the same integer, to a zero that the target stores."""
    middle, top = 1 << (linear.bits - 1), (1 << linear.bits) - 1
    wanted = np.full_like(linear.zeros, middle) if spec.sym else np.maximum(linear.zeros, 1)
    delta = wanted.astype(np.int16) - linear.zeros
    lowest, highest = _code_range(linear)
    stuck = (delta != 0) & ((lowest + delta < 0) | (highest + delta > top))
    if stuck.any():
        count, groups = int(stuck.sum()), stuck.size
        zero = f"the middle, {middle}" if spec.sym else "1"
        raise Refused(
            f"{count} of {groups} groups use codes that leave 0..{top} when their zero is moved to {zero}",
            _LESS_SYM if spec.sym else _V2,
        )
    codes = linear.codes.copy()
    g_idx = linear.group_index()
    for rows in _blocks(linear):
        # Adding modulo 256 is what adding a negative delta to an unsigned code means.
        codes[rows] += delta[rows].astype(np.uint8)[:, g_idx]
    return replace(linear, codes=codes, zeros=wanted)


def _code_range(linear: QuantizedLinear) -> tuple[Array, Array]:
    """Smallest and largest code of each group, int16 [out_features, n_groups]; a group without channels has its zero's.

    That of a zero never stands against a shift, since zeros are moved to values in range.
    """
    lowest, highest = linear.zeros.astype(np.int16), linear.zeros.astype(np.int16)
    g_idx = linear.group_index()
    order = np.argsort(g_idx, kind="stable")
    present, starts = np.unique(g_idx[order], return_index=True)
    sorted_already = linear.g_idx is None
    for rows in _blocks(linear):
        codes = linear.codes[rows] if sorted_already else linear.codes[rows][:, order]
        lowest[rows.start : rows.stop, present] = np.minimum.reduceat(codes, starts, axis=1)
        highest[rows.start : rows.stop, present] = np.maximum.reduceat(codes, starts, axis=1)
    return lowest, highest


def _blocks(linear: QuantizedLinear) -> list[slice]:
    step = max(1, _BLOCK_CODES // linear.in_features)
    return [slice(start, start + step) for start in range(0, linear.out_features, step)]
