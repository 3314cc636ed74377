"""What a checkpoint's configuration says about its quantisation, and where that differs from the tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgetool.checkpoints.formats import Spec


def claimed_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of config.json, at its top or (some VLMs) in its text part; None where there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("quantization_config"), Mapping):
            section: Mapping[str, Any] = part["quantization_config"]
            return section
    return None


def claimed_format(config: Mapping[str, Any]) -> str | None:
    """The format that config.json names, in edgetool's words ("gptq_v2", ...); None where it names none."""
    claim = claimed_quantization(config)
    return None if claim is None else str(_flat(claim)["format"])


def compare_claims(config: Mapping[str, Any], format_name: str, spec: Spec, widths: Collection[int]) -> list[str]:
    """One sentence for each point in which config.json differs from what the tensors are (`format_name`, `spec`).

    widths: in_features that occur, when every layer has one group: a claimed group_size equal to the only one agrees.
    """
    claim = claimed_quantization(config)
    if claim is None:
        return ["config.json has no quantization_config, the tensors are quantised"]
    claimed = _flat(claim)
    notes = []

    def differ(what: str, said: Any, is_: Any, effect: str = "") -> None:
        notes.append(f"config.json says {what} {said}, the tensors say {is_}{'; ' + effect if effect else ''}")

    if "format" in claimed and claimed["format"] != format_name:
        differ("format", claimed["format"], format_name, "readers that believe it get wrong weights")
    if "bits" in claimed and claimed["bits"] != spec.bits:
        differ("bits", claimed["bits"], spec.bits)
    if "group_size" in claimed and claimed["group_size"] != spec.group_size:
        one_group = spec.group_size == -1 and (
            set(widths) == {claimed["group_size"]} or claimed["group_size"] in (None, 0)
        )
        if not one_group:
            differ("group_size", claimed["group_size"], spec.group_size)
    if "sym" in claimed and bool(claimed["sym"]) != spec.sym:
        effect = (
            "kernels that believe it ignore the zeros" if claimed["sym"] else "kernels for symmetric codes are lost"
        )
        differ("sym", claimed["sym"], spec.sym, effect)
    if "desc_act" in claimed and bool(claimed["desc_act"]) != spec.desc_act:
        effect = "g_idx is trivial" if claimed["desc_act"] else "g_idx is not trivial"
        differ("desc_act", claimed["desc_act"], spec.desc_act, effect)
    return notes


def _flat(claim: Mapping[str, Any]) -> dict[str, Any]:
    """The claim in one vocabulary: format, bits, group_size, sym, desc_act; only what is said."""
    method = str(claim.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        groups = claim.get("config_groups")
        first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
        said = first.get("weights") if isinstance(first, Mapping) else None
        weights: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        flat: dict[str, Any] = {"format": "compressed-tensors"}
        if claim.get("format") not in (None, "pack-quantized"):
            flat["format"] = f"compressed-tensors {claim['format']}"
        flat |= {ours: weights[theirs] for ours, theirs in _WEIGHTS.items() if theirs in weights}
        if flat.get("group_size") is None and weights.get("strategy") == "channel":
            flat["group_size"] = -1
        if "actorder" in weights:
            flat["desc_act"] = weights["actorder"] in ("group", "dynamic", True)
        return flat
    flat = {key: claim[key] for key in ("bits", "group_size") if key in claim}
    if method == "awq":
        # zero_point may be true for symmetric codes too: the tensor is there, full of eights
        version = str(claim.get("version", claim.get("format", "gemm"))).lower()
        return flat | {"format": "awq" if version == "gemm" else f"awq {version}"}
    if method == "gptq":
        version = str(claim.get("checkpoint_format", claim.get("format", "gptq"))).lower()
        return flat | {"format": version} | {key: claim[key] for key in ("sym", "desc_act") if key in claim}
    return flat | {"format": method or "nothing"}


_WEIGHTS = {"bits": "num_bits", "group_size": "group_size", "sym": "symmetric"}
