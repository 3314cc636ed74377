"""What the result, the plan and the failure documents of a conversion say."""

from __future__ import annotations

from typing import Any

from edgetool.checkpoints.formats import Spec
from edgetool.config import ConvertConfig
from edgetool.converter.opening import Opened
from edgetool.converter.plan import Plan
from edgetool.converter.write import cut


def facts(config: ConvertConfig, opened: Opened, plan: Plan) -> dict[str, Any]:
    """What plan and result both say."""
    source, spec = opened.source, plan.spec
    found = {
        "source": config.source,
        "source_format": source.format,
        "format": plan.target,
        **spec_facts(spec),
        "quantized_modules": len(source.layouts),
        "refused": [],
        "disagreements": list(source.disagreements),
        "warnings": list(plan.warnings),
        **opened.facts,
    }
    return found if plan.gguf is None else {**found, "gguf_types": plan.gguf.types}


def spec_facts(spec: Spec | None) -> dict[str, Any]:
    """What a model is quantised to; 16 bits and nothing else where it is not."""
    return {
        "bits": spec.bits if spec else 16,
        "group_size": spec.group_size if spec else None,
        "sym": spec.sym if spec else None,
        "desc_act": spec.desc_act if spec else None,
    }


def plan_facts(config: ConvertConfig, plan: Plan) -> dict[str, Any]:
    """What only a plan says: how much will be written."""
    return {
        "tensors": plan.tensors,
        "weight_files": 1 if plan.gguf else len(cut(plan, config.max_shard_size_bytes)),
        "output_bytes": plan.output_bytes,
    }
