"""The gate's grammar, where it refuses, and what it decides."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetool.errors import ConfigError
from edgetool.evaluation.gate import Clause, parse_gate
from edgetool.evaluation.records import PerplexityScores, WindowLoss
from edgetool.evaluation.statistics import Pairs, PerplexityPair


def pairs(n: int, lost: int, gained: int, right: int) -> Pairs:
    """n questions, the original right in `right` of them."""
    original = np.array([1.0] * right + [0.0] * (n - right))
    quantized = original.copy()
    quantized[:lost] = 0
    quantized[n - gained :] = 1
    return Pairs(tuple(map(str, range(n))), ("t",) * n, original, quantized)


def perplexity(change: float, windows: int = 10) -> PerplexityPair:
    def side(nll: float) -> PerplexityScores:
        found = tuple(WindowLoss(nll * (1 + 0.01 * index), 10) for index in range(windows))
        return PerplexityScores(found, 10, 50, 10, 10, "first window", "")

    return PerplexityPair(side(30.0), side(30.0 + change))


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("recovery>=0.98 @95%", Clause("recovery>=0.98 @95%", None, "recovery", 0.98, 0.95)),
        ("recovery >= 98%", Clause("recovery >= 98%", None, "recovery", 0.98, None)),
        ("drop<=1pt", Clause("drop<=1pt", None, "drop", 0.01, None)),
        ("drop<=0.5pt @90%", Clause("drop<=0.5pt @90%", None, "drop", 0.005, 0.9)),
        ("drop<=-1pt", Clause("drop<=-1pt", None, "drop", -0.01, None)),
        ("ratio<=1.05", Clause("ratio<=1.05", None, "ratio", 1.05, None)),
        ("arc_easy: drop <= 0 pt @ 99.5 %", Clause("arc_easy: drop <= 0 pt @ 99.5 %", "arc_easy", "drop", 0.0, 0.995)),
    ],
)
def test_a_clause_is_read(text: str, clause: Clause) -> None:
    (found,) = parse_gate(text).clauses
    assert found.limit == pytest.approx(clause.limit) and found.confidence == pytest.approx(clause.confidence)
    assert (found.text, found.task, found.quantity) == (clause.text, clause.task, clause.quantity)


def test_clauses_are_separated_by_semicolons() -> None:
    found = parse_gate("arc_easy: drop<=1pt;mmlu:recovery>=0.97 @90%; ratio<=1.1").clauses
    assert [(one.task, one.quantity) for one in found] == [("arc_easy", "drop"), ("mmlu", "recovery"), (None, "ratio")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "character 1: a clause is empty"),
        ("drop<=1pt;", "character 11: a clause is empty"),
        ("drop<=1", "percentage points: write 'drop<=1pt'"),
        ("drop<=1%", "percentage points: write 'drop<=1pt'"),
        ("drop>=1pt", "drop is followed by <=, not by >="),
        ("recovery=0.98", "recovery is followed by >=, not by ="),
        ("recovery>=98", "would always hold or never"),
        ("drop<=101pt", "would always hold or never"),
        ("ratio<=0", "would always hold or never"),
        ("ratio<=5%", "ratio has no unit '%'"),
        ("recovery>=0.9pt", "recovery has no unit 'pt'"),
        ("drop<=1pt @95", "'@95' is no confidence"),
        ("drop<=1pt @0.95%", "'@0.95%' is no confidence"),
        ("drop<=1pt @100%", "'@100%' is no confidence"),
        ("drop<=1pt; accuracy>=0.5", "character 12: 'accuracy' is none of"),
        ("drop<=1pt drop<=2pt", "'drop<=2pt' cannot be read after 'drop<=1pt'"),
        ("drop<=nanpt", "cannot be read"),
        ("; rm -rf", "character 1: a clause is empty"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_gate(text)
    assert words in failure.value.message
    assert failure.value.hint


@pytest.mark.parametrize(
    ("text", "tasks", "words"),
    [
        ("ratio<=1.05", ["arc_easy"], "needs perplexity"),
        ("drop<=1pt", ["perplexity"], "needs a task with a score"),
        ("mmlu: drop<=1pt", ["arc_easy"], "is about mmlu"),
        ("perplexity: drop<=1pt", ["perplexity", "mmlu"], "perplexity has no drop"),
        ("mmlu: ratio<=1.1", ["perplexity", "mmlu"], "mmlu has no ratio"),
    ],
)
def test_a_clause_about_nothing_that_is_measured_is_refused(text: str, tasks: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_gate(text).check(tasks)
    parse_gate("mmlu: drop<=1pt; ratio<=1.05").check(["mmlu", "perplexity"])


def test_an_interval_of_too_few_windows_is_refused_before_anything_is_measured() -> None:
    asks = parse_gate("ratio<=1.05 @95%")
    with pytest.raises(ConfigError, match="4 windows are too few") as refused:
        asks.check_windows(4)
    assert refused.value.hint is not None and "--limit 5" in refused.value.hint
    for limit in (5, None):
        asks.check_windows(limit)
    parse_gate("ratio<=1.05; mmlu: drop<=1pt @95%").check_windows(1)


@pytest.mark.parametrize(("lost", "passed"), [(0, True), (9, True), (10, True), (11, False)])
def test_the_measured_drop_may_reach_the_limit_and_not_pass_it(lost: int, passed: bool) -> None:
    found = parse_gate("drop<=1pt").decide({"t": pairs(1000, lost, 0, 810)})
    assert found.passed is passed
    assert f"drop {lost / 10:.2f} pt" in found.reason and "at most 1 pt" in found.reason


@pytest.mark.parametrize(("lost", "passed"), [(16, True), (17, False)])
def test_the_measured_recovery_may_reach_the_limit(lost: int, passed: bool) -> None:
    assert parse_gate("recovery>=0.98").decide({"t": pairs(1000, lost, 0, 800)}).passed is passed


def test_with_a_confidence_the_worse_bound_has_to_hold() -> None:
    few, many = pairs(100, 1, 1, 60), pairs(10_000, 100, 100, 6000)
    for text in ("drop<=1pt", "recovery>=0.98"):
        assert parse_gate(text).decide({"few": few, "many": many}).passed
        found = parse_gate(f"{text} @95%").decide({"few": few, "many": many})
        assert [(verdict.task, verdict.passed) for verdict in found.verdicts] == [("few", False), ("many", True)]
        assert not found.passed and found.reason.startswith("few: ") and "95 % interval" in found.reason
    bound = few.difference_interval(0.95).low
    assert not parse_gate(f"drop<={-100 * bound - 0.01:.4f}pt @95%").decide({"few": few}).passed
    assert parse_gate(f"drop<={-100 * bound + 0.01:.4f}pt @95%").decide({"few": few}).passed


def test_a_clause_judges_its_task_alone_and_perplexity_by_ratio() -> None:
    measured = {"good": pairs(100, 0, 0, 60), "bad": pairs(100, 30, 0, 60)}
    gate = parse_gate("good: drop<=1pt; ratio<=1.05")
    assert gate.decide(measured, perplexity(0.2)).passed
    worse = gate.decide(measured, perplexity(1.0))
    assert not worse.passed and "ratio 1.1102" in worse.reason
    assert not parse_gate("drop<=1pt").decide(measured, perplexity(0.0)).passed


def test_what_cannot_be_judged_does_not_pass() -> None:
    assert not parse_gate("recovery>=0.9").decide({"t": pairs(10, 0, 3, 0)}).passed
    assert not parse_gate("ratio<=1.05").decide({}, perplexity(math.inf)).passed
    assert not parse_gate("ratio<=1.05 @95%").decide({}, perplexity(0.0, windows=3)).passed
    assert parse_gate("ratio<=1.05 @95%").decide({}, perplexity(0.1)).passed
    assert not parse_gate("ratio<=1.05").decide({"t": pairs(10, 0, 0, 5)}).passed
