"""`--gate`: what has to hold between the quantised model and the original, and whether it does.

    gate    = clause { ";" clause }
    clause  = [ task ":" ] ( "recovery" ">=" share | "drop" "<=" number "pt" | "ratio" "<=" number ) [ "@" number "%" ]

recovery is quantised score / original score, drop is original - quantised in percentage points, ratio is quantised
perplexity / original perplexity. Without a task a clause is about every task that has its quantity. Without "@" the
measured value has to hold; with "@ C %" the worse bound of its C % interval has to, so that too few questions fail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgetool.errors import ConfigError
from edgetool.evaluation.statistics import FEWEST_WINDOWS, Interval, Pairs, PerplexityPair

PERPLEXITY = "perplexity"

_DIRECTION = {"recovery": ">=", "drop": "<=", "ratio": "<="}
_CLAUSE = re.compile(
    r"(?:(?P<task>[\w.+-]+)\s*:\s*)?(?P<quantity>[A-Za-z_]\w*)\s*(?P<operator>>=|<=|=>|=<|==|[<>=≥≤])\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<unit>pt|pp|%)?\s*(?:@\s*(?P<confidence>\d+\.?\d*)\s*(?P<percent>%)?)?"
)
_EXAMPLES = (
    "a gate is e.g. 'recovery>=0.98 @95%', 'drop<=1pt', 'ratio<=1.05' or 'arc_easy: drop<=0.5pt; mmlu: drop<=1pt'"
)


@dataclass(frozen=True)
class Clause:
    """One condition. limit: a share (recovery), score points of 1 (drop: 1pt is 0.01) or a factor (ratio).

    confidence: of the interval whose worse bound has to hold, above 0 and below 1; None for the measured value itself.
    """

    text: str
    task: str | None
    quantity: str
    limit: float
    confidence: float | None

    def is_about(self, task: str) -> bool:
        """Whether this clause judges `task`."""
        return (self.quantity == "ratio") == (task == PERPLEXITY) and self.task in (None, task)


@dataclass(frozen=True)
class Verdict:
    """What one clause says of one task, and why in words."""

    task: str
    clause: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The whole gate: passed where every verdict is."""

    expression: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether everything that was asked for holds; nothing to judge is no pass."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def reason(self) -> str:
        """The failed verdicts in one line; all of them where none failed."""
        failed = [verdict for verdict in self.verdicts if not verdict.passed]
        return "; ".join(verdict.reason for verdict in failed or self.verdicts)


@dataclass(frozen=True)
class Gate:
    """A parsed gate."""

    expression: str
    clauses: tuple[Clause, ...]

    def check(self, tasks: Iterable[str]) -> None:
        """Raises ConfigError where a clause is about none of `tasks`: it would pass by judging nothing."""
        names = list(tasks)
        for clause in self.clauses:
            if any(clause.is_about(task) for task in names):
                continue
            if clause.task is None:
                needed = PERPLEXITY if clause.quantity == "ratio" else "a task with a score"
                raise ConfigError(f"gate {clause.text!r} needs {needed}; --tasks has {', '.join(names)}", _EXAMPLES)
            if clause.task not in names:
                raise ConfigError(
                    f"gate {clause.text!r} is about {clause.task}; --tasks has {', '.join(names)}", "add it to --tasks"
                )
            hint = "use ratio<=1.05 for perplexity" if clause.task == PERPLEXITY else "use recovery or drop for a score"
            raise ConfigError(f"gate {clause.text!r}: {clause.task} has no {clause.quantity}", hint)

    def check_windows(self, limit: int | None) -> None:
        """Raises ConfigError where --limit leaves too few windows of text for an interval that a clause asks for."""
        for clause in self.clauses_for(PERPLEXITY):
            if clause.confidence is not None and limit is not None and limit < FEWEST_WINDOWS:
                raise ConfigError(
                    f"gate {clause.text!r}: {_too_few(limit)}",
                    f"use --limit {FEWEST_WINDOWS} or more, or a gate without @",
                )

    def clauses_for(self, task: str) -> tuple[Clause, ...]:
        """The clauses that judge `task`."""
        return tuple(clause for clause in self.clauses if clause.is_about(task))

    def decide(
        self,
        scores: Mapping[str, Pairs],
        perplexity: PerplexityPair | None = None,
        early: Mapping[str, Iterable[Verdict]] | None = None,
    ) -> Decision:
        """Judge what was measured. `early`: verdicts that a sequential test gave, which stand instead, by task."""
        early = early or {}
        verdicts: list[Verdict] = []
        for clause in self.clauses:
            for task, pairs in scores.items():
                if not clause.is_about(task):
                    continue
                known = [verdict for verdict in early.get(task, ()) if verdict.clause == clause.text]
                verdicts += known[:1] or [judge_scores(clause, task, pairs)]
            if perplexity is not None and clause.is_about(PERPLEXITY):
                verdicts.append(judge_perplexity(clause, perplexity))
        return Decision(self.expression, tuple(verdicts))


def parse_gate(expression: str) -> Gate:
    """Raises ConfigError that names the place of what cannot be read."""
    clauses = []
    place = 1
    for part in expression.split(";"):
        text = part.strip()
        clauses.append(_clause(text, place + len(part) - len(part.lstrip())))
        place += len(part) + 1
    return Gate(expression, tuple(clauses))


def _clause(text: str, place: int) -> Clause:
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"gate, character {place}: {what}", _EXAMPLES)

    if not text:
        raise wrong("a clause is empty")
    found = _CLAUSE.fullmatch(text)
    if found is None:
        part = _CLAUSE.match(text)
        rest = text[part.end() :].strip() if part else text
        raise wrong(f"{rest!r} cannot be read" + (f" after {part.group().strip()!r}" if part else ""))
    quantity, unit, confidence = found["quantity"], found["unit"], found["confidence"]
    if quantity not in _DIRECTION:
        raise wrong(f"{quantity!r} is none of recovery, drop and ratio")
    if found["operator"] != _DIRECTION[quantity]:
        raise wrong(f"{quantity} is followed by {_DIRECTION[quantity]}, not by {found['operator']}")
    limit = float(found["number"])
    if quantity == "drop":
        if unit not in ("pt", "pp"):
            raise wrong(f"drop is in percentage points: write 'drop<={found['number']}pt', not {text!r}")
        limit /= 100
    elif unit in ("pt", "pp") or (unit and quantity == "ratio"):
        raise wrong(f"{quantity} has no unit {unit!r}")
    elif unit == "%":
        limit /= 100
    highest = {"recovery": 2.0, "drop": 1.0, "ratio": 1000.0}[quantity]
    lowest = -1.0 if quantity == "drop" else 0.0
    if not lowest <= limit <= highest or (quantity != "drop" and limit == 0):
        raise wrong(f"{quantity} {found['number']}{unit or ''} would always hold or never")
    level = None
    if confidence is not None:
        level = float(confidence) / 100
        if not found["percent"] or not 0.5 <= level < 1:
            raise wrong(f"'@{confidence}{found['percent'] or ''}' is no confidence from 50% to below 100%")
    return Clause(text, found["task"], quantity, limit, level)


def judge_scores(clause: Clause, task: str, pairs: Pairs) -> Verdict:
    """What a clause with recovery or drop says of the scores of one task."""
    if clause.quantity == "recovery":
        recovery = pairs.recovery
        interval = pairs.recovery_interval(clause.confidence) if clause.confidence else None
        if recovery is None or (clause.confidence and interval is None):
            return _verdict(clause, task, False, "the original has no right answer to recover")
        bound = interval.low if interval else recovery
        said = f"recovery {recovery:.4f}{_within(interval, clause, 1, '.4f', '')}, at least {clause.limit:.4g} asked"
        return _verdict(clause, task, bound >= clause.limit - ROUNDING, said)
    drop = -pairs.difference
    found = pairs.difference_interval(clause.confidence) if clause.confidence else None
    interval = Interval(-found.high, -found.low) if found else None
    bound = interval.high if interval else drop
    measured = f"drop {100 * drop:z.2f} pt{_within(interval, clause, 100, 'z.2f', ' pt')}"
    said = f"{measured}, at most {100 * clause.limit:g} pt asked"
    return _verdict(clause, task, bound <= clause.limit + ROUNDING, said)


ROUNDING = 1e-12
"""Slack of comparisons: a drop of exactly 1 pt is allowed by drop<=1pt though 0.81 - 0.80 is above 0.01 in floats."""


def judge_perplexity(clause: Clause, pair: PerplexityPair) -> Verdict:
    """What a clause with ratio says of perplexity."""
    ratio = pair.ratio
    if ratio is None:
        return _verdict(clause, PERPLEXITY, False, "the two models cut the text into different tokens")
    if not math.isfinite(ratio):
        return _verdict(clause, PERPLEXITY, False, "a perplexity that is no finite number")
    interval = pair.ratio_interval(clause.confidence) if clause.confidence else None
    if clause.confidence and interval is None:
        return _verdict(clause, PERPLEXITY, False, _too_few(len(pair.original.windows)))
    bound = interval.high if interval else ratio
    said = f"ratio {ratio:.4f}{_within(interval, clause, 1, '.4f', '')}, at most {clause.limit:g} asked"
    return _verdict(clause, PERPLEXITY, bound <= clause.limit + ROUNDING, said)


def _too_few(windows: int) -> str:
    return f"{windows} windows are too few for an interval: {FEWEST_WINDOWS} are the least"


def _verdict(clause: Clause, task: str, passed: bool, said: str) -> Verdict:
    return Verdict(task, clause.text, passed, f"{task}: {said}")


def _within(interval: Interval | None, clause: Clause, scale: float, form: str, unit: str) -> str:
    if interval is None or clause.confidence is None:
        return ""
    low, high = scale * interval.low, scale * interval.high
    return f" ({100 * clause.confidence:g} % interval {low:{form}} to {high:{form}}{unit})"
