"""Upstream's tasks on rows of our own and a tiny model: scores, subsets, groups, logs, by oracles of their own."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetool.errors import BadInput, ResourceUnavailable, Stopped
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.data import examine
from edgetool.evaluation.harness import measure
from edgetool.evaluation.records import TaskScores
from edgetool.evaluation.stock_tasks import Question, StockTask, load
from edgetool.evaluation.tasks import MMLU_SUBJECTS, find_tasks
from edgetool.progress import NullProgress, RecordingProgress
from tests.fakes import question_rows as rows
from tests.fakes.tiny_models import make_tiny_model

Loading = Callable[..., StockTask]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Data directory, cache, and a tiny model's directory."""
    top = tmp_path_factory.mktemp("harness")
    model = make_tiny_model(
        top / "model", "llama", hidden_size=32, layers=1, dtype="float32", max_position_embeddings=8192
    )
    return rows.write_data(top / "data", MMLU_SUBJECTS), top / "cache", model


@pytest.fixture(scope="module")
def lm(places: tuple[Path, Path, Path]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(places[2]), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def stock(places: tuple[Path, Path, Path]) -> Loading:
    data, cache, _ = places
    subjects: dict[str, StockTask] = {}  # loading 57 of them takes seconds

    def loaded(name: str, directory: Path = data, **options: Any) -> StockTask:
        if name == "mmlu":
            return subjects.get(name) or subjects.setdefault(name, read(name, directory, **options))
        return read(name, directory, **options)

    def read(name: str, directory: Path, **options: Any) -> StockTask:
        found, problems = examine(find_tasks([name]), directory, num_fewshot=options.get("num_fewshot"))
        assert problems == []
        return load(found[name], cache, **options)

    return loaded


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    with Answers.open(tmp_path / "answers.jsonl") as opened:
        yield opened


def scored(stock: StockTask, lm: Any, answers: Answers, **options: Any) -> TaskScores:
    return measure(stock, lm, answers, NullProgress(), title="tiny", **options)


def log_likelihood(lm: Any, context: str, continuation: str) -> float:
    """By one pass over one text without padding, in float64 behind the model."""
    whole = lm.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    start = len(lm.tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = lm.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(start, len(whole)))


def best(lm: Any, prompt: str, choices: list[str], by_length: bool) -> int:
    values = [log_likelihood(lm, prompt, f" {choice}") / (len(choice) if by_length else 1) for choice in choices]
    return values.index(max(values))


@pytest.mark.parametrize(("name", "by_length"), [("arc_easy", False), ("arc_challenge", True)])
def test_each_question_is_right_where_the_likeliest_choice_is(
    stock: Loading, lm: Any, answers: Answers, name: str, by_length: bool
) -> None:
    found = scored(stock(name), lm, answers)
    expected = {
        f"row-{number}": float(best(lm, f"Question: {text}\nAnswer:", choices, by_length) == answer)
        for number, (text, choices, answer) in enumerate(rows.THINGS)
    }
    assert {sample.id: sample.score for sample in found.samples} == expected
    assert found.value == pytest.approx(sum(expected.values()) / 6, abs=1e-12)
    assert (found.n, found.metric, found.groups) == (6, "acc_norm" if by_length else "acc", {})
    other = {
        f"row-{number}": float(best(lm, f"Question: {text}\nAnswer:", choices, not by_length) == answer)
        for number, (text, choices, answer) in enumerate(rows.THINGS)
    }
    assert {sample.id: sample.more["acc" if by_length else "acc_norm"] for sample in found.samples} == other


def test_boolqs_answers_are_upstreams_labels_the_right_way_round(stock: Loading, lm: Any, answers: Answers) -> None:
    found = scored(stock("boolq"), lm, answers)
    expected = [
        float(
            (best(lm, f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], False) == 1)
            == row["answer"]
        )
        for row in rows.boolq()
    ]
    assert [sample.score for sample in found.samples] == expected
    assert [sample.id for sample in found.samples] == [f"boolq:{index}" for index in range(5)]


def test_a_generated_number_is_found_as_upstream_finds_it(stock: Loading, answers: Answers, tmp_path: Path) -> None:
    from lm_eval.api.model import LM

    class Says(LM):
        """Says the right number in the asked form, in another form, a wrong one, and nothing."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            forms = ["So there are {}. The answer is {}.", "that makes {}", "The answer is 1{}.", ""]
            pears = [int(re.findall(r"Ann has (\d+)", request.args[0])[-1]) + 3 for request in requests]
            return [form.format(*[number] * 2) for form, number in zip(forms, pears, strict=True)]

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    log = tmp_path / "log.jsonl"
    found = scored(stock("gsm8k_cot"), Says(), answers, log=log)
    assert [sample.score for sample in found.samples] == [1, 0, 0, 0]
    assert [sample.more["exact_match,flexible-extract"] for sample in found.samples] == [1, 1, 0, 0]
    assert found.value == found.metrics["exact_match,strict-match"] == 0.25
    assert found.metrics["exact_match,flexible-extract"] == 0.5
    assert found.generated_tokens is None  # nobody knows this model's tokens
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 4 * 2  # both of upstream's ways to read an answer
    assert lines[0]["id"] == "gsm8k_cot:0"
    assert lines[0]["arguments"][0][0].startswith("Q: There are 15 trees")
    assert lines[0]["arguments"][0][0].endswith("Q: Ann has 2 pears and gets 3 more. How many has she?\nA:")
    assert lines[0]["resps"] == [["So there are 5. The answer is 5."]]


def test_mmlu_is_the_mean_over_all_questions_with_each_subject_beside_it(
    stock: Loading, lm: Any, answers: Answers
) -> None:
    found = scored(stock("mmlu"), lm, answers, limit=2)
    assert found.n == 57 * 2
    assert found.value == pytest.approx(sum(sample.score for sample in found.samples) / found.n, abs=1e-12)
    assert set(found.groups) == {f"mmlu_{subject}" for subject in MMLU_SUBJECTS}
    for name, value in found.groups.items():
        assert value == sum(sample.score for sample in found.samples if sample.group == name) / 2
    subject = "virology"
    prompt = "The following are multiple choice questions (with answers) about virology.\n\n"
    for row, sample in zip(
        rows.mmlu(subject, 2), [sample for sample in found.samples if sample.group == "mmlu_virology"], strict=True
    ):
        listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
        right = best(lm, f"{prompt}{row['question']}\n{listed}Answer:", list("ABCD"), False) == row["answer"]
        assert sample.score == float(right)
    assert "mmlu_stem acc,none" in found.metrics


def test_shuffled_choices_stay_with_their_answers(stock: Loading, lm: Any, answers: Answers, tmp_path: Path) -> None:
    # upstream shuffles GPQA's choices each time that it looks at the rows, unless its library remembers how
    task, log = stock("gpqa"), tmp_path / "log.jsonl"
    found = scored(task, lm, answers, log=log)
    assert found.task == "gpqa"
    assert [sample.id for sample in found.samples] == [f"rec{number}" for number in range(6)]
    right = {text: choices[answer] for text, choices, answer in rows.THINGS}
    places = set()
    for line in map(json.loads, log.read_text().splitlines()):
        place = "ABCD".index(line["target"].strip("()"))
        prompt = line["arguments"][0][0]
        assert f"({'ABCD'[place]}) {right[line['doc']['Question']]}\n" in prompt
        places.add(place)
    assert len(places) > 1  # they are shuffled
    assert scored(stock("gpqa"), lm, answers).samples == found.samples  # and in the same way the next time


def test_a_limit_asks_the_first_questions_and_a_longer_run_only_the_rest(
    stock: Loading, lm: Any, answers: Answers
) -> None:
    task, progress = stock("arc_easy"), RecordingProgress()
    few = scored(task, lm, answers, limit=2)
    assert [sample.id for sample in few.samples] == ["row-0", "row-1"]
    everything = measure(task, lm, answers, progress, title="tiny")
    assert everything.samples[:2] == few.samples
    asked_now = sum(steps for kind, _, steps in progress.events if kind == "advance")
    assert asked_now == 4 * 4
    again = measure(task, lm, answers, progress, title="tiny")
    assert again.samples == everything.samples
    assert again.value == everything.value
    assert again.seconds == 0


def test_chosen_questions_score_as_they_do_among_all(stock: Loading, lm: Any, answers: Answers) -> None:
    everything = {sample.id: sample for sample in scored(stock("arc_easy"), lm, answers).samples}
    task = stock("arc_easy")
    chosen = [task.questions()[index] for index in (5, 0, 3)]
    some = scored(task, lm, answers, only=chosen)
    assert {sample.id: sample for sample in some.samples} == {
        question.id: everything[question.id] for question in chosen
    }


def test_chosen_questions_of_mmlu_may_leave_subjects_out(stock: Loading, lm: Any, answers: Answers) -> None:
    task = stock("mmlu")
    chosen = [question for question in task.questions() if question.subtask in ("mmlu_anatomy", "mmlu_virology")][1:4]
    found = scored(task, lm, answers, only=chosen)
    assert sorted(sample.id for sample in found.samples) == sorted(question.id for question in chosen)
    assert set(found.groups) == {"mmlu_anatomy", "mmlu_virology"}
    assert found.value == pytest.approx(sum(sample.score for sample in found.samples) / 3, abs=1e-12)


def test_ids_of_rows_are_kept_where_they_tell_rows_apart(tmp_path: Path, stock: Loading) -> None:
    twice = [{**row, "id": "same"} for row in rows.lettered()[:2]] + rows.lettered()[2:4]
    rows.write_rows(tmp_path / "arc_easy" / "test.jsonl", twice)
    assert stock("arc_easy", tmp_path).questions(limit=3) == (
        Question("arc_easy", 0, "same"),
        Question("arc_easy", 1, "arc_easy:1"),
        Question("arc_easy", 2, "row-2"),
    )


def test_the_profile_tells_other_rows_examples_and_limits_apart_and_nothing_else(
    stock: Loading, places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    facts = stock("arc_easy").facts(4)
    assert (facts["questions"], facts["num_fewshot"], facts["versions"]) == (4, 0, {"arc_easy": 1.0})
    assert facts == stock("arc_easy").facts(4)
    # the same rows elsewhere, in another cache
    rows.write_rows(tmp_path / "moved" / "arc_easy" / "test.jsonl", rows.lettered())
    found, _ = examine(find_tasks(["arc_easy"]), tmp_path / "moved")
    assert load(found["arc_easy"], tmp_path / "cache").facts(4) == facts
    # a row behind the limit, and one before it
    changed = rows.lettered()
    changed[5]["question"] += " Really?"
    rows.write_rows(tmp_path / "late" / "arc_easy" / "test.jsonl", changed)
    assert stock("arc_easy", tmp_path / "late").facts(4) == facts
    changed[0]["answerKey"] = "B"
    rows.write_rows(tmp_path / "early" / "arc_easy" / "test.jsonl", changed)
    assert stock("arc_easy", tmp_path / "early").facts(4)["rows_sha256"] != facts["rows_sha256"]
    assert stock("arc_easy").facts(3)["rows_sha256"] != facts["rows_sha256"]
    few = stock("mmlu_anatomy", num_fewshot=1).facts()
    assert few["num_fewshot"] == 1
    assert few["config_sha256"] != stock("mmlu_anatomy").facts()["config_sha256"]
    assert stock("arc_challenge").facts(4)["config_sha256"] != facts["config_sha256"]


def test_examples_before_the_question_are_those_of_the_split_for_examples(
    stock: Loading, lm: Any, answers: Answers, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    scored(stock("mmlu_anatomy", num_fewshot=2), lm, answers, limit=1, log=log)
    prompt = json.loads(log.read_text())["arguments"][0][0]
    assert prompt.count("Answer:") == 3
    examples = rows.mmlu("anatomy", 2)
    assert f"{examples[0]['question']}\nA. honey\nB. wax paper\nC. bricks\nD. salt\nAnswer: A\n\n" in prompt


def test_a_chat_template_wraps_the_question_and_a_model_without_one_is_refused(
    stock: Loading, lm: Any, answers: Answers, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    task = stock("arc_easy")
    scored(task, lm, answers, limit=1, chat_template=True, system_prompt="Be brief.", log=log)
    prompt = json.loads(log.read_text())["arguments"][0][0]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion: What do bees make?")
    assert prompt.endswith("<|im_start|>assistant\n")
    template, lm.tokenizer.chat_template = lm.tokenizer.chat_template, None
    try:
        with pytest.raises(BadInput, match="tiny has no chat template"):
            scored(task, lm, answers, limit=1, chat_template=True)
    finally:
        lm.tokenizer.chat_template = template


def test_a_broken_model_is_told_from_a_bad_one(stock: Loading, lm: Any, answers: Answers) -> None:
    weight = lm.model.model.embed_tokens.weight
    kept = weight.detach().clone()
    progress = RecordingProgress()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        measure(stock("arc_easy"), lm, answers, progress, title="tiny")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert [text for kind, text, _ in progress.events if kind == "warn"] == [
        "tiny: 24 answers of arc_easy are NaN: a broken model, a score of chance"
    ]


def test_a_model_with_a_short_context_is_refused_where_it_must_be_and_what_is_cut_is_said_once(
    stock: Loading, lm: Any, places: tuple[Path, Path, Path], answers: Answers
) -> None:
    from lm_eval.models.huggingface import HFLM

    def short(max_length: int) -> Any:
        return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=2, max_length=max_length)

    with pytest.raises(BadInput, match="gsm8k_cot generates up to 256 tokens, and tiny takes 256 with the question"):
        scored(stock("gsm8k_cot"), short(256), answers)
    assert len(answers) == 0
    progress = RecordingProgress()
    measure(stock("arc_easy"), short(16), answers, progress, title="tiny")
    (said,) = [text for kind, text, _ in progress.events if kind == "warn"]
    assert said.startswith("lm-eval: ")
    assert "exceeds model's maximum length (16)" in said


def test_a_stop_ends_a_real_model_between_batches_and_taken_up_it_says_the_same_bit_for_bit(
    stock: Loading, lm: Any, answers: Answers, tmp_path: Path
) -> None:
    stop = threading.Event()

    class Impatient(RecordingProgress):
        def task(self, name: str, total: float, unit: str = "", before: float = 0) -> Any:
            return _Counting(stop)

    task = stock("arc_easy")
    with pytest.raises(Stopped, match=r"tiny: arc_easy"):
        measure(task, lm, answers, Impatient(), title="tiny", stop=stop)
    kept = len(answers)
    assert kept % 3 == 0  # batches of three, whole
    assert 3 <= kept < 24
    # upstream sorts requests by length before it cuts batches, so those that are left fall into the batches as before
    taken_up, in_one_go = tmp_path / "taken_up.jsonl", tmp_path / "in_one_go.jsonl"
    scored(task, lm, answers, log=taken_up)
    with Answers.open(tmp_path / "others.jsonl") as others:
        scored(task, lm, others, log=in_one_go)
    assert taken_up.read_text() == in_one_go.read_text()


class _Counting:
    """A bar after whose fourth step somebody asks for a stop."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._steps = stop, 0

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self._steps += 1
        if self._steps == 4:
            self._stop.set()


def test_upstream_shows_no_bars_of_its_own_and_has_them_again_afterwards(
    stock: Loading, lm: Any, answers: Answers, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    scored(stock("arc_easy"), lm, answers)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "it/s" not in shown.err
    for _ in tqdm(range(2), desc="ours"):
        pass
    assert "ours" in capfd.readouterr().err


def test_local_rows_need_no_network_and_offline_asks_nobody(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found, problems = examine(find_tasks(["arc_easy", "hellaswag"]), places[0])
    assert problems == []
    for data in found.values():
        load(data, tmp_path / "cache")
    hub, problems = examine(find_tasks(["arc_easy", "gpqa"]), None, offline=True)
    assert problems == []
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(ResourceUnavailable, match="arc_easy: allenai/ai2_arc cannot be had from the hub cache"):
        load(hub["arc_easy"], tmp_path / "cache", offline=True)
    assert asked == []


def test_the_working_directory_is_left_alone(
    places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a relative data directory and cache, and a directory here that looks like upstream's dataset
    (tmp_path / "allenai" / "ai2_arc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found, _ = examine(find_tasks(["arc_easy"]), places[0])
    task = load(found["arc_easy"], Path("cache"))
    assert Path.cwd() == tmp_path
    assert len(task.questions()) == 6
    assert (tmp_path / "cache" / "eval" / "arrow").is_dir()
