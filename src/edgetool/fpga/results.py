"""What a compilation, planned or done, tells its user and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.fpga.compiler import Draft
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.manifest import memory_of
from edgetool.fpga.writer import Emit
from edgetool.runs import memory_peak_bytes

_WORST_SHOWN = 5


def disk_bytes(draft: Draft, emit: Emit) -> int:
    """What the output takes on the disk, the tokenizer left out."""
    memory = memory_of(draft)
    weights = VCU128.pseudo_channels * int(memory["weights_bytes_per_pc"])
    image = weights + int(memory["host_bytes"]) + int(memory["ddr_constants_bytes"])
    return image * emit.image + weights * emit.tree


def plan_of(draft: Draft, emit: Emit, output: Path) -> dict[str, Any]:
    """What a dry run shows."""
    return {
        "output": str(output),
        "writes": [name for name, wanted in (("image", emit.image), ("edgellm-tree", emit.tree)) if wanted],
        "output_bytes": disk_bytes(draft, emit),
        **_facts(draft),
        "memory": memory_of(draft),
        "warnings": draft.warnings,
    }


def _facts(draft: Draft) -> dict[str, Any]:
    found, model, memory = draft.found, draft.model, memory_of(draft)
    return {
        "profile": draft.settings.profile,
        "model_type": model.model_type,
        "source_format": found.format,
        "bits": found.bits,
        "group_size": draft.matrices[0].layout.group,
        "sym": not any(matrix.layout.zeros for matrix in draft.matrices),
        "desc_act": found.desc_act,
        "lm_head": draft.lm_head,
        "int4_encoding": draft.settings.int4,
        "hbm_bytes_per_pc": memory["hbm_bytes_per_pc"],
        "kv_base": draft.hbm.kv.base,
        "max_context": draft.max_context,
        "largest_context": draft.hbm.largest_context,
        "gathers": vars(draft.orders.gathers),
        "estimate": draft.estimate,
    }


def result_of(
    record: Mapping[str, Any], output: Path, draft: Draft, *, unchanged: bool, seconds: float, resumed: int = 0
) -> dict[str, Any]:
    """The document of `edgetool.compile-vcu128/1`. record: edgetool.json of the output."""
    rounded = record["rounded"]
    again = [one for one in rounded if one["name"] != "lm_head"]
    return {
        "output": str(output),
        **_facts(draft),
        "weights_bytes_per_pc": draft.hbm.weights_bytes_per_pc,
        "kv_bytes_per_pc": draft.hbm.kv.bytes_per_pc,
        "read_bytes_by_role": memory_of(draft)["read_bytes_by_role"],
        "weight_read_bytes_per_token": draft.hbm.weight_read_bytes,
        "unchanged": unchanged,
        "resumed_matrices": resumed,
        "lm_head_error": next((one["relative"] for one in rounded if one["name"] == "lm_head"), None),
        "requantized": {"modules": len(again), "worst": again[:_WORST_SHOWN]} if again else None,
        "fp16_losses": record["losses"],
        "warnings": draft.warnings,
        "verified": record["verified"],
        "files": len(record["files"]),
        "seconds": round(seconds, 2),
        "peak_rss_bytes": memory_peak_bytes(),
    }
