"""What `edgetool bench` does, from its settings to its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetool.config import BenchConfig, CommonConfig
from edgetool.errors import BadInput
from edgetool.loadtest.plot import svg
from edgetool.loadtest.report import report
from edgetool.loadtest.run import Endpoint, Load, measure
from edgetool.progress import Progress


def run_bench(settings: BenchConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Measure and report. Raises what `measure` raises, and BadInput before it where the plot cannot be written."""
    if settings.plot is not None and not settings.plot.absolute().parent.is_dir():
        raise BadInput(f"--plot {settings.plot}: there is no directory {settings.plot.absolute().parent}")
    key = common.server_key()
    endpoints = [Endpoint(settings.url, settings.model, key)]
    if settings.against is not None:
        endpoints.append(Endpoint(settings.against, settings.against_model, settings.second_key() or key))
    load = Load(
        concurrency=settings.concurrency,
        requests=settings.requests,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        rounds=settings.rounds,
        warmup=settings.warmup,
        api=settings.api,
        ignore_eos=settings.ignore_eos,
        seed=settings.seed,
        timeout_s=settings.timeout_s,
    )
    result = report(measure(endpoints, load, progress))
    told = settings.model_dump(mode="json", exclude={"url", "against", "model", "against_model", "against_key", "plot"})
    document = {"settings": told, **result}
    if settings.plot is not None:
        _write(settings.plot, svg(document))
        document["plot"] = str(settings.plot)
    return document


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
