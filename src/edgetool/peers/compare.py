"""`edgetool quantize --compare`: several backends on the same model and calibration tokens, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.sources import resolve_configured
from edgetool.config import CommonConfig, Config, QuantizeConfig
from edgetool.config_models import usual_format
from edgetool.errors import EdgetoolError, Stopped
from edgetool.peers.check import plain, weight_error
from edgetool.peers.job import quantize_by
from edgetool.progress import Progress
from edgetool.quantizers.demo import held_out_perplexity, what_is_measured
from edgetool.quantizers.guards import refuse_other_run


def run_compare(config: Config, progress: Progress) -> dict[str, Any]:
    """Quantise by each of `--compare` into OUT/BACKEND and measure all of them, and the model, by the same judge.

    What one of them refuses or fails at is a line of the table; the others go on. With --resume what is finished is
    taken as it is. Raises what the first would where none could do it.
    """
    settings = config.quantize
    assert settings.compare is not None
    rows: list[dict[str, Any]] = []
    failures: list[EdgetoolError] = []
    for backend in settings.compare:
        single = _single(settings, backend)
        try:
            resume = settings.resume and not settings.dry_run
            known = _finished(single, config.common, progress) if resume else None
            result = known or quantize_by(backend, single, config.common, config.envs, progress)
        except Stopped:
            raise
        except EdgetoolError as error:
            failures.append(error)
            progress.warn(f"{backend}: {error.message}")
            rows.append({"backend": backend, "failed": error.message})
            continue
        rows.append({"backend": backend, **(_planned(result["plan"]) if "plan" in result else _made(result))})
    if len(failures) == len(rows):
        raise failures[0]
    if settings.dry_run:
        return {"plan": {"model": settings.model, "output": str(settings.output), "backends": rows}}
    source = resolve_configured(settings.model, config.common, settings.revision, progress)
    checkpoint = Checkpoint.open(source.path)
    original = _perplexity(checkpoint, "original", settings, progress)
    for row in rows:
        if "failed" not in row:
            made = Checkpoint.open(Path(row["output"]))
            measured = _perplexity(made, row["backend"], settings, progress)
            apart = None if settings.method == "awq" else mean_weight_error(made, checkpoint)
            row |= {"weight_error": apart, "perplexity": measured, "perplexity_ratio": measured / original}
    return {
        "model": settings.model,
        "output": str(settings.output),
        "original_perplexity": original,
        "perplexity_text": what_is_measured(),
        "comparison": rows,
        "warnings": [f"{row['backend']}: {row['failed']}" for row in rows if "failed" in row],
    }


def _single(settings: QuantizeConfig, backend: str) -> QuantizeConfig:
    """The settings of one of the runs: the format that was asked for, or else that backend's own."""
    given = settings.model_dump(exclude_unset=True) | {
        "compare": None,
        "backend": backend,
        "output": settings.output / backend,
        "resume": settings.resume and backend == "native",  # the others keep nothing, and start again
    }
    if "format" not in settings.model_fields_set:
        given["format"] = usual_format(given | {"method": settings.method, "bits": settings.bits})
    return QuantizeConfig.model_validate(given)


def _finished(single: QuantizeConfig, common: CommonConfig, progress: Progress) -> dict[str, Any] | None:
    """The result of a backend that was done before the comparison was stopped, None where it was not.

    Raises BadInput where it was done with other settings, or from another model.
    """
    try:
        record = json.loads((single.output / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    source = resolve_configured(single.model, common, single.revision, progress)
    refuse_other_run(single.output, record, single, Checkpoint.open(source.path))
    return dict(record["result"])


def _planned(plan: dict[str, Any]) -> dict[str, Any]:
    return {"output": plan["output"], "format": plan["format"], "memory": plan["memory"], "disk": plan["disk"]}


def _made(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": result.get("backend_version"),
        "output": result["output"],
        "method": result["method"],
        "format": result["format"],
        "seconds": result["seconds"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "output_bytes": result["output_bytes"],
    }


def mean_weight_error(made: Checkpoint, original: Checkpoint) -> float:
    """The mean of `weight_error` over the quantised linears."""
    found = detect(made.tensors, made.read, made.config)
    assert found is not None
    errors = [
        weight_error(
            read_linear(made, module, found).dequantize(), plain(original, original.tensors[f"{module}.weight"])
        )
        for module in found.modules
    ]
    return sum(errors) / len(errors)


def _perplexity(checkpoint: Checkpoint, name: str, settings: QuantizeConfig, progress: Progress) -> float:
    from edgetool.models.devices import fast_dtype, resolve_device
    from edgetool.models.streamed import StreamedModel, load_tokenizer

    device = resolve_device(settings.device)
    model = StreamedModel(checkpoint, device, fast_dtype(device))
    return held_out_perplexity(model, load_tokenizer(checkpoint), name, progress)
