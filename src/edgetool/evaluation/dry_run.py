"""`--dry-run`: what would be measured on what, with which data and how much memory; nothing is loaded or written."""

from __future__ import annotations

from typing import Any

from edgetool.config import Config
from edgetool.errors import ResourceUnavailable
from edgetool.evaluation.endpoint import connect
from edgetool.evaluation.plan import check_usage, dtype_on, opened
from edgetool.evaluation.questions import find_questions
from edgetool.evaluation.targets import need_template, needed_bytes
from edgetool.models.devices import resolve_device
from edgetool.progress import Progress
from edgetool.progress_lines import size
from edgetool.runs import available_memory_bytes
from edgetool.serving.legality import look
from edgetool.serving.secrets import given_key


def dry_run(config: Config, progress: Progress) -> dict[str, Any]:
    """The plan as a document. Raises any EdgetoolError that the run itself would meet before its first question."""
    settings = config.eval
    tasks, _ = check_usage(settings)
    questions = find_questions(config, tasks)
    rows = []
    for task in tasks:
        rows.append(
            {
                "task": task.name,
                "framework": task.framework,
                "questions": questions.count(task, settings.limit),
                "metric": task.metric,
                "data": questions.source(task, settings),
            }
        )
    return {
        "tasks": rows,
        "sides": _sides(config, progress),
        "output": str(settings.output) if settings.output else None,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.chat_template,
        "seed": settings.seed,
        "gate": settings.gate,
        "notes": list(questions.notes),
    }


def _sides(config: Config, progress: Progress) -> list[dict[str, Any]]:
    settings = config.eval
    sides: list[dict[str, Any]] = []
    if settings.against is not None:
        sides.append(_checkpoint("original", settings.against, config, progress))
    if settings.endpoint is not None:
        endpoint = connect(settings.endpoint, given_key(config, progress), settings.endpoint_model)
        sides.append({"side": "quantized", "model": endpoint.model, "endpoint": endpoint.url})
    else:
        sides.append(_checkpoint("quantized", str(settings.model), config, progress))
    return sides


def _checkpoint(side: str, spec: str, config: Config, progress: Progress) -> dict[str, Any]:
    settings = config.eval
    _, checkpoint = opened(spec, config, progress)
    if settings.chat_template:
        need_template(checkpoint)
    found = look(checkpoint)
    facts: dict[str, Any] = {
        "side": side,
        "model": spec,
        "quantization": None if found is None else f"{found.format}, {found.bits} bits, group {found.group_size}",
    }
    if settings.via is not None:
        return {**facts, "via": settings.via}
    device = resolve_device(settings.device)
    dtype = str(dtype_on(device, settings)).removeprefix("torch.")
    needed = needed_bytes(
        checkpoint, dtype, settings.batch_size, settings.context if "perplexity" in settings.tasks else 0
    )
    if device.type == "cpu" and needed > available_memory_bytes():
        raise ResourceUnavailable(
            f"{spec} needs about {size(needed)} in memory, and {size(available_memory_bytes())} are free",
            "use a smaller --batch-size, or --via serve-gpu",
        )
    return {**facts, "device": str(device), "dtype": dtype, "needed_bytes": needed}
