"""Finished runs: what is written is read again, and runs that asked otherwise are not compared."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetool.errors import BadInput, ConfigError
from edgetool.evaluation.compare import compare, first_difference, read_results, write_results
from edgetool.evaluation.results import Measured, MeasuredPerplexity, document
from tests.fakes.evaluated import PROFILE, both, both_perplexities, perplexity, subjects, task


def written(path: Path, tasks: dict[str, Measured], ppl: MeasuredPerplexity | None = None, changed: Any = ()) -> Path:
    """A finished run of MODEL alone."""
    alone = {name: Measured(one.quantized) for name, one in tasks.items()}
    facts = {"model": path.name}
    path.mkdir()
    found = document(PROFILE | dict(changed), facts, None, alone, ppl and MeasuredPerplexity(ppl.quantized), None, 1, 7)
    write_results(path / "results.json", found)
    return path


def swapped(measured: Measured) -> Measured:
    assert measured.original is not None
    return Measured(measured.original)


def test_two_runs_of_one_model_each_compare_as_one_run_of_both(tmp_path: Path) -> None:
    tasks = {"arc_easy": both(), "mmlu": subjects()}
    ppl = both_perplexities()
    assert ppl.original is not None
    originals = {name: swapped(one) for name, one in tasks.items()}
    first = written(tmp_path / "demo", originals, MeasuredPerplexity(ppl.original))
    second = written(tmp_path / "out", tasks, ppl)
    found = compare(first / "results.json", second, "drop<=5pt", 7)
    together = document(
        PROFILE, {"model": "out"}, {"model": "demo"}, tasks, MeasuredPerplexity(ppl.quantized, ppl.original), None, 0, 7
    )
    assert found["tasks"] == together["tasks"]
    assert found["gate"]["passed"] is True
    assert (found["model"], found["against"]) == ({"model": "out"}, {"model": "demo"})
    backwards = compare(second, first, "drop<=5pt", 7)["tasks"]["arc_easy"]
    assert backwards["difference"] == -found["tasks"]["arc_easy"]["difference"]
    assert backwards["flipped"]["lost"] == found["tasks"]["arc_easy"]["flipped"]["gained"]


def test_of_a_run_of_two_models_the_measured_one_is_compared(tmp_path: Path) -> None:
    for name, lost, change in (("a", 6, 0.05), ("b", 9, 0.1)):
        tasks, ppl = {"arc_easy": both(lost=lost)}, both_perplexities(change)
        run = document(PROFILE, {"model": name}, {"model": "demo"}, tasks, ppl, None, 1, 7)
        write_results(tmp_path / f"{name}.json", run)
    found = compare(tmp_path / "a.json", tmp_path / "b.json", None, 7)
    assert found["against"] == {"model": "a"} and found["tasks"]["arc_easy"]["flips"] == {"lost": 3, "gained": 0}
    assert found["tasks"]["perplexity"]["ratio"] == pytest.approx(math.exp(0.05 * 1.035))
    assert found["tasks"]["perplexity"]["kl_divergence"] is None


def test_a_document_is_read_as_it_was_written_with_long_lists_on_a_line(tmp_path: Path) -> None:
    found = document(
        PROFILE, {"model": "ö <b>"}, {"model": "demo"}, {"mmlu": subjects(300)}, both_perplexities(), None, 1.0, 7
    )
    write_results(tmp_path / "results.json", found)
    read = read_results(tmp_path)
    assert {key: value for key, value in read.items() if key not in ("schema", "ok")} == found
    assert (read["schema"], read["ok"]) == ("edgetool.eval/1", True)
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert sum("mmlu_law:297" in line for line in lines if '"ids"' in line) == 1


def test_an_infinite_loss_comes_back(tmp_path: Path) -> None:
    fine = perplexity(2.0)
    broken = replace(fine, windows=(replace(fine.windows[0], nll=math.inf), *fine.windows[1:]))
    first = written(tmp_path / "a", {}, MeasuredPerplexity(fine))
    second = written(tmp_path / "b", {}, MeasuredPerplexity(broken))
    assert compare(first, second, "ratio<=2", 7)["gate"]["passed"] is False
    assert compare(first, first, "ratio<=1", 7)["gate"]["passed"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 8}, r"profile\.seed is 7 in .* and 8 in"),
        ({"tasks": {"arc_easy": {"version": 2.0}, "mmlu": {"version": [1, 2]}}}, r"profile\.tasks\.arc_easy\.version"),
        ({"tasks": {"arc_easy": {"version": 1.0}, "mmlu": {"version": [1, 3]}}}, r"profile\.tasks\.mmlu\.version\[1\]"),
        ({"limit": 5}, r"profile\.limit is null in .* and 5 in"),
        ({"hash": "decaf"}, r"profile\.hash"),
    ],
)
def test_runs_that_asked_otherwise_are_not_compared_and_the_first_difference_is_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    first = written(tmp_path / "a", {"arc_easy": both()})
    second = written(tmp_path / "b", {"arc_easy": both()}, changed=change)
    with pytest.raises(BadInput, match=words):
        compare(first, second, None, 7)


def test_other_tasks_or_other_questions_are_not_compared(tmp_path: Path) -> None:
    first = written(tmp_path / "a", {"arc_easy": both(), "boolq": both(name="boolq")})
    with pytest.raises(BadInput, match="b has no task boolq"):
        compare(first, written(tmp_path / "b", {"arc_easy": both()}), None, 7)
    fewer = written(tmp_path / "c", {"arc_easy": Measured(task("arc_easy", [1.0] * 50)), "boolq": both(name="boolq")})
    with pytest.raises(BadInput, match="same questions: 'arc_easy:50'"):
        compare(first, fewer, None, 7)
    with pytest.raises(ConfigError, match="needs perplexity"):
        compare(first, first, "ratio<=1.1", 7)
    with pytest.raises(ConfigError, match="gate, character 1"):
        compare(first, first, "ratio", 7)


def damaged(document_: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    found = copy.deepcopy(document_)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return found


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        (("outcomes", "arc_easy", "quantized"), [1.0], "arc_easy is damaged"),
        (("outcomes", "arc_easy", "quantized"), [1.0] * 100, "not that of its outcomes"),
        (("outcomes", "arc_easy", "quantized"), ["x"] * 100, "arc_easy is damaged"),
        (("outcomes", "arc_easy"), None, "arc_easy is damaged"),
        (("outcomes",), {}, "arc_easy is damaged"),
        (("outcomes",), None, "outcomes is missing"),
        (("tasks", "arc_easy"), 3, "arc_easy is damaged"),
        (("tasks", "arc_easy", "sides", "model", "metrics"), 3, "arc_easy is damaged"),
        (("tasks", "arc_easy", "sides", "model", "version"), ["x"], "arc_easy is damaged"),
        (("tasks", "arc_easy", "sides", "model", "generated_tokens"), ["x"], "arc_easy is damaged"),
        (("tasks", "arc_easy", "sides", "model", "generated_tokens"), float("inf"), "arc_easy is damaged"),
        (("profile",), None, "profile is missing"),
        (("schema",), "edgetool.bench/1", "its schema is 'edgetool.bench/1'"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, path: tuple[str, ...], to: Any, words: str) -> None:
    good = written(tmp_path / "good", {"arc_easy": both()})
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(damaged(json.loads((good / "results.json").read_text()), *path, to=to)))
    with pytest.raises(BadInput, match=words):
        compare(good, bad, None, 7)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_what_is_no_result_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"results\.json"):
        read_results(tmp_path)
    with pytest.raises(BadInput, match="No such file"):
        read_results(tmp_path / "nowhere")


def test_the_first_difference_is_found_at_any_depth() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ("profile.a[1].b", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("profile.a", [1], [1, 2])
    assert first_difference({"hash": 1, "z": 1}, {"hash": 2, "z": 2}) == ("profile.z", 1, 2)
