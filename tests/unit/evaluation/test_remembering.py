"""A model is asked only what it has not answered, in upstream's batches, and a stop or a failure costs one batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from edgetool.errors import Stopped
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.remembering import Remembering
from edgetool.progress import RecordingProgress


class Batches(LM):
    """Computes in batches of three as upstream's models do: `_model_call`, then the hook for each answer of it."""

    def __init__(self, fail_in: int | None = None) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []
        self.batches = 0
        self.fail_in = fail_in

    def _model_call(self, batch: Sequence[Any]) -> list[float]:
        self.batches += 1
        if self.batches == self.fail_in:
            raise RuntimeError("out of luck")
        return [-len(text) - len(more) / 7 for text, more in batch]

    def _model_generate(self, batch: Sequence[Any]) -> list[str]:
        return [text[::-1] for text, _ in batch]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.calls.append([request.args for request in requests])
        found = []
        for first in range(0, len(requests), 3):
            batch = [request.args for request in requests[first : first + 3]]
            for arguments, value in zip(batch, self._model_call(batch), strict=True):
                found.append((value, value < -5))
                self.cache_hook.add_partial("loglikelihood", arguments, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        self.calls.append([request.args for request in requests])
        return [float("nan") for _ in requests]  # and reports nothing to its hook

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.calls.append([request.args for request in requests])
        found = self._model_generate([request.args for request in requests])
        for request, text in zip(requests, found, strict=True):
            if text:  # what could not be answered is not reported, as upstream's endpoints do
                self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


QUESTIONS = [("a context" * number, f" word{number}") for number in range(1, 9)]


def expected(text: str, more: str) -> tuple[float, bool]:
    value = -len(text) - len(more) / 7
    return value, value < -5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_without_known_answers_the_model_gets_upstreams_one_call(path: Path) -> None:
    model = Batches()
    with Answers.open(path) as answers:
        said = Remembering(model, answers, RecordingProgress(), "t").loglikelihood(asked("loglikelihood", *QUESTIONS))
    assert model.calls == [QUESTIONS]
    assert said == [expected(*question) for question in QUESTIONS]


def test_a_second_run_asks_nothing_and_says_the_same_bit_for_bit(path: Path) -> None:
    requests = asked("loglikelihood", *QUESTIONS)
    with Answers.open(path) as answers:
        first = Remembering(Batches(), answers, RecordingProgress(), "t").loglikelihood(requests)
    silent = Batches()
    with Answers.open(path) as answers:
        known = Remembering(silent, answers, RecordingProgress(), "t")
        assert known.loglikelihood(requests) == first
        assert known.seconds == 0
    assert silent.calls == []
    assert all(isinstance(one, tuple) and type(one[0]) is float and type(one[1]) is bool for one in first)


def test_a_failure_keeps_every_batch_before_it_and_the_next_run_asks_the_rest(path: Path) -> None:
    requests = asked("loglikelihood", *QUESTIONS)
    with Answers.open(path) as answers, pytest.raises(RuntimeError, match="out of luck"):
        Remembering(Batches(fail_in=3), answers, RecordingProgress(), "t").loglikelihood(requests)
    again, progress = Batches(), RecordingProgress()
    with Answers.open(path) as answers:
        said = Remembering(again, answers, progress, "t").loglikelihood(requests)
    assert again.calls == [QUESTIONS[6:]]
    assert said == [expected(*question) for question in QUESTIONS]
    # the bar is of all requests, of which two are new
    assert progress.events[0] == ("start", "t", 8)
    assert sum(steps for kind, _, steps in progress.events if kind == "advance") == 2


def test_a_stop_is_heeded_between_batches_with_the_batch_at_hand_kept(path: Path) -> None:
    stop = threading.Event()

    class Stopping(Batches):
        def _model_call(self, batch: Sequence[Any]) -> list[float]:
            stop.set()  # the signal comes while the first batch is computed
            return super()._model_call(batch)

    model = Stopping()
    with Answers.open(path) as answers:
        with pytest.raises(Stopped, match="all answers so far are kept"):
            Remembering(model, answers, RecordingProgress(), "t", stop).loglikelihood(
                asked("loglikelihood", *QUESTIONS)
            )
        assert len(answers) == 3
    assert model.batches == 1
    # and nothing of the watch is left on the model
    assert "_model_call" not in vars(model)
    assert model.cache_hook.dbdict is None


def test_a_stop_before_the_first_batch_asks_nothing_but_known_answers_are_still_given(path: Path) -> None:
    stop = threading.Event()
    stop.set()
    model = Batches()
    with Answers.open(path) as answers:
        with pytest.raises(Stopped):
            Remembering(model, answers, RecordingProgress(), "t", stop).loglikelihood(
                asked("loglikelihood", *QUESTIONS)
            )
        assert model.calls == []
        Remembering(model, answers, RecordingProgress(), "t").loglikelihood(asked("loglikelihood", *QUESTIONS))
        known = Remembering(model, answers, RecordingProgress(), "t", stop)
        assert known.loglikelihood(asked("loglikelihood", QUESTIONS[2])) == [expected(*QUESTIONS[2])]


def test_questions_of_two_tasks_that_are_the_same_text_are_asked_once(path: Path) -> None:
    model = Batches()
    with Answers.open(path) as answers:
        asking = Remembering(model, answers, RecordingProgress(), "t")
        asking.loglikelihood(asked("loglikelihood", QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]))
        said = asking.loglikelihood(asked("loglikelihood", QUESTIONS[1], QUESTIONS[2], QUESTIONS[0]))
    # twice in one call stays twice: upstream's batches would hold it twice
    assert model.calls == [[QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]], [QUESTIONS[2]]]
    assert said == [expected(*QUESTIONS[1]), expected(*QUESTIONS[2]), expected(*QUESTIONS[0])]


def test_other_generation_settings_are_another_question(path: Path) -> None:
    model = Batches()
    with Answers.open(path) as answers:
        asking = Remembering(model, answers, RecordingProgress(), "t")
        assert asking.generate_until(asked("generate_until", ("abc", {"until": ["\n"]}))) == ["cba"]
        assert asking.generate_until(asked("generate_until", ("abc", {"until": ["Q:"]}))) == ["cba"]
        assert asking.generate_until(asked("generate_until", ("abc", {"until": ["Q:"]}))) == ["cba"]
    assert len(model.calls) == 2
    assert asking.generated == ["cba", "cba"]


def test_what_a_model_could_not_answer_is_not_kept(path: Path) -> None:
    model = Batches()
    requests = asked("generate_until", ("abc", {}), ("", {}))
    with Answers.open(path) as answers:
        for _ in range(2):
            asking = Remembering(model, answers, RecordingProgress(), "t")
            assert asking.generate_until(requests) == ["cba", ""]
    assert model.calls == [[("abc", {}), ("", {})], [("", {})]]


def test_answers_of_a_model_that_reports_nothing_are_kept_when_it_returns_and_nan_is_counted(path: Path) -> None:
    model = Batches()
    with Answers.open(path) as answers:
        asking = Remembering(model, answers, RecordingProgress(), "t")
        for _ in range(2):
            assert all(
                math.isnan(value) for value in asking.loglikelihood_rolling(asked("loglikelihood_rolling", ("x",)))
            )
    assert len(model.calls) == 1
    assert asking.not_numbers == 2


def test_everything_else_is_the_models_own(path: Path) -> None:
    model = Batches()
    with Answers.open(path) as answers:
        asking = Remembering(model, answers, RecordingProgress(), "t")
        assert (asking.rank, asking.world_size) == (0, 1)
        assert not hasattr(asking, "nothing_of_the_kind")
