"""What a conversion will write, and everything that stands against it, known before the first byte is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.legality import VLLM_VERSION, kernels
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, Entry
from edgetool.converter.fit import Refused, fit, needs_codes
from edgetool.converter.floats import DTYPE_OF, delivered_dtype, misfit
from edgetool.converter.folded import FoldedSource
from edgetool.converter.requantized import RequantizedSource
from edgetool.converter.source import Source
from edgetool.errors import BadInput
from edgetool.progress import Progress

if TYPE_CHECKING:
    from edgetool.converter.gguf_target import GgufPlan

_THREADS = 4  # each may hold the codes of one linear, and reading scales is a matter of the disk
_CHUNK_BYTES = 1 << 24  # what a plain tensor has in memory while it is copied


@dataclass(frozen=True)
class Unit:
    """One step of the writing: a quantised linear with all its tensors, or one other tensor.

    entries: what it becomes. work_bytes: the memory that its conversion takes at most, about.
    """

    name: str
    entries: tuple[Entry, ...]
    work_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(entry_bytes(entry) for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """target: a name of FORMATS, fp16, bf16 or gguf. spec: what the output is quantised to, None where it is not.

    units: in the order of the source's files. warnings: sentences for whoever uses the result. gguf: what a GGUF
    file will hold, in place of units.
    """

    target: str
    spec: Spec | None
    units: tuple[Unit, ...]
    warnings: tuple[str, ...]
    gguf: GgufPlan | None = None

    @property
    def output_bytes(self) -> int:
        """Data of all weight files."""
        return self.gguf.output_bytes if self.gguf else sum(unit.nbytes for unit in self.units)

    @property
    def tensors(self) -> int:
        """Number of tensors in all weight files."""
        return len(self.gguf.entries) if self.gguf else sum(len(unit.entries) for unit in self.units)


@dataclass(frozen=True)
class _Fitted:
    """What planning keeps of a fitted linear."""

    entries: tuple[Entry, ...]
    sym: bool
    desc_act: bool
    was_sym: bool


def entry_bytes(entry: Entry) -> int:
    """Size of a tensor's data."""
    _, dtype, shape = entry
    return math.prod(shape) * int(NUMPY_DTYPES[dtype].itemsize)


def target_spec(source: Source, *, sym: bool) -> Spec:
    """What a quantised output keeps of the source: its bits and group_size; `sym` asks for a symmetric one."""
    assert source.spec is not None
    return replace(source.spec, sym=sym)


def make_plan(
    source: Source, target: str, *, sym: bool = False, rounding: bool = False, threads: int = 1, progress: Progress
) -> Plan:
    """Decide what `source` becomes as `target`; reads scales, zeros and groups, and codes where they have to move.

    rounding: other tensors may be rounded to the target's dtype (fp16, bf16).
    Raises NoLosslessForm, a BadInput naming the first tensor that has none, with all of them in its details.
    """
    if target == "gguf":
        return _gguf_plan(source, threads, progress)
    if target in FORMATS and source.spec is None:
        raise BadInput(
            f"nothing in this {source.format} model is quantised, so it has no {target} form without loss",
            f"quantise it: edgetool quantize MODEL -o DIR{_as_format(target)}",
        )
    refused: dict[str, Refused] = {}
    fitted: dict[str, _Fitted] = {}
    rounded: dict[str, int] = {}

    def settle(name: str) -> Unit | None:
        try:
            if name in source.layouts:
                fitted[name] = _fit_module(source, name, target, sym)
                return Unit(name, fitted[name].entries, _work_bytes(source, name, target))
            unit, rounded[name] = _plain_unit(source, name, target, rounding)
            return unit
        except Refused as refusal:
            refused[name] = refusal
            return None

    with (
        progress.task("plan", len(source.order), "tensor") as task,
        ThreadPoolExecutor(max(1, min(threads, _THREADS))) as pool,
    ):
        units: list[Unit | None] = []
        for unit in pool.map(settle, source.order):
            units.append(unit)
            task.advance()
    if refused:
        raise refusal_of(source, target, {name: refused[name] for name in source.order if name in refused})
    whole = [unit for unit in units if unit is not None]
    spec = None
    if target not in DTYPE_OF:
        spec = _output_spec(source, target, sym, fitted.values())
        if spec.sym and target == "compressed-tensors":
            whole = [_without_zeros(unit) for unit in whole]
    _refuse_twins(whole)
    asymmetric = [name for name in source.order if name in fitted and not fitted[name].was_sym]
    warnings = [*_warnings(source, target, spec)]
    if asymmetric and source.spec is not None and source.spec.sym:
        # what a checkpoint says of itself was found out from some of its linears only
        warnings.append(
            f"{asymmetric[0]} ({len(asymmetric)} of {len(fitted)} linears) has zeros besides the middle one: readers"
            f" that take the source for symmetric get wrong weights"
        )
    if changed := [name for name in source.plain if rounded.get(name)]:
        values = sum(rounded[name] for name in changed)
        warnings.append(f"{values} values of {len(changed)} tensors ({changed[0]} ...) are rounded to {target}")
    return Plan(target, spec, tuple(whole), tuple(warnings))


class NoLosslessForm(BadInput):
    """Some tensors have no lossless form in the target; `modules` are the quantised linears among them."""

    def __init__(self, message: str, hint: str | None, details: Mapping[str, Any], modules: Sequence[str]) -> None:
        super().__init__(message, hint, details)
        self.modules = tuple(modules)


def refusal_of(source: Source, target: str, refused: Mapping[str, Refused]) -> NoLosslessForm:
    """The error that names the first of `refused` (tensor or module -> why) and how many there are."""
    first, reason = next(iter(refused.items()))
    others = f" ({len(refused)} of {len(source.order)} tensors are refused)" if len(refused) > 1 else ""
    hints = list(dict.fromkeys(r.hint for r in refused.values() if r.hint))
    return NoLosslessForm(
        f"{first} has no lossless form in {target}: {reason.reason}{others}",
        hints[0] if hints else None,
        {
            "source_format": source.format,
            "format": target,
            "tensors_compared": 0,
            "tensors_equal": 0,
            "refused": [{"module": name, "reason": r.reason} for name, r in refused.items()],
        },
        [name for name in refused if name in source.layouts],
    )


def _gguf_plan(source: Source, threads: int, progress: Progress) -> Plan:
    """Every quantised linear gets the smallest GGUF type that holds it exactly."""
    from edgetool.converter.gguf_target import plan_gguf

    plan = plan_gguf(source, threads=threads, progress=progress)
    if plan.refused:
        raise refusal_of(
            source, "gguf", {name: Refused(reason, _gguf_hint(source, name)) for name, reason in plan.refused.items()}
        )
    spec = None
    if source.spec is not None:
        modules = {kind for name, kind, _ in plan.entries if plan.names[name] in source.layouts}
        spec = Spec(source.spec.bits, 32, sym=modules <= {"Q4_0", "Q8_0"})
    warnings = (*_warnings(source, "gguf", None), *plan.warnings)
    return Plan("gguf", spec, (), warnings, plan)


def _gguf_hint(source: Source, name: str) -> str | None:
    if name in source.layouts and not source.layouts[name].g_idx_trivial:
        return "--fold-act-order removes the activation order where that is exact"
    return "--to fp16 keeps all values" if name in source.layouts else None


def _fit_module(source: Source, module: str, target: str, sym: bool) -> _Fitted:
    layout = source.layouts[module]
    if target in DTYPE_OF:
        size = (layout.out_features, layout.in_features)
        return _Fitted(((f"{module}.weight", DTYPE_OF[target], size),), False, False, True)
    if module in source.inexact:
        raise Refused(source.inexact[module], "--to fp16, or --requant to round again")
    spec = target_spec(source, sym=sym)
    linear = source.rest(module)
    if needs_codes(linear, target, spec):
        linear = source.linear(module)
    was_sym = linear.sym
    linear = fit(linear, target, spec)
    own = replace(spec, desc_act=linear.g_idx is not None)
    entries: list[Entry] = []
    for suffix, (dtype, shape) in FORMATS[target].layout(linear.out_features, linear.in_features, own).items():
        is_scale = suffix in ("scales", "weight_scale")
        entries.append((f"{module}.{suffix}", linear.scale_dtype if is_scale else dtype, shape))
    return _Fitted(tuple(entries), linear.sym, linear.g_idx is not None, was_sym)


def _plain_unit(source: Source, name: str, target: str, rounding: bool) -> tuple[Unit, int]:
    """The unit, and how many of its values are rounded."""
    tensor = source.plain[name]
    dtype, count = tensor.dtype, 0
    if target in DTYPE_OF:
        dtype = delivered_dtype(tensor, DTYPE_OF[target])
        if dtype != tensor.dtype:
            lost = misfit(tensor, dtype)
            if lost.overflowing:
                raise Refused(
                    f"{lost.overflowing} of {lost.values} values are beyond the range of {target}",
                    "--to bf16" if target == "fp16" else None,
                )
            if lost.rounded and not rounding:
                raise Refused(
                    f"{lost.rounded} of its {lost.values} {tensor.dtype} values do not exist in {target}",
                    f"--to {'bf16' if target == 'fp16' else 'fp16'}, or --requant to round them",
                )
            count = lost.rounded
    return Unit(name, ((name, dtype, tensor.shape),), 4 * min(_CHUNK_BYTES, math.prod(tensor.shape) * 8)), count


def _work_bytes(source: Source, module: str, target: str) -> int:
    layout = source.layouts[module]
    weights = layout.out_features * layout.in_features
    if module in source.inexact or (isinstance(source, RequantizedSource) and module in source.modules):
        return weights * 8  # as float32, and again while it is narrowed or packed
    # packed on both sides, a byte a code between them and as much again while they are packed
    return weights * (16 + 2 * layout.bits) // 8


def _output_spec(source: Source, target: str, sym: bool, fitted: Any) -> Spec:
    assert source.spec is not None
    every = list(fitted)
    by_value = all(linear.sym for linear in every)
    # A copy keeps the zeros that are there; any other output is symmetric where all of them are the middle.
    kept = source.format == target == "compressed-tensors" and not source.spec.sym
    desc_act = any(linear.desc_act for linear in every)
    return replace(source.spec, sym=sym or (by_value and not kept), desc_act=desc_act)


def _without_zeros(unit: Unit) -> Unit:
    kept = tuple(entry for entry in unit.entries if not entry[0].endswith(".weight_zero_point"))
    return replace(unit, entries=kept)


def _refuse_twins(units: Sequence[Unit]) -> None:
    counts = Counter(entry[0] for unit in units for entry in unit.entries)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise BadInput(
            f"{twice[0]} would be written twice: the source holds a tensor of that name beside the quantised one",
            "remove it from the source",
        )


def _warnings(source: Source, target: str, spec: Spec | None) -> Iterator[str]:
    if source.format == target and not isinstance(source, FoldedSource | RequantizedSource):
        yield f"source and output are both {target}: the output is a copy with the same weights"
    if spec is not None and target in FORMATS:
        verdicts = [v for v in kernels(target, spec.bits, spec.group_size, spec.sym, spec.desc_act) if "vLLM" in v.name]
        reason = FORMATS[target].check(spec)
        if reason is not None:
            yield reason
        elif not any(verdict.ok for verdict in verdicts):
            yield f"no kernel of vLLM {VLLM_VERSION} runs the output: {verdicts[0].why}"
    claim = source.config.get("quantization_config")
    groups = claim.get("config_groups") if isinstance(claim, dict) else None
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and (group.get("input_activations") or group.get("output_activations")):
            yield "the source's config.json quantises activations too; the output quantises weights only"
            break


def _as_format(target: str) -> str:
    known = {"gptq": "", "awq": " --format awq", "compressed-tensors": " --format compressed-tensors"}
    return known.get(target, "")
