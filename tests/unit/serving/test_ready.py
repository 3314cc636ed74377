"""When a server counts as ready, and which texts are no language."""

from __future__ import annotations

import pytest

from edgetool.errors import BackendFailed, VerificationFailed
from edgetool.serving.ready import Endpoint, babble, check_answers, healthy
from tests.fakes.openai_server import Running, Stranger

SENTENCE = "Paris , which lies on the river Seine and has two million people ."


def test_a_server_that_speaks_is_ready():
    stranger = Stranger(key="k", answer=SENTENCE)
    with Running(stranger) as server:
        endpoint = Endpoint(server.url, "k", "fake")
        assert healthy(endpoint)
        assert check_answers(endpoint) == SENTENCE
    assert [path for path, _, _ in stranger.seen] == ["/health", "/v1/models", "/v1/completions"]


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (Stranger(models=("other",)), "lists"),
        (Stranger(failing=True), "500"),
        (Stranger(key="another"), "401"),
    ],
)
def test_a_server_that_does_not_answer_is_a_failed_backend(stranger, reason):
    with Running(stranger) as server, pytest.raises(BackendFailed, match=reason):
        check_answers(Endpoint(server.url, "k", "fake"))


def test_nobody_there_is_not_healthy_and_no_answer():
    endpoint = Endpoint("http://127.0.0.1:9", None, "fake")
    assert not healthy(endpoint)
    with pytest.raises(BackendFailed, match="broke off"):
        check_answers(endpoint)


def test_a_server_that_is_not_well_is_not_healthy():
    with Running(Stranger(healthy=False)) as server:
        assert not healthy(Endpoint(server.url, None, "fake"))


def test_a_model_that_repeats_itself_is_not_ready():
    with Running(Stranger(text="the")) as server, pytest.raises(VerificationFailed, match="does not speak") as caught:
        check_answers(Endpoint(server.url, None, "fake"))
    assert "--no-check" in str(caught.value.hint)


@pytest.mark.parametrize(
    "text", ["!" * 32, "\n" * 20, "   ", "the the the the the the the the the", "的" * 30, "0" * 12]
)
def test_broken_weights_are_recognised_by_what_they_write(text):
    # measured with zeros off by one and with scales of zero: "!!!!" is token 0, which NaN logits give too
    assert babble(text, 32) is not None


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        " Paris.",  # short answers are given the benefit of the doubt
        "巴黎是法国的首都，位于塞纳河畔，人口约二百万。",
        "def f(x):\n    return x + 1",
        "\n\n1. Red\n2. Green\n3. Blue",
        "vqx zulhe, mmar prost kelim ando fierre tul",  # of random weights: no language, but nothing is broken
    ],
)
def test_what_a_working_model_writes_is_let_pass(text):
    assert babble(text, 32) is None


def test_a_single_token_may_be_white_space():
    assert babble(" ", 1) is None
