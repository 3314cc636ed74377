"""Is a difference real? Intervals, an exact test and flips for two models that answered the same questions.

Everything is paired: what counts is on which questions the two differ, so the difficulty of a question cancels out.
Numpy only; the same samples and seed give the same figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgetool.errors import BadInput
from edgetool.evaluation.records import PerplexityScores, Sample

Floats = NDArray[np.float64]

RESAMPLES = 10_000
"""Bootstrap draws: the 2.5 % bound then wavers by about 1 % of the interval's width from seed to seed."""

PSEUDO_ANSWERS = 0.5
"""Added to each cell (both right, lost, gained, both wrong) that is drawn from: Agresti and Min, Statistics in Medicine
24 (2005). Without it a few questions without a flip would give an interval of no width, certainty out of nothing."""

DRAWS_AT_ONCE = 1 << 22

FEWEST_WINDOWS = 5
"""Windows of perplexity from which an interval is drawn."""


@dataclass(frozen=True)
class Interval:
    """Bounds of a two-sided interval, low <= high."""

    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """Ids of the samples whose score fell (`lost`) and rose (`gained`) from original to quantised, in order."""

    lost: tuple[str, ...]
    gained: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Scores of both models, sample by sample: ids and groups [n], original and quantized float64 [n], 0 to 1."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    original: Floats
    quantized: Floats
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of samples, at least 1."""
        return len(self.ids)

    @property
    def difference(self) -> float:
        """Mean score of the quantised model less the original's: negative where it is worse."""
        return float(self.quantized.mean() - self.original.mean())

    @property
    def recovery(self) -> float | None:
        """Quantised mean over the original's; None where the original's is 0."""
        return float(self.quantized.mean() / self.original.mean()) if self.original.any() else None

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(np.isin(self.original, (0, 1)).all() and np.isin(self.quantized, (0, 1)).all())

    @property
    def flips(self) -> Flips:
        """Where the two differ."""
        lost = tuple(self.ids[i] for i in np.flatnonzero(self.quantized < self.original))
        gained = tuple(self.ids[i] for i in np.flatnonzero(self.quantized > self.original))
        return Flips(lost, gained)

    @property
    def mcnemar_p(self) -> float | None:
        """`mcnemar` of the flips; None where scores are more than right or wrong."""
        return mcnemar(len(self.flips.lost), len(self.flips.gained)) if self.right_or_wrong else None

    def difference_interval(self, confidence: float) -> Interval:
        """Paired bootstrap, percentiles."""
        original, quantized = self._resampled
        return _percentiles(quantized - original, confidence)

    def recovery_interval(self, confidence: float) -> Interval | None:
        """Paired bootstrap, percentiles; None where the original answered nothing right."""
        if self.recovery is None:
            return None
        original, quantized = self._resampled
        known = original > 0
        return _percentiles(quantized[known] / original[known], confidence) if known.any() else None

    def by_group(self) -> dict[str, Pairs]:
        """The pairs of each group, in order of appearance."""
        members: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            members.setdefault(group, []).append(index)
        return {
            group: Pairs(
                tuple(self.ids[i] for i in rows),
                (group,) * len(rows),
                self.original[rows],
                self.quantized[rows],
                self.seed,
            )
            for group, rows in members.items()
        }

    @cached_property
    def _resampled(self) -> tuple[Floats, Floats]:
        """Means [RESAMPLES] of original and quantised scores over n pairs drawn from these with replacement."""
        cells = np.column_stack([self.original, self.quantized])
        if self.right_or_wrong:
            corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float64)
            weights = np.array([(cells == corner).all(axis=1).sum() for corner in corners]) + PSEUDO_ANSWERS
        else:
            corners, counted = np.unique(cells, axis=0, return_counts=True)
            weights = counted.astype(np.float64)
        means = _resample(corners, weights, self.n, self.seed) / self.n
        return means[:, 0], means[:, 1]


def pair(original: Sequence[Sample], quantized: Sequence[Sample], seed: int = 0) -> Pairs:
    """The samples of two models beside each other, in the order of the original's.

    Raises BadInput where the two did not answer the same questions, or an id stands for two.
    """
    answers = {sample.id: sample for sample in quantized}
    ids = tuple(sample.id for sample in original)
    if not ids or not answers:
        raise BadInput("there is nothing to compare: one of the two has no answers")
    for name, known, samples in (("original", set(ids), original), ("quantised model", set(answers), quantized)):
        if len(known) != len(samples):
            doubled = statistics.mode(sample.id for sample in samples)
            raise BadInput(f"two answers of the {name} are both called {doubled!r}, so that they cannot be paired")
    for odd in sorted(set(ids) ^ set(answers))[:1]:
        side = "the original" if odd in answers else "the quantised model"
        raise BadInput(f"the two did not answer the same questions: {odd!r} has no answer of {side}")
    return Pairs(
        ids,
        tuple(sample.group for sample in original),
        np.array([sample.score for sample in original], dtype=np.float64),
        np.array([answers[name].score for name in ids], dtype=np.float64),
        seed,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: how often fair coins would split lost + gained flips as unevenly as this."""
    flips = lost + gained
    term = total = 1
    for k in range(min(lost, gained)):
        term = term * (flips - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / (1 << flips))


def wilson(right: float, n: int, confidence: float) -> Interval:
    """Wilson's score interval for the share `right` / n of right answers, n >= 1. Journal of the ASA 22 (1927)."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def mean_interval(scores: Sequence[float], confidence: float, seed: int = 0) -> Interval:
    """Interval of one model's mean score: Wilson's where every score is 0 or 1, else the bootstrap's."""
    values, counted = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    if np.isin(values, (0, 1)).all():
        return wilson(float(sum(scores)), len(scores), confidence)
    means = _resample(values[:, None], counted.astype(np.float64), len(scores), seed) / len(scores)
    return _percentiles(means[:, 0], confidence)


@dataclass(frozen=True)
class PerplexityPair:
    """Perplexity of both models on the same windows."""

    original: PerplexityScores
    quantized: PerplexityScores
    seed: int = 0

    @property
    def same_tokens(self) -> bool:
        """Whether both cut the text into the same number of tokens everywhere; perplexities of others say nothing."""
        return [w.tokens for w in self.original.windows] == [w.tokens for w in self.quantized.windows]

    @property
    def ratio(self) -> float | None:
        """Quantised perplexity over the original's, 1 is no loss; None where the two have different tokens."""
        return _exp((self.quantized.nll - self.original.nll) / self.original.tokens) if self.same_tokens else None

    def ratio_interval(self, confidence: float) -> Interval | None:
        """Paired bootstrap over windows, percentiles; None with fewer than 5, or where there is no ratio."""
        if len(self.original.windows) < FEWEST_WINDOWS or self.ratio is None or not math.isfinite(self.ratio):
            return None
        windows = zip(self.original.windows, self.quantized.windows, strict=True)
        rows = np.array([(after.nll - before.nll, before.tokens) for before, after in windows])
        sums = _resample(rows, np.ones(len(rows)), len(rows), self.seed)
        bounds = _percentiles(sums[:, 0] / sums[:, 1], confidence)
        return Interval(_exp(bounds.low), _exp(bounds.high))


def _resample(rows: Floats, weights: Floats, n: int, seed: int) -> Floats:
    """Sums float64 [RESAMPLES, columns] of n rows drawn with replacement, each in proportion to its weight."""
    random = np.random.default_rng(seed)
    shares = weights / weights.sum()
    at_once = max(1, DRAWS_AT_ONCE // len(rows))
    sums = [
        random.multinomial(n, shares, size=min(at_once, RESAMPLES - start)) @ rows
        for start in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(sums).astype(np.float64)


def _percentiles(values: Floats, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
