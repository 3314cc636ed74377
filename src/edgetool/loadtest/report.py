"""Samples as figures: percentiles, rates, and the ratio of two endpoints with its spread over the rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from edgetool.loadtest.client import Sample
from edgetool.loadtest.run import Measured, Round

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], rank: int) -> float | None:
    """The value that `rank` percent of `values` do not exceed (nearest rank); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(rank / 100 * len(ordered)) - 1)]


def report(measured: Measured) -> dict[str, Any]:
    """The result of `edgetool bench` (schema edgetool.bench/1), without what the command itself adds."""
    levels = list(dict.fromkeys(found.concurrency for found in measured.rounds))
    results = [
        _figures(measured, index, level) for level in levels for index in range(len(measured.targets))
    ]  # two endpoints of a level stand below each other
    document: dict[str, Any] = {
        "endpoints": [{"url": target.url, "model": target.model} for target in measured.targets],
        "results": results,
        "warnings": list(measured.warnings),
    }
    if len(measured.targets) == 2:
        document["comparison"] = [_compared(measured, level) for level in levels]
    return document


def _rounds(measured: Measured, index: int, level: int) -> list[Round]:
    return [found for found in measured.rounds if (found.endpoint, found.concurrency) == (index, level)]


def _good(rounds: Sequence[Round]) -> list[Sample]:
    return [sample for found in rounds for sample in found.samples if sample.error is None]


def _figures(measured: Measured, index: int, level: int) -> dict[str, Any]:
    rounds = _rounds(measured, index, level)
    good = _good(rounds)
    wall_s = sum(found.wall_s for found in rounds)
    prompts = [sample.prompt_tokens for sample in good if sample.prompt_tokens is not None]
    return {
        "endpoint": measured.targets[index].url,
        "model": measured.targets[index].model,
        "concurrency": level,
        "requests": sum(len(found.samples) for found in rounds),
        "failed": sum(sample.error is not None for found in rounds for sample in found.samples),
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s,
        "output_tokens_per_s": sum(sample.tokens for sample in good) / wall_s,
        "prompt_tokens_mean": statistics.fmean(prompts) if prompts else None,
        "output_tokens_mean": statistics.fmean(sample.tokens for sample in good) if good else None,
        "ttft_s": _spread([sample.ttft_s for sample in good]),
        "tpot_s": _spread([sample.tpot_s for sample in good]),
        "latency_s": _spread([sample.latency_s for sample in good]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {f"p{rank}": percentile(known, rank) for rank in PERCENTILES}


def _compared(measured: Measured, level: int) -> dict[str, Any]:
    """Second endpoint over first, round by round: the median, the lowest and the highest."""
    pairs = list(zip(_rounds(measured, 0, level), _rounds(measured, 1, level), strict=True))
    measures: dict[str, Callable[[Round], float | None]] = {
        "output_tokens_per_s": lambda found: sum(sample.tokens for sample in _good([found])) / found.wall_s,
        "ttft_s_p50": lambda found: percentile([s.ttft_s for s in _good([found]) if s.ttft_s is not None], 50),
        "tpot_s_p50": lambda found: percentile([s.tpot_s for s in _good([found]) if s.tpot_s is not None], 50),
        "latency_s_p50": lambda found: percentile([s.latency_s for s in _good([found])], 50),
    }
    compared: dict[str, Any] = {"concurrency": level, "rounds": len(pairs)}
    for name, measure in measures.items():
        ratios = [b / a for first, second in pairs if (a := measure(first)) and (b := measure(second)) is not None]
        if ratios:
            compared[name] = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return compared
