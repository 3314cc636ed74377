"""Records of evaluations that were never run, for tests of what is made of them."""

from __future__ import annotations

import numpy as np

from edgetool.evaluation.records import Divergence, PerplexityScores, Sample, TaskScores, WindowLoss
from edgetool.evaluation.results import Measured, MeasuredPerplexity


def task(name: str, outcomes: list[float], groups: list[str] | None = None, metric: str = "acc") -> TaskScores:
    """A task whose samples are called 0, 1, ... and have these scores."""
    names = groups or [name] * len(outcomes)
    rows = tuple(
        Sample(f"{group}:{index}", group, score)
        for index, (group, score) in enumerate(zip(names, outcomes, strict=True))
    )
    mean = float(np.mean(outcomes))
    return TaskScores(
        task=name,
        metric=metric,
        n=len(rows),
        value=mean,
        stderr=0.01,
        samples=rows,
        metrics={metric: mean},
        seconds=2.0,
        generated_tokens=100,
        version={"framework": "lm-eval", "version": "0.4.13"},
    )


def perplexity(nll_of_a_token: float, windows: int = 8) -> PerplexityScores:
    """Windows of 10 tokens, each a little harder than the one before."""
    losses = tuple(WindowLoss(10 * nll_of_a_token * (1 + 0.01 * index), 10) for index in range(windows))
    return PerplexityScores(losses, 70, 400, 16, 10, "first window", "ab" * 32, 1.5)


def both(lost: int = 6, gained: int = 2, n: int = 100, right: int = 60, name: str = "arc_easy") -> Measured:
    """A task of two models."""
    original = [1.0] * right + [0.0] * (n - right)
    quantized = [0.0] * lost + [1.0] * (right - lost) + [1.0] * gained + [0.0] * (n - right - gained)
    return Measured(task(name, quantized), task(name, original))


def subjects(n: int = 12) -> Measured:
    """A task of three subjects: better, worse, and the same."""
    names = ["mmlu_law", "mmlu_art", "mmlu_<b>&'\"</b>"]
    groups = [names[index % 3] for index in range(n)]
    original = [float(index % 2) for index in range(n)]
    change = {names[0]: 1.0, names[1]: 0.0}
    quantized = [change.get(group, before) for group, before in zip(groups, original, strict=True)]
    return Measured(task("mmlu", quantized, groups), task("mmlu", original, groups))


def both_perplexities(change: float = 0.05) -> MeasuredPerplexity:
    """Perplexity of two models and their divergence."""
    divergence = Divergence(0.02, {"p50": 0.01, "p90": 0.05, "p99": 0.2, "max": 1.5}, 0.93, 80)
    return MeasuredPerplexity(perplexity(2.0 + change), perplexity(2.0), divergence)


PROFILE = {"hash": "c0ffee", "tasks": {"arc_easy": {"version": 1.0}, "mmlu": {"version": [1, 2]}}, "seed": 7}
