"""The document of an evaluation (schema edgetool.eval/1), made of what was measured on one or on two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetool.evaluation.gate import PERPLEXITY, Decision, Gate, Verdict
from edgetool.evaluation.records import Divergence, PerplexityScores, TaskScores
from edgetool.evaluation.sequential import Stopped
from edgetool.evaluation.statistics import Interval, Pairs, PerplexityPair, mean_interval, pair

SCHEMA = "edgetool.eval/1"
CONFIDENCE = 0.95

AGREEMENT = 1e-6
"""Most that upstream's aggregate may differ from the mean of its samples; it sums in another order."""


@dataclass(frozen=True)
class Measured:
    """One task. `quantized` is MODEL, whatever it is; `original` is what --against names, or None.

    stopped: what a sequential test decided before all questions were asked.
    """

    quantized: TaskScores
    original: TaskScores | None = None
    stopped: Stopped | None = None


@dataclass(frozen=True)
class MeasuredPerplexity:
    """Perplexity of MODEL and of the original, and how far apart their distributions are where that was measured."""

    quantized: PerplexityScores
    original: PerplexityScores | None = None
    divergence: Divergence | None = None


def document(
    profile: Mapping[str, Any],
    model: Mapping[str, Any],
    against: Mapping[str, Any] | None,
    tasks: Mapping[str, Measured],
    perplexity: MeasuredPerplexity | None,
    gate: Gate | None,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """The whole document without what a command adds (schema, ok); `outcomes` last, for a later comparison.
    What is no finite number is None, as in JSON.

    profile: has "hash". model, against: facts of the two, "model" is the name. With `gate`, tasks and perplexity need
    both sides. Raises BadInput where the two did not answer the same questions.
    """
    pairs = {
        name: pair(one.original.samples, one.quantized.samples, seed) for name, one in tasks.items() if one.original
    }
    both = _perplexity_pair(perplexity, seed)
    entries = {name: _task_entry(one, pairs.get(name), seed) for name, one in tasks.items()}
    outcomes = {name: _outcomes(one) for name, one in tasks.items()}
    if perplexity is not None:
        entries[PERPLEXITY] = _perplexity_entry(perplexity, both)
        outcomes[PERPLEXITY] = _window_outcomes(perplexity)
    early = {name: one.stopped.verdicts for name, one in tasks.items() if one.stopped}
    found = {
        "profile": dict(profile),
        "model": dict(model),
        "against": None if against is None else dict(against),
        "tasks": entries,
        "gate": None if gate is None else gate_entry(gate.decide(pairs, both, early)),
        "seconds": seconds,
        "outcomes": outcomes,
    }
    return {key: _finite(value) for key, value in found.items()}


def shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it is printed: without the outcome of every question."""
    return {key: value for key, value in found.items() if key not in ("outcomes", "schema", "ok")}


def gate_entry(decision: Decision) -> dict[str, Any]:
    """A decision as a part of the document."""

    def entry(verdict: Verdict) -> dict[str, Any]:
        return {"task": verdict.task, "clause": verdict.clause, "passed": verdict.passed, "reason": verdict.reason}

    return {
        "expression": decision.expression,
        "passed": decision.passed,
        "reason": decision.reason,
        "verdicts": [entry(verdict) for verdict in decision.verdicts],
    }


def _task_entry(measured: Measured, pairs: Pairs | None, seed: int) -> dict[str, Any]:
    model = measured.quantized
    entry: dict[str, Any] = {
        "metric": model.metric,
        "n": model.n,
        "score": model.value,
        "original": None,
        "quantized": None,
        "difference": None,
        "ci95": None,
    }
    if pairs is not None and measured.original is not None:
        _check_means(measured.original, pairs.original.mean())
        _check_means(model, pairs.quantized.mean())
        entry |= _both(pairs, measured.original.value, model.value)
    groups = _groups(measured, pairs, seed)
    if groups:
        entry["groups"] = groups
    if measured.stopped is not None:
        stopped = measured.stopped
        entry["ci95"] = _bounds(stopped.interval)
        entry["recovery_ci95"] = entry["mcnemar_p"] = None  # neither may be looked at more than once
        entry["sequential"] = {
            "questions": stopped.seen,
            "of": stopped.population,
            "about": stopped.about,
            "method": "betting (arXiv:2010.09686)",
        }
    entry["sides"] = {"model": _side(model, seed)}
    if measured.original is not None:
        entry["sides"]["against"] = _side(measured.original, seed)
    return entry


def _both(pairs: Pairs, original: float, quantized: float) -> dict[str, Any]:
    flips = pairs.flips
    return {
        "original": original,
        "quantized": quantized,
        "difference": quantized - original,
        "ci95": _bounds(pairs.difference_interval(CONFIDENCE)),
        "flips": {"lost": len(flips.lost), "gained": len(flips.gained)},
        "flipped": {"lost": list(flips.lost), "gained": list(flips.gained)},
        "mcnemar_p": pairs.mcnemar_p,
        "recovery": pairs.recovery,
        "recovery_ci95": _bounds(pairs.recovery_interval(CONFIDENCE)),
    }


def _groups(measured: Measured, pairs: Pairs | None, seed: int) -> dict[str, Any]:
    by_group: dict[str, list[float]] = {}
    for sample in measured.quantized.samples:
        by_group.setdefault(sample.group, []).append(sample.score)
    if len(by_group) < 2:
        return {}
    paired = pairs.by_group() if pairs else {}
    found = {}
    for name, scores in by_group.items():
        found[name] = {
            "n": len(scores),
            "score": sum(scores) / len(scores),
            "score_ci95": _bounds(mean_interval(scores, CONFIDENCE, seed)),
        }
        if name in paired:
            both = _both(paired[name], float(paired[name].original.mean()), float(paired[name].quantized.mean()))
            found[name] |= {key: both[key] for key in ("original", "quantized", "difference", "ci95", "flips")}
    return found


def _side(scores: TaskScores, seed: int) -> dict[str, Any]:
    rate = None
    if scores.generated_tokens is not None and scores.seconds > 0:
        rate = scores.generated_tokens / scores.seconds
    return {
        "value": scores.value,
        "ci95": _bounds(mean_interval([sample.score for sample in scores.samples], CONFIDENCE, seed)),
        "stderr": scores.stderr,
        "metrics": dict(scores.metrics),
        "seconds": scores.seconds,
        "generated_tokens": scores.generated_tokens,
        "tokens_per_s": rate,
        "version": dict(scores.version),
    }


def _perplexity_entry(measured: MeasuredPerplexity, both: PerplexityPair | None) -> dict[str, Any]:
    model, original, divergence = measured.quantized, measured.original, measured.divergence
    sides = {"model": _perplexity_side(model)}
    if original is not None:
        sides["against"] = _perplexity_side(original)
    return {
        "metric": "perplexity of a token",
        "n": model.tokens,
        "score": model.perplexity,
        "original": None if original is None else original.perplexity,
        "quantized": None if original is None else model.perplexity,
        "ratio": both.ratio if both else None,
        "ratio_ci95": _bounds(both.ratio_interval(CONFIDENCE)) if both else None,
        "kl_divergence": divergence.kl_mean if divergence else None,
        "kl_percentiles": dict(divergence.kl_percentiles) if divergence else None,
        "kl_tokens": divergence.tokens if divergence else None,
        "top1_agreement": divergence.top1_agreement if divergence else None,
        "tokens": model.tokens,
        "words": model.words,
        "word_perplexity": model.word_perplexity,
        "bits_per_byte": model.bits_per_byte,
        "context": model.context,
        "stride": model.stride,
        "unit": model.unit,
        "prefix": model.prefix,
        "text_sha256": model.text_sha256,
        "sides": sides,
        **({} if math.isfinite(model.nll) else {"note": "the model's outputs are not numbers"}),
    }


def _perplexity_side(scores: PerplexityScores) -> dict[str, Any]:
    return {
        "value": scores.perplexity,
        "word_perplexity": scores.word_perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "tokens": scores.tokens,
        "words": scores.words,
        "text_bytes": scores.text_bytes,
        "seconds": scores.seconds,
    }


def _outcomes(measured: Measured) -> dict[str, Any]:
    model, original = measured.quantized.samples, measured.original
    against = {sample.id: sample.score for sample in original.samples} if original else None
    return {
        "ids": [sample.id for sample in model],
        "groups": [sample.group for sample in model],
        "quantized": [sample.score for sample in model],
        "original": None if against is None else [against[sample.id] for sample in model],
    }


def _window_outcomes(measured: MeasuredPerplexity) -> dict[str, Any]:
    original = measured.original
    return {
        "tokens": [window.tokens for window in measured.quantized.windows],
        "quantized": [window.nll for window in measured.quantized.windows],
        "original": None if original is None else [window.nll for window in original.windows],
    }


def _perplexity_pair(measured: MeasuredPerplexity | None, seed: int) -> PerplexityPair | None:
    if measured is None or measured.original is None:
        return None
    return PerplexityPair(measured.original, measured.quantized, seed)


def _check_means(scores: TaskScores, mean: float) -> None:
    if abs(scores.value - mean) > AGREEMENT:
        raise ValueError(f"{scores.task}: {scores.metric} is {scores.value}, and the mean of its samples is {mean}")


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
