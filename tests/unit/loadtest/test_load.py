"""The load client against strangers' servers: what it sends, what it counts, and what it says when they are odd."""

from __future__ import annotations

import pytest

from edgetool.errors import BackendFailed, BadInput, ConfigError, ResourceUnavailable
from edgetool.loadtest import prompts
from edgetool.loadtest.client import base_url
from edgetool.loadtest.run import Endpoint, Load, Measured, measure
from edgetool.progress import NullProgress
from tests.fakes.openai_server import Running, Stranger


def load(**changes) -> Load:
    usual = {
        "concurrency": (2,),
        "requests": 4,
        "prompt_tokens": 40,
        "output_tokens": 5,
        "rounds": 2,
        "warmup": 1,
        "api": "chat",
        "ignore_eos": True,
        "seed": 7,
        "timeout_s": 20.0,
    }
    return Load(**(usual | changes))


def against(stranger: Stranger, key: str | None = None, model: str | None = None, **changes) -> Measured:
    with Running(stranger) as server:
        return measure([Endpoint(server.url, model, key)], load(**changes), NullProgress())


def test_every_request_is_measured_and_sent_as_openai_wants_it():
    stranger = Stranger(key="k")
    measured = against(stranger, "k")
    assert [len(found.samples) for found in measured.rounds] == [2, 2]
    assert all(sample.error is None and sample.tokens == 5 for found in measured.rounds for sample in found.samples)
    path, body, authorization = stranger.seen[-1]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer k")
    assert body["stream"] is True
    assert body["max_tokens"] == 5
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0.0
    # on a busy machine the client rightly says that it may have been the slower of the two
    assert [warning for warning in measured.warnings if not warning.startswith("this client was busy")] == []


def test_prompts_have_the_wanted_length_as_the_server_counts_it():
    stranger = Stranger(template_tokens=11)
    measured = against(stranger)
    assert {sample.prompt_tokens for found in measured.rounds for sample in found.samples} == {40}


def test_no_prompt_is_asked_twice():
    stranger = Stranger()
    against(stranger, requests=12, concurrency=(1, 3))
    asked = [body["messages"][0]["content"] for path, body, _ in stranger.seen if "chat" in path]
    measured = [text for text in asked if len(text.split()) == 40]
    assert len(measured) == len(set(measured)) >= 24


def test_times_include_the_pauses_of_the_server():
    measured = against(Stranger(first_s=0.05, each_s=0.05))
    samples = [sample for found in measured.rounds for sample in found.samples]
    for sample in samples:
        # lower bounds only: asyncio never sleeps shorter, but for the clock's grain of a millisecond
        assert sample.ttft_s is not None and sample.tpot_s is not None
        assert sample.ttft_s > 0.049
        # what is late at the first token shortens the rest, and what is late at the last one prolongs it
        assert sample.ttft_s + 4 * sample.tpot_s > 0.049 + 4 * 0.049
        assert sample.latency_s > 0.049 + 4 * 0.049
    # that the first token was late by 0.1 s in every one of them is not to be feared
    assert max(sample.tpot_s or 0 for sample in samples) > 0.025


def test_a_server_that_knows_no_extras_is_asked_without_them_and_that_is_said():
    stranger = Stranger(knows=frozenset())
    measured = against(stranger)
    assert not {"ignore_eos", "stream_options"} & set(stranger.seen[-1][1])
    assert any("ignore_eos" in warning for warning in measured.warnings)


def test_without_token_counts_the_pieces_of_the_stream_are_counted_and_that_is_said():
    measured = against(Stranger(tells_usage=False, pieces_per_chunk=2), output_tokens=6)
    assert {sample.tokens for found in measured.rounds for sample in found.samples} == {3}
    assert any("does not count tokens" in warning for warning in measured.warnings)
    assert any("does not count prompt tokens" in warning for warning in measured.warnings)


def test_with_token_counts_several_tokens_in_a_piece_are_all_counted():
    measured = against(Stranger(pieces_per_chunk=3), output_tokens=6)
    assert {sample.tokens for found in measured.rounds for sample in found.samples} == {6}


def test_completions_can_be_asked_instead_of_chat():
    stranger = Stranger()
    against(stranger, api="completions")
    assert stranger.seen[-1][0] == "/v1/completions"
    assert isinstance(stranger.seen[-1][1]["prompt"], str)


def test_at_most_so_many_requests_are_under_way_at_once():
    stranger = Stranger(first_s=0.1)
    running, most = 0, 0
    original = stranger._complete

    async def counted(*arguments):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await original(*arguments)
        running -= 1

    stranger._complete = counted  # type: ignore[method-assign]
    against(stranger, concurrency=(3,), requests=12)
    assert most == 3


def test_two_endpoints_take_turns_and_meet_the_same_prompts():
    order: list[str] = []

    class Noted(Stranger):
        async def _complete(self, path, body, receive, send):
            if body.get("stream") and body["max_tokens"] == 5 and body["messages"][0]["content"].count(" ") == 39:
                order.append(self.text)
            await super()._complete(path, body, receive, send)

    first, second = Noted(text="a"), Noted(text="b")
    with Running(first) as one, Running(second) as two:
        measured = measure(
            [Endpoint(one.url, None, None), Endpoint(two.url, None, None)], load(warmup=0), NullProgress()
        )
    assert "".join(order) == "aabbbbaa"
    assert [found.endpoint for found in measured.rounds] == [0, 1, 1, 0]
    asked = [
        sorted(b["messages"][0]["content"] for _, b, _ in s.seen if b.get("max_tokens") == 5) for s in (first, second)
    ]
    assert asked[0] == asked[1]


def test_one_server_measured_against_itself_is_never_asked_the_same_twice():
    stranger = Stranger()
    with Running(stranger) as server:
        measure([Endpoint(server.url, None, None)] * 2, load(), NullProgress())
    asked = [b["messages"][0]["content"] for _, b, _ in stranger.seen if b.get("max_tokens") == 5]
    texts = [text for text in asked if text.count(" ") == 39]
    warm_ups = 2  # the same for both turns, before anything counts
    assert len(texts) - len(set(texts)) <= warm_ups


def test_nobody_there_is_a_resource_that_is_missing():
    with pytest.raises(ResourceUnavailable, match="nothing answers at"):
        measure([Endpoint("http://127.0.0.1:9", None, None)], load(), NullProgress())


def test_a_wrong_key_is_said_as_such():
    with pytest.raises(ConfigError, match="refuses the key"):
        against(Stranger(key="right"), "wrong")


@pytest.mark.parametrize(("models", "wanted"), [(("a", "b"), None), (("a",), "z"), ((), None)])
def test_a_model_that_is_not_there_or_not_clear_is_refused(models, wanted):
    with pytest.raises(BadInput, match="serve"):
        against(Stranger(models=models), model=wanted)


def test_a_server_that_only_fails_is_a_failure_with_its_reason():
    with pytest.raises(BackendFailed, match="500"):
        against(Stranger(failing=True))


def test_answers_that_break_off_are_counted_as_failures_and_said():
    class Sometimes(Stranger):
        async def _complete(self, path, body, receive, send):
            self.cut_after = 2 if len(self.seen) % 3 == 0 else None
            await super()._complete(path, body, receive, send)

    measured = against(Sometimes(), requests=12)
    errors = [sample.error for found in measured.rounds for sample in found.samples if sample.error]
    assert 0 < len(errors) < 12
    assert any("failed; the first" in warning for warning in measured.warnings)


class Says(Stranger):
    """Streams the same events each time, and counts nothing elsewhere."""

    events = b""

    async def _complete(self, path, body, receive, send):
        headers = [(b"content-type", b"text/event-stream"), (b"content-length", str(len(self.events)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.events})


def test_a_stream_without_an_end_is_a_failure_however_politely_it_was_closed():
    stranger = Says()
    stranger.events = b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n'
    with pytest.raises(BackendFailed, match="the answer broke off"):
        against(stranger)


def test_counts_that_are_no_numbers_count_as_not_told():
    stranger = Says()
    stranger.events = (
        b'data: {"choices":[{"delta":{"content":"ok"},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":"many","completion_tokens":null}}\n\ndata:[DONE]\n\n'
    )
    measured = against(stranger, requests=2)
    samples = [sample for found in measured.rounds for sample in found.samples]
    assert {(sample.error, sample.prompt_tokens, sample.counted) for sample in samples} == {(None, None, False)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/v1/", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("h:1", "http://h:1"),
        ("https://h/api/v1", "https://h/api"),
    ],
)
def test_an_address_may_be_given_with_and_without_v1(given, meant):
    assert base_url(given) == meant


@pytest.mark.parametrize("given", ["ftp://h", "http://", "http://h:port", "h:99999"])
def test_what_is_no_address_is_refused(given):
    with pytest.raises(ConfigError, match="not an address"):
        base_url(given)


def test_prompts_are_the_same_for_the_same_seed_and_differ_from_their_first_words():
    assert prompts.text(50, 1, 3) == prompts.text(50, 1, 3)
    starts = {" ".join(prompts.text(50, 1, number).split()[:4]) for number in range(200)}
    assert len(starts) > 195  # of 100**4 starts, so chance repeats are rare


def test_lengths_are_fitted_from_two_counts():
    # 1.5 tokens a word and 20 around them: 68 and 260 tokens for 32 and 160 words
    length = prompts.fit((68, 260))
    assert length.measured
    assert length.words(260) == 160
    assert not prompts.fit((None, 5)).measured
    assert not prompts.fit((30, 30)).measured
