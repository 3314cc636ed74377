"""An endpoint scores and generates as the model behind it does, and every way to fail is one clear error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetool.errors import BackendFailed, BadInput, ConfigError, EdgetoolError, ResourceUnavailable
from edgetool.evaluation.endpoint import Client, Endpoint, Scored, check_scores, connect
from edgetool.evaluation.endpoint_lm import TextLM, TokenLM, continuation_score
from tests.fakes.openai_server import Running, Stranger
from tests.fakes.scoring_server import ScoringServer
from tests.fakes.tiny_models import make_tiny_model

PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog"),
    ("Une phrase", " en français, où l'été commence"),
    ("def gather(rows):\n    return ", "[row for row in rows]"),  # the space at the end belongs to the continuation
    ("again and", " again"),
]


class Request:
    """As much of upstream's Instance as a language model sees."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class Hook:
    """Keeps what is remembered."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.kept.append((kind, request, answer))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture
def server(model: Path) -> Iterator[tuple[ScoringServer, str]]:
    app = ScoringServer(model)
    with Running(app) as running:
        yield app, running.url


def client(url: str, key: str | None = None) -> Client:
    return Client(Endpoint(url, key, "tiny"), 30.0, pauses_s=(0.01,))


def expected_score(server: ScoringServer, context: str, continuation: str) -> tuple[float, bool]:
    """By upstream's rule (tokens of the whole after as many as the context has), one step of the model at a time."""
    moved = len(context) - len(context.rstrip())
    if moved:
        context, continuation = context[:-moved], context[-moved:] + continuation
    before = server.tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = server.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    total, greedy = 0.0, True
    for place in range(len(before), len(whole)):
        with torch.no_grad():
            row = torch.log_softmax(server.model(torch.tensor([whole[:place]])).logits[0, -1], -1)
        total += float(row[whole[place]])
        greedy = greedy and int(row.argmax()) == whole[place]
    return total, greedy


@pytest.mark.parametrize("by", ["tokens", "text"])
def test_log_likelihoods_are_those_of_the_model_itself(server: Any, model: Path, by: str) -> None:
    app, url = server
    lm = TokenLM(lambda: client(url), model, 3, 512) if by == "tokens" else TextLM(lambda: client(url), 3, False)
    lm.set_cache_hook(hook := Hook())
    found = lm.loglikelihood([Request(*pair) for pair in PAIRS])
    for pair, (score, greedy) in zip(PAIRS, found, strict=True):
        wanted = expected_score(app, *pair)
        # float32 sums over sequences of another length: relative rounding of 1e-7 a step, sums of some ten
        assert score == pytest.approx(wanted[0], abs=1e-3)
        assert greedy is wanted[1]
    assert {tuple(request): answer for _, request, answer in hook.kept} == dict(zip(PAIRS, found, strict=True))


def test_requests_with_a_tokenizer_are_those_of_upstreams_local_completions(server: Any, model: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    app, url = server
    upstream = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="tiny", tokenizer=str(model), tokenizer_backend="huggingface"
    )
    theirs = upstream.loglikelihood([Request(*pair) for pair in PAIRS], disable_tqdm=True)
    sent = list(app.seen)
    app.seen.clear()
    ours = TokenLM(lambda: client(url), model, 2, None).loglikelihood([Request(*pair) for pair in PAIRS])
    assert ours == theirs
    order = lambda bodies: sorted(map(repr, (sorted(body.items()) for body in bodies)))  # noqa: E731
    assert order(app.seen) == order(sent)


@pytest.mark.parametrize("by", ["tokens", "text"])
def test_generation_stops_where_it_is_told(server: Any, model: Path, by: str) -> None:
    app, url = server
    lm = TokenLM(lambda: client(url), model, 2, 512) if by == "tokens" else TextLM(lambda: client(url), 2, False)
    prompt = "The quick brown fox"
    ids = app.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(app.model(torch.tensor([ids])).logits[0, -1].argmax()))
    whole = app.tokenizer.decode(ids[start:])
    stop = whole[4:6]
    found = lm.generate_until(
        [
            Request(prompt, {"until": [], "max_gen_toks": 12}),
            Request(prompt, {"until": [stop], "max_gen_toks": 12}),
        ]
    )
    assert found == [whole, whole.split(stop)[0]]


@pytest.mark.parametrize("garbage", ["html", "deep", "null", "no_logprobs", "no_echo", "nan", "no_choices"])
@pytest.mark.parametrize("by", ["tokens", "text"])
def test_garbage_is_one_clear_error(model: Path, garbage: str, by: str) -> None:
    with Running(ScoringServer(model, garbage=garbage)) as running:
        ask = client(running.url)
        lm = TokenLM(lambda: ask, model, 2, 512) if by == "tokens" else TextLM(lambda: ask, 2, False)
        with pytest.raises(BackendFailed, match=running.url):
            lm.loglikelihood([Request(*pair) for pair in PAIRS])


@pytest.mark.parametrize("garbage", ["no_logprobs", "no_echo", "html"])
def test_an_endpoint_that_cannot_score_is_refused_before_it_is_asked_anything(model: Path, garbage: str) -> None:
    with Running(ScoringServer(model, garbage=garbage)) as running, pytest.raises(BadInput, match="echo with logprobs"):
        check_scores(client(running.url))


def test_an_endpoint_that_scores_is_accepted(server: Any) -> None:
    check_scores(client(server[1]))


def test_answers_that_came_before_a_failure_are_kept(model: Path) -> None:
    with Running(ScoringServer(model, down_after=3)) as running:
        lm = TextLM(lambda: client(running.url), 1, False)
        lm.set_cache_hook(hook := Hook())
        with pytest.raises(BackendFailed, match=r"does not answer \(4 tries\): 503") as failure:
            lm.loglikelihood([Request("The quick", f" fox {number}") for number in range(8)])
    assert "--resume" in str(failure.value.hint)
    assert len(hook.kept) == 3


def test_a_key_that_is_refused_is_named_at_once(model: Path) -> None:
    with Running(ScoringServer(model, key="right")) as running:
        with pytest.raises(ConfigError, match="refuses the key"):
            connect(running.url, "wrong", None)
        with pytest.raises(ConfigError, match="refuses the key"):
            client(running.url, "wrong").scored("a text")
        assert connect(running.url + "/v1/", "right", None) == Endpoint(running.url, "right", "tiny")


def test_nobody_there_and_no_such_model_are_told_apart(server: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceUnavailable, match="nothing answers"):
            connect(f"http://127.0.0.1:{taken.getsockname()[1]}", None, None)
    with pytest.raises(BadInput, match="does not serve 'other'"):
        connect(server[1], None, "other")
    with Running(Stranger(models=("a", "b"))) as running, pytest.raises(BadInput) as failure:
        connect(running.url, None, None)
    assert failure.value.hint == "choose with --endpoint-model NAME"


def test_a_refused_request_is_not_sent_again(model: Path) -> None:
    app = ScoringServer(model, speaks_tokens=False)
    with Running(app) as running, pytest.raises(BadInput, match="prompt must be a string"):
        TokenLM(lambda: client(running.url), model, 1, 512).loglikelihood([Request(*PAIRS[0])])
    assert len(app.seen) == 1


class Saying(Client):
    """A server that scores each text as it is told to."""

    def __init__(self, tokens: dict[str, list[str]]) -> None:
        super().__init__(Endpoint("http://127.0.0.1:1", None, "m"), 1.0)
        self.told = tokens

    def scored(self, prompt: Any) -> Scored:
        tokens = self.told[prompt]
        values = (None, *(-1.0 * 2**place for place in range(len(tokens) - 1)))
        return Scored(tuple(tokens), values, (None, *(True for _ in tokens[1:])))


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (["ab", "c", " d", "ef", "!"], -6.0),  # " d" and "ef": 2 + 4; "!" was generated
        (["<s>", "abc", " d", "ef", "!"], -6.0),  # a special token in front
        (["ab", "c d", "ef", "!"], -3.0),  # a token over the border belongs to the continuation
    ],
)
def test_the_border_is_found_in_the_servers_own_tokens(tokens: list[str], wanted: float) -> None:
    assert continuation_score(Saying({"abc def": tokens}), "abc", " def") == (wanted, True)


def test_tokens_without_a_text_of_their_own_are_counted_with_the_context_alone() -> None:
    # "né": é is two tokens, neither of which is a character
    told = {"né d": ["n", "\ufffd", "\ufffd", " d", "x"], "né": ["n", "\ufffd", "\ufffd", "y"]}
    assert continuation_score(Saying(told), "né", " d") == (-4.0, True)


def test_tokens_of_another_text_are_garbage() -> None:
    told = {"abc def": ["some", "thing", " else"], "abc": ["some", "thing", " quite", " else"]}
    with pytest.raises(BackendFailed, match="more tokens"):
        continuation_score(Saying(told), "abc", " def")


def test_every_failure_is_an_error_of_ours(model: Path) -> None:
    with Running(Stranger(failing=True, models=("tiny",))) as running, pytest.raises(EdgetoolError):
        client(running.url).text("/v1/completions", {"prompt": "a", "max_tokens": 1})
