"""Intervals, exact test and flips against scipy, naive loops and simulations of what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgetool.errors import BadInput
from edgetool.evaluation.records import PerplexityScores, Sample, WindowLoss
from edgetool.evaluation.statistics import Pairs, PerplexityPair, mcnemar, mean_interval, pair, wilson


def pairs_of(original: list[float], quantized: list[float], seed: int = 0) -> Pairs:
    ids = tuple(f"q{index}" for index in range(len(original)))
    return Pairs(ids, ("task",) * len(ids), np.array(original, float), np.array(quantized, float), seed)


def four_cells(both: int, lost: int, gained: int, neither: int, seed: int = 0) -> Pairs:
    return pairs_of(
        [1] * (both + lost) + [0] * (gained + neither), [1] * both + [0] * lost + [1] * gained + [0] * neither, seed
    )


def samples(scores: dict[str, float], group: str = "task") -> tuple[Sample, ...]:
    return tuple(Sample(name, group, score) for name, score in scores.items())


@given(st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_of_flips_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(7000, 6800) == pytest.approx(stats.binomtest(6800, 13800, 0.5).pvalue, rel=1e-9)
    assert mcnemar(3000, 0) == 0.0 or mcnemar(3000, 0) < 1e-300


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 7), (3, 7), (7, 7), (412, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(right: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = wilson(right, n, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    scores = [1.0] * right + [0.0] * (n - right)
    assert mean_interval(scores, confidence) == found


def test_the_bootstrap_of_graded_scores_is_a_naive_loop_over_resampled_pairs() -> None:
    random = np.random.default_rng(5)
    original = random.random(40)
    quantized = np.clip(original + random.normal(-0.05, 0.1, 40), 0, 1)
    found = pairs_of(list(original), list(quantized))
    rows = random.integers(0, 40, (20_000, 40))
    differences = (quantized - original)[rows].mean(1)
    ratios = quantized[rows].mean(1) / original[rows].mean(1)
    interval, recovery = found.difference_interval(0.95), found.recovery_interval(0.95)
    assert recovery is not None
    # two independent sets of 10,000 and 20,000 draws: their 2.5 % points differ by about 2 % of the interval's width
    width = interval.high - interval.low
    assert (interval.low, interval.high) == pytest.approx(
        tuple(np.quantile(differences, [0.025, 0.975])), abs=0.06 * width
    )
    width = recovery.high - recovery.low
    assert (recovery.low, recovery.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.06 * width)


@pytest.mark.parametrize(("n", "loses", "gains"), [(20, 0.02, 0.01), (100, 0.06, 0.05)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(n: int, loses: float, gains: float) -> None:
    random = np.random.default_rng(n)
    runs = 200
    hits = 0
    for run in range(runs):
        draw = random.random(n)
        change = np.where(draw < loses, -1, np.where(draw < loses + gains, 1, 0))
        original = np.where(change == 0, random.random(n) < 0.6, change < 0).astype(float)
        found = pairs_of(list(original), list(original + change), run).difference_interval(0.95)
        hits += found.low <= gains - loses <= found.high
    # 95 % of 200 runs is 190 with a standard deviation of 3.1; 178 is 4 of those below
    assert hits >= 178


def test_no_flips_among_few_questions_is_no_certainty() -> None:
    few, many = four_cells(3, 0, 0, 2).difference_interval(0.95), four_cells(3000, 0, 0, 2000).difference_interval(0.95)
    assert few.low < -0.1 and few.high > 0.1
    assert -0.001 < many.low < 0 < many.high < 0.001


def test_every_interval_holds_what_was_measured_for_all_small_tables() -> None:
    for cells in itertools.product(range(4), repeat=4):
        if not sum(cells):
            continue
        found = four_cells(*cells)
        interval = found.difference_interval(0.95)
        assert interval.low <= found.difference <= interval.high, cells
        recovery, bounds = found.recovery, found.recovery_interval(0.95)
        assert (recovery is None) == (bounds is None) == (cells[0] + cells[1] == 0)
        if recovery is not None and bounds is not None:
            assert bounds.low <= recovery <= bounds.high, cells


def test_more_confidence_is_a_wider_interval_and_a_seed_gives_the_same_one_again() -> None:
    found = four_cells(50, 10, 5, 35)
    widths = [
        found.difference_interval(level).high - found.difference_interval(level).low for level in (0.8, 0.9, 0.99)
    ]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert found.difference_interval(0.9) == four_cells(50, 10, 5, 35).difference_interval(0.9)
    assert found.difference_interval(0.9) != four_cells(50, 10, 5, 35, seed=1).difference_interval(0.9)


def test_flips_name_the_questions_in_both_directions() -> None:
    before = samples({"a": 1, "b": 0, "c": 1, "d": 0, "e": 1})
    after = samples({"e": 0, "d": 0, "c": 1, "b": 1, "a": 0})  # in another order
    found = pair(before, after)
    assert found.flips.lost == ("a", "e")
    assert found.flips.gained == ("b",)
    assert found.difference == pytest.approx(-0.2)
    assert found.recovery == pytest.approx(2 / 3)
    assert found.mcnemar_p == 1.0


def test_graded_scores_have_flips_and_no_exact_test() -> None:
    found = pair(samples({"a": 0.5, "b": 0.2}), samples({"a": 0.4, "b": 0.9}))
    assert (found.flips.lost, found.flips.gained) == (("a",), ("b",))
    assert found.mcnemar_p is None


def test_groups_are_compared_each_for_itself() -> None:
    before = (*samples({"a": 1, "b": 1}, "law"), *samples({"c": 0}, "art"))
    after = (*samples({"a": 0, "b": 1}, "law"), *samples({"c": 1}, "art"))
    groups = pair(before, after).by_group()
    assert list(groups) == ["law", "art"]
    assert groups["law"].difference == -0.5 and groups["law"].flips.lost == ("a",)
    assert groups["art"].difference == 1.0 and groups["art"].recovery is None


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            (Sample("a", "t", 1), Sample("b", "t", 1)),
            (Sample("a", "t", 1),),
            "'b' has no answer of the quantised model",
        ),
        ((Sample("a", "t", 1),), (Sample("a", "t", 1), Sample("b", "t", 0)), "'b' has no answer of the original"),
        ((Sample("a", "t", 1), Sample("a", "t", 0)), (Sample("a", "t", 1),), "both called 'a'"),
        ((), (Sample("a", "t", 1),), "nothing to compare"),
    ],
)
def test_answers_that_cannot_be_paired_are_refused_by_name(
    before: tuple[Sample, ...], after: tuple[Sample, ...], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        pair(before, after)


def perplexity(losses: list[float], tokens: list[int]) -> PerplexityScores:
    windows = tuple(WindowLoss(nll, count) for nll, count in zip(losses, tokens, strict=True))
    return PerplexityScores(windows, 100, 500, 16, 8, "first window", "0" * 64)


def test_the_ratio_of_perplexities_is_that_of_the_whole_text() -> None:
    tokens = [16, 8, 8, 8, 8, 3]
    before, after = perplexity([30, 20, 21, 19, 20, 8], tokens), perplexity([31, 20, 22, 19, 21, 9], tokens)
    found = PerplexityPair(before, after)
    assert found.ratio == pytest.approx(after.perplexity / before.perplexity, rel=1e-12)
    interval = found.ratio_interval(0.95)
    assert interval is not None and found.ratio is not None
    assert 1.0 < interval.low < found.ratio < interval.high < math.exp(1 / 3)


def test_the_ratios_interval_is_a_naive_loop_over_resampled_windows() -> None:
    random = np.random.default_rng(3)
    tokens = random.integers(20, 60, 30)
    before = tokens * random.normal(3, 0.2, 30)
    after = before + tokens * random.normal(0.05, 0.05, 30)
    found = PerplexityPair(
        perplexity(list(before), list(tokens)), perplexity(list(after), list(tokens))
    ).ratio_interval(0.95)
    rows = random.integers(0, 30, (20_000, 30))
    ratios = np.exp((after - before)[rows].sum(1) / tokens[rows].sum(1))
    assert found is not None
    # two independent sets of draws, as above
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.06 * (found.high - found.low)
    )


def test_few_windows_have_a_ratio_and_no_interval_and_other_tokens_have_neither() -> None:
    few = PerplexityPair(perplexity([9, 9], [4, 4]), perplexity([10, 9], [4, 4]))
    assert few.ratio == pytest.approx(math.exp(1 / 8)) and few.ratio_interval(0.95) is None
    other = PerplexityPair(perplexity([9, 9], [4, 4]), perplexity([10, 9], [4, 5]))
    assert other.ratio is None and other.ratio_interval(0.95) is None
    broken = PerplexityPair(perplexity([9.0] * 6, [4] * 6), perplexity([math.inf] + [9.0] * 5, [4] * 6))
    assert broken.ratio == math.inf and broken.ratio_interval(0.95) is None


def test_perplexity_is_normalised_by_tokens_words_and_bytes() -> None:
    found = perplexity([30.0, 20.0], [16, 8])
    assert found.perplexity == pytest.approx(math.exp(50 / 24))
    assert found.word_perplexity == pytest.approx(math.exp(50 / 100))
    assert found.bits_per_byte == pytest.approx(50 / 500 / math.log(2))
    assert perplexity([1e6], [1]).perplexity == math.inf
