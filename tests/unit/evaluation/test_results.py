"""The document of an evaluation: every figure where the issue puts it, and nothing that is not JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from edgetool.errors import BadInput
from edgetool.evaluation.gate import Verdict, parse_gate
from edgetool.evaluation.results import Measured, MeasuredPerplexity, document, shown
from edgetool.evaluation.sequential import Stopped
from edgetool.evaluation.statistics import Interval
from tests.fakes.evaluated import PROFILE, both, both_perplexities, perplexity, subjects, task


def made(tasks, ppl=None, gate=None, against=True):  # type: ignore[no-untyped-def]
    other = {"model": "demo"} if against else None
    return document(PROFILE, {"model": "out"}, other, tasks, ppl, gate and parse_gate(gate), 3.5, 7)


def test_two_models_have_both_scores_the_difference_its_interval_and_the_flips() -> None:
    entry = made({"arc_easy": both(lost=6, gained=2)})["tasks"]["arc_easy"]
    assert (entry["metric"], entry["n"]) == ("acc", 100)
    assert (entry["original"], entry["quantized"], entry["score"]) == (0.6, 0.56, 0.56)
    assert entry["difference"] == pytest.approx(-0.04)
    low, high = entry["ci95"]
    assert -0.15 < low < -0.04 < high < 0.05
    assert entry["flips"] == {"lost": 6, "gained": 2}
    assert entry["flipped"]["lost"] == [f"arc_easy:{index}" for index in range(6)]
    assert entry["flipped"]["gained"] == ["arc_easy:60", "arc_easy:61"]
    assert entry["mcnemar_p"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert entry["recovery"] == pytest.approx(56 / 60)
    assert entry["recovery_ci95"][0] < 56 / 60 < entry["recovery_ci95"][1]
    assert "groups" not in entry
    sides = entry["sides"]
    assert sides["against"]["value"] == 0.6 and sides["model"]["ci95"][0] < 0.56 < sides["model"]["ci95"][1]
    assert sides["model"]["tokens_per_s"] == 50.0


def test_one_model_alone_has_its_score_and_nothing_beside_it() -> None:
    found = made({"arc_easy": Measured(task("arc_easy", [1.0, 0.0, 1.0, 1.0]))}, against=False)
    entry = found["tasks"]["arc_easy"]
    assert entry["score"] == 0.75
    assert [entry[key] for key in ("original", "quantized", "difference", "ci95")] == [None] * 4
    assert "flips" not in entry and list(entry["sides"]) == ["model"]
    assert found["against"] is None and found["gate"] is None
    assert found["outcomes"]["arc_easy"]["original"] is None


def test_perplexity_has_ratio_divergence_and_how_it_was_measured() -> None:
    entry = made({}, both_perplexities())["tasks"]["perplexity"]
    assert entry["ratio"] == pytest.approx(entry["quantized"] / entry["original"])
    assert entry["ratio_ci95"][0] < entry["ratio"] < entry["ratio_ci95"][1]
    assert (entry["kl_divergence"], entry["top1_agreement"], entry["kl_tokens"]) == (0.02, 0.93, 80)
    assert (entry["tokens"], entry["words"], entry["context"], entry["stride"]) == (80, 70, 16, 10)
    assert entry["word_perplexity"] == pytest.approx(math.exp(both_perplexities().quantized.nll / 70))
    alone = made({}, MeasuredPerplexity(perplexity(2.0)), against=False)["tasks"]["perplexity"]
    assert alone["score"] == pytest.approx(perplexity(2.0).perplexity)
    assert [alone[key] for key in ("original", "quantized", "ratio", "kl_divergence")] == [None] * 4


def test_subjects_are_compared_each_for_itself() -> None:
    groups = made({"mmlu": subjects(12)})["tasks"]["mmlu"]["groups"]
    assert [(name, one["n"]) for name, one in groups.items()][:2] == [("mmlu_law", 4), ("mmlu_art", 4)]
    assert groups["mmlu_law"]["difference"] == 0.5 and groups["mmlu_law"]["flips"] == {"lost": 0, "gained": 2}
    assert groups["mmlu_art"]["difference"] == -0.5
    assert groups["mmlu_law"]["score"] == 1.0
    alone = made({"mmlu": Measured(subjects().quantized)}, against=False)["tasks"]["mmlu"]["groups"]
    assert "difference" not in alone["mmlu_law"] and alone["mmlu_law"]["score_ci95"][1] == 1.0


def test_the_gate_is_decided_with_its_reasons() -> None:
    found = made({"arc_easy": both()}, both_perplexities(), "drop<=1pt; ratio<=1.1")["gate"]
    assert found["expression"] == "drop<=1pt; ratio<=1.1" and found["passed"] is False
    assert found["reason"] == "arc_easy: drop 4.00 pt, at most 1 pt asked"
    assert [(one["task"], one["passed"]) for one in found["verdicts"]] == [("arc_easy", False), ("perplexity", True)]
    assert made({"arc_easy": both()}, None, "drop<=4pt")["gate"]["passed"] is True


def test_an_early_verdict_stands_and_only_an_interval_that_may_be_peeked_at_is_shown() -> None:
    verdict = Verdict("arc_easy", "drop<=10pt", False, "arc_easy: decided early")
    stopped = Stopped((verdict,), Interval(-0.2, 0.1), 100, 2376, "the whole run")
    found = made({"arc_easy": replace(both(), stopped=stopped)}, None, "drop<=10pt")
    entry = found["tasks"]["arc_easy"]
    assert found["gate"]["passed"] is False and found["gate"]["reason"] == "arc_easy: decided early"
    assert entry["ci95"] == [-0.2, 0.1]
    assert entry["mcnemar_p"] is None and entry["recovery_ci95"] is None
    assert (entry["sequential"]["questions"], entry["sequential"]["of"]) == (100, 2376)
    assert made({"arc_easy": both()}, None, "drop<=10pt")["gate"]["passed"] is True


def test_what_is_no_number_is_null_and_said() -> None:
    broken = replace(perplexity(2.0), windows=tuple(replace(one, nll=math.inf) for one in perplexity(2.0).windows))
    found = made({}, MeasuredPerplexity(broken, perplexity(2.0)), "ratio<=2 @95%")
    json.dumps(found, allow_nan=False)
    entry = found["tasks"]["perplexity"]
    assert entry["quantized"] is None and entry["original"] > 1 and "not numbers" in entry["note"]
    assert found["gate"]["passed"] is False


def test_what_is_printed_has_no_outcomes_and_is_json() -> None:
    found = made({"mmlu": subjects()}, both_perplexities(), "drop<=1pt")
    assert set(found["outcomes"]) == {"mmlu", "perplexity"}
    printed = shown({"schema": "x", "ok": True, **found})
    assert "outcomes" not in printed and json.loads(json.dumps(printed, allow_nan=False)) == printed
    assert printed["profile"]["hash"] == "c0ffee" and printed["seconds"] == 3.5


def test_other_questions_or_a_score_that_is_not_its_samples_mean_are_refused() -> None:
    one, other = both(), task("arc_easy", [1.0] * 99)
    with pytest.raises(BadInput, match="same questions"):
        made({"arc_easy": replace(one, quantized=other)})
    with pytest.raises(ValueError, match="mean of its samples"):
        made({"arc_easy": replace(one, quantized=replace(one.quantized, value=0.9))})
