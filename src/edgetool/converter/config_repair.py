"""config.json and its sidecar: of a converted checkpoint, and put right in place where they contradict the tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.checkpoint import CONFIG_NAME, read_json_object
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.config_files import set_dtype, spell_rope_twice, write_config
from edgetool.checkpoints.detect import detect
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.converter.floats import DTYPE_OF
from edgetool.converter.plan import Plan
from edgetool.converter.source import CheckpointSource, Source
from edgetool.errors import BadInput

SIDE_CONFIG = "quantize_config.json"
HEAD = "lm_head"

_GPTQ = ("gptq", "gptq_v2")
_NO_LINEARS = re.compile(r"(embed|norm|wte|wpe|rotary)", re.IGNORECASE)
_DECIDING = {
    "gptq": ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format"),
    "awq": ("quant_method", "bits", "group_size", "zero_point", "version"),
    "compressed-tensors": ("quant_method", "format", "config_groups"),
}
"""Format -> the keys that decide how the tensors are read; all others of an existing section are left alone."""


def write_new_config(source: Source, plan: Plan, directory: Path) -> None:
    """config.json of the output, with the sidecar that its format has."""
    config = json.loads(json.dumps(source.config))
    quantization: dict[str, Any] | None = None
    side_config: str | None = None
    if plan.spec is None:
        set_dtype(config, DTYPE_OF[plan.target])
    else:
        entry = FORMATS[plan.target]
        quantization = entry.quantization_config(plan.spec, left_alone(source, plan.target))
        side_config = entry.side_config
    spell_rope_twice(config)
    with disk_errors(directory):
        write_config(directory, config, quantization, side_config)


def left_alone(source: Source, target: str) -> list[str]:
    """Names of the linears in 16 bit, as `Format.quantization_config` takes them: with all below, under any prefix.

    A part of the model in which nothing is quantised (a vision tower) is one name. lm_head is among them unless it is
    quantised: its weight may be the embedding's.
    """
    quantized = list(source.layouts)
    found = [] if any(name.split(".")[-1] == HEAD for name in quantized) else [HEAD]
    for name, tensor in source.plain.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and len(tensor.shape) == 2 and not _NO_LINEARS.search(module.split(".")[-1]):
            short = _short_name(module, quantized, by_substring=target == "awq")
            if short is not None:
                found.append(short)
    return list(dict.fromkeys(found))


def _short_name(module: str, quantized: Collection[str], *, by_substring: bool) -> str | None:
    """The shortest name that means `module` and no quantised one, or None where readers would take it for one.

    by_substring: readers (vLLM for AWQ) look for the name anywhere in a module's.
    """
    parts = module.split(".")
    depths = (depth for depth in range(1, len(parts)) if not _any_below(parts[:depth], quantized))
    top = next(depths, len(parts))
    for stop in (top, len(parts)):
        for start in range(stop - 1, -1, -1):
            name = ".".join(parts[start:stop])
            if parts[start].isdigit():
                continue
            if by_substring and any(name in other for other in quantized):
                continue
            if not any(f".{name}." in f".{other}." for other in quantized):
                return name
    return None


def _any_below(parts: list[str], quantized: Collection[str]) -> bool:
    prefix = ".".join(parts) + "."
    return any(name.startswith(prefix) for name in quantized)


def repair(path: Path, from_: str = "auto") -> tuple[CheckpointSource, list[str]]:
    """Rewrite what config.json and quantize_config.json say wrongly about the tensors in the directory `path`.

    Returns the checkpoint as it was opened before, and a sentence for each thing that is right now and was not. Keys
    that decide nothing about the reading stay as they are. Each file is replaced as a whole. Raises BadInput for what
    cannot be opened, and for links (a hub's cache is shared by other programs).
    """
    source = CheckpointSource.open(path, from_)
    for name in (CONFIG_NAME, SIDE_CONFIG):
        if (path / name).is_symlink():
            raise BadInput(
                f"{path / name} is a link, as in a hub's cache, and is not changed",
                f"copy the checkpoint first: cp -rL {path} ...",
            )
    config: Mapping[str, Any] = source.config
    problems = [*source.disagreements, *_unnoticed(source)]
    quantization = _right_quantization(source, problems)
    right = {**config, "quantization_config": quantization}
    after = detect(
        source.checkpoint.tensors, source.checkpoint.read, right, written_as=from_ if from_ in _GPTQ else None
    )
    left = () if after is None else after.disagreements
    fixed = [note for note in problems if note not in left]
    if quantization is not None and (said := _side_problem(path / SIDE_CONFIG, quantization)):
        fixed.append(said)
    if fixed:
        write_config(path, config, quantization, SIDE_CONFIG if (path / SIDE_CONFIG).is_file() else None)
    return source, fixed


def _unnoticed(source: CheckpointSource) -> list[str]:
    """Asymmetric linears of a checkpoint that is said to be symmetric: detection looks at the zeros of some only."""
    claim = claimed_quantization(source.config) or {}
    if source.format not in _GPTQ or not claim.get("sym") or (source.spec is not None and not source.spec.sym):
        return []
    wrong = [name for name in source.layouts if not source.rest(name).sym]
    return [f"config.json says sym True, the zeros of {wrong[0]} ({len(wrong)} linears) say False"] if wrong else []


def _right_quantization(source: CheckpointSource, problems: Sequence[str]) -> dict[str, Any] | None:
    if source.found is None:
        return None
    spec, claim = source.found.spec, claimed_quantization(source.config)
    if claim is not None and not problems:
        return dict(claim)
    if source.format in _GPTQ:  # what has been found of the zeros so far was found in a sample
        spec = Spec(spec.bits, spec.group_size, all(source.rest(name).sym for name in source.layouts), spec.desc_act)
    fresh = FORMATS[source.format].quantization_config(spec, left_alone(source, source.format))
    method = fresh["quant_method"]
    if claim is None or str(claim.get("quant_method", "")).lower() != method:
        return fresh
    return {**claim, **{key: fresh[key] for key in _DECIDING[method] if key in fresh}}


def _side_problem(path: Path, quantization: Mapping[str, Any]) -> str | None:
    """What an existing sidecar says otherwise than `quantization`; one that lacks keys is no problem."""
    said = read_json_object(path) if path.is_file() else {}
    for key in _DECIDING[quantization["quant_method"]]:
        if key in said and said[key] != quantization.get(key):
            return f"{path.name} says {key} {said[key]}, the tensors say {quantization.get(key)}"
    return None
