"""`--sequential`: stop as soon as the gate is decided, by a test that may be looked at after every question.

Testing by betting, after Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
arXiv:2010.09686. Somebody who doubts that the condition holds lets us bet on every next question, at odds that are fair
or worse for us if the doubt is right. Our capital then never reaches 1 / alpha with a probability above alpha, however
often one looks (Ville's inequality): when it does, the doubt is refuted. A second player bets against the condition.

Recovery and drop are both the mean of y = quantised - r * original per question, r the recovery asked for or 1; the
question is whether it reaches a bound. Questions come in a random order, so for a clause without a confidence the next
one is a draw without replacement from those that are left, and the statement is about what the whole run would give
(section 5 of the paper). A clause with "@ C %" is about the population that the questions came from, draws with
replacement; each player has half of 1 - C, as each end of the interval that judges a run without `--sequential` has.
A run that ends undecided has seen every question and is judged as one without `--sequential`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetool.evaluation.gate import Clause, Verdict
from edgetool.evaluation.statistics import Floats, Interval

ERROR = 0.05
"""Largest chance of each wrong verdict about the whole run, for clauses without a confidence of their own."""

STAKES = 2.0 ** -np.arange(-1.0, 8.0)
"""The capital is spread evenly over players who always stake these, from 2 to 1/128 of it per unit of x: one of them is
within a factor of two of the best stake for any difference ("diversified Kelly betting" in the paper)."""

RUIN = 0.95
"""Most of the capital that a single question may cost."""

FIRST_LOOK = 50
GROWTH = 1.2


@dataclass(frozen=True)
class Stopped:
    """A task decided before all its questions were asked.

    interval: of the difference, at 95 %, valid although the run stopped when it liked the answer.
    about: what verdicts and interval speak of, "the whole run" or "the population of such questions".
    """

    verdicts: tuple[Verdict, ...]
    interval: Interval
    seen: int
    population: int
    about: str


def random_order(population: int, seed: int) -> list[int]:
    """The order in which the questions 0 ... population - 1 are asked: a random one, without which no verdict holds."""
    return [int(index) for index in np.random.default_rng(seed).permutation(population)]


def looks(population: int) -> list[int]:
    """Rising numbers of questions after which to look, the last is `population`: any others are as sound."""
    found = []
    size = float(FIRST_LOOK)
    while size < population:
        found.append(int(size))
        size *= GROWTH
    return [*found, population]


def look(clauses: Sequence[Clause], task: str, original: Floats, quantized: Floats, population: int) -> Stopped | None:
    """The verdicts on the scores so far, float64 [seen] in `random_order`, or None while one of `clauses` is open.

    `clauses` are recovery and drop. None too where all questions were seen: nothing was stopped.
    """
    seen = len(original)
    verdicts = [_verdict(clause, task, original, quantized, population) for clause in clauses]
    decided = [verdict for verdict in verdicts if verdict is not None]
    if not clauses or len(decided) < len(clauses) or seen >= population:
        return None
    whole_run = all(clause.confidence is None for clause in clauses)
    interval = difference_interval(original, quantized, 0.95, population if whole_run else None)
    about = "the whole run" if whole_run else "the population of such questions"
    return Stopped(tuple(decided), interval, seen, population, about)


def difference_interval(original: Floats, quantized: Floats, confidence: float, population: int | None) -> Interval:
    """Confidence sequence of quantised - original at its last question: holds at all questions at once.

    About the mean of all `population` questions, or with None about the mean of what they were drawn from.
    """
    x = _scaled(original, quantized, 1.0)
    needed = math.log(2 / (1 - confidence))
    low, high = (_edge(x, needed, population, side) for side in (1, -1))
    return Interval(2 * low - 1, 2 * high - 1)


def log_capital(x: Floats, null: float, population: int | None, side: int) -> Floats:
    """Highest log capital float64 [n] after each of the values x in [0, 1], betting that their mean is not `null`.

    side 1 bets that the mean is above, -1 that it is below. Falls as `null` rises for side 1, rises for side -1: every
    stake's factor does, so the nulls that are not refuted are an interval.
    """
    before = np.concatenate([[0.0], np.cumsum(x)[:-1]])
    left = np.inf if population is None else population - np.arange(len(x))
    expected = null + np.zeros(len(x)) if population is None else (population * null - before) / left
    fair = np.clip(expected, 0.0, 1.0)
    room = fair if side > 0 else 1 - fair
    stakes = np.minimum(STAKES[:, None], RUIN / np.maximum(room, 1e-12))
    capitals = np.cumsum(np.log1p(stakes * side * (x - fair)), axis=1)
    total = np.logaddexp.reduce(capitals, axis=0) - math.log(len(STAKES))
    if population is not None:  # what is left cannot bring the mean to the null any more
        after = (population * null - before - x) / np.maximum(left - 1, 1)
        impossible = after < -ROUNDING if side > 0 else after > 1 + ROUNDING
        total = np.where(impossible & (left > 1), np.inf, total)
    return np.maximum.accumulate(total)


ROUNDING = 1e-9


def _scaled(original: Floats, quantized: Floats, recovery: float) -> Floats:
    """y = quantised - recovery * original, which is in [-recovery, 1], moved into [0, 1]."""
    return (quantized - recovery * original + recovery) / (1 + recovery)


def _verdict(clause: Clause, task: str, original: Floats, quantized: Floats, population: int) -> Verdict | None:
    recovery = clause.limit if clause.quantity == "recovery" else 1.0
    least = 0.0 if clause.quantity == "recovery" else -clause.limit
    x, null = _scaled(original, quantized, recovery), (least + recovery) / (1 + recovery)
    error = ERROR if clause.confidence is None else (1 - clause.confidence) / 2
    drawn_from = population if clause.confidence is None else None
    crossed = [
        int(np.argmax(over)) if (over := log_capital(x, null, drawn_from, side) >= -math.log(error)).any() else len(x)
        for side in (1, -1)
    ]
    if min(crossed) == len(x):
        return None
    passed = crossed[0] < crossed[1]
    return Verdict(task, clause.text, passed, _reason(clause, task, original, quantized, population, passed, error))


def _reason(
    clause: Clause, task: str, original: Floats, quantized: Floats, population: int, passed: bool, error: float
) -> str:
    drop = 100 * float(original.mean() - quantized.mean())
    asked = (
        f"recovery of at least {clause.limit:.4g}"
        if clause.quantity == "recovery"
        else f"drop of at most {100 * clause.limit:g} pt"
    )
    of = "of the whole run" if clause.confidence is None else "in general"
    return (
        f"{task}: {asked} {'holds' if passed else 'does not hold'} {of}, wrong in at most {100 * error:g} % of cases "
        f"(drop {drop:z.2f} pt after {len(original)} of {population} questions)"
    )


def _edge(x: Floats, needed: float, population: int | None, side: int) -> float:
    """Smallest (side 1) or largest (side -1) mean in [0, 1] that is not refuted, from outside, to 1e-5."""
    refuted, open_ = (0.0, 1.0) if side > 0 else (1.0, 0.0)
    if log_capital(x, refuted, population, side)[-1] < needed:
        return refuted
    while abs(open_ - refuted) > 1e-5:
        middle = (refuted + open_) / 2
        if log_capital(x, middle, population, side)[-1] >= needed:
            refuted = middle
        else:
            open_ = middle
    return refuted
