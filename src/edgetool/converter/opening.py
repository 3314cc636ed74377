"""From what the user named to a plan: the source, and what --fold-act-order and --requant make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetool.checkpoints.sources import ResolvedSource, resolve_configured
from edgetool.config import CommonConfig, ConvertConfig
from edgetool.converter.compare import Order
from edgetool.converter.floats import DTYPE_OF
from edgetool.converter.plan import NoLosslessForm, Plan, make_plan
from edgetool.converter.requantized import RequantizedSource, spec_after
from edgetool.converter.source import CheckpointSource, Source
from edgetool.errors import BadInput
from edgetool.progress import Progress


@dataclass(frozen=True)
class Opened:
    """A source as it is converted.

    resolved: where it was found. layouts: (bits, group_size) of the quantised linears on the disk. order: module or
    tensor -> whose channels were moved. facts: what the result document says of that. requantized: the source, where
    it is one that rounds again.
    """

    source: Source
    resolved: ResolvedSource
    layouts: Mapping[str, tuple[int, int]]
    order: Mapping[str, Order] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    requantized: RequantizedSource | None = None


def planned(config: ConvertConfig, opened: Opened, threads: int, progress: Progress) -> tuple[Opened, Plan]:
    """The plan; with --requant of the source with those linears rounded that have no lossless form."""
    assert config.to is not None
    options: dict[str, Any] = {
        "sym": config.sym,
        "rounding": config.requant,
        "threads": threads,
        "progress": progress,
    }
    source, target = opened.source, config.to
    everything = config.requant and config.group_size is not None and target not in DTYPE_OF
    if not everything:
        try:
            return opened, make_plan(source, target, **options)
        except NoLosslessForm as refusal:
            modules: Collection[str] = refusal.modules
            if not config.requant or not modules:
                _explain(refusal, opened)
                raise
    else:
        modules = source.layouts
    if source.spec is None:
        raise BadInput("nothing in this model is quantised, so there is nothing to round again")
    spec = spec_after(source, target, group_size=config.group_size, sym=config.sym)
    if (spec.bits, spec.group_size) != (source.spec.bits, source.spec.group_size):
        modules = source.layouts  # one checkpoint has one width and one group size
    rounded = RequantizedSource(source, modules, spec, lowest_zero=1 if target == "gptq" else 0)
    return replace(opened, source=rounded, requantized=rounded), make_plan(rounded, target, **options)


def _explain(refusal: NoLosslessForm, opened: Opened) -> None:
    """Say why a linear that is in the way was not folded, if folding was asked for."""
    why = {entry["module"]: entry["reason"] for entry in opened.facts.get("not_folded", ())}
    kept = [module for module in refusal.modules if module in why]
    if kept:
        refusal.details = {**refusal.details, **opened.facts}
        refusal.hint = f"{kept[0]} cannot be folded: {why[kept[0]]}; --to gptq keeps its order, --requant rounds again"


def prepared(source: Source, resolved: ResolvedSource, config: ConvertConfig) -> Opened:
    """`source` with its activation order folded away, where that was asked for."""
    layouts = {name: (layout.bits, layout.group_size) for name, layout in source.layouts.items()}
    if not config.fold_act_order:
        return Opened(source, resolved, layouts)
    from edgetool.converter.fold import plan_fold
    from edgetool.converter.folded import FoldedSource

    plan = plan_fold(source)
    facts = {
        "folded": list(plan.folded),
        "not_folded": [{"module": name, "reason": reason} for name, reason in plan.not_folded.items()],
    }
    return Opened(FoldedSource(source, plan), resolved, layouts, plan.order, facts)


def open_source(config: ConvertConfig, common: CommonConfig, progress: Progress) -> tuple[Source, ResolvedSource]:
    """The model that `config.source` names; a GGUF file is opened as it is, not imported."""
    path = Path(config.source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        from edgetool.converter.gguf_source import GgufSource

        if config.source_format not in ("auto", "gguf"):
            raise BadInput(f"{path} is a GGUF file, not {config.source_format}", "leave --from out")
        if config.revision is not None:
            raise BadInput(
                f"revision {config.revision!r} given, but {path} is no hub repository", "leave --revision out"
            )
        dtype = DTYPE_OF.get(config.to or "", "F16")
        return GgufSource.open(path, dtype), ResolvedSource(path, config.source, {"kind": "gguf", "file": path.name})
    resolved = resolve_configured(config.source, common, config.revision, progress)
    return CheckpointSource.open(resolved.path, config.source_format), resolved
