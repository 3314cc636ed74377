"""The fallback engine by the openai client: real model (tiny, random), real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from edgetool.serving.jobs import EngineJob
from edgetool.serving.transformers_engine import Engine, load, make_app
from tests.fakes.openai_server import Running
from tests.fakes.tiny_models import make_tiny_model

KEY = "et-key"
QUESTION = [{"role": "user", "content": "What is a checkpoint?"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", dtype="float32")
    return load(EngineJob(str(directory), KEY, "tiny", 128, "float32", "cpu", threads=1))


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with Running(make_app(engine, KEY)) as server:
        yield server.url


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_is_answered_with_usage(client, engine):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, temperature=0)
    text = engine.decoder.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    length = len(engine.decoder.tokenizer(text, add_special_tokens=False).input_ids)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 8)
    assert answer.usage.total_tokens == length + 8


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_stream_says_the_same_as_a_whole_answer(client, temperature):
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "temperature": temperature, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_take_text_and_token_ids_one_or_several(client, engine):
    ids = engine.decoder.tokenizer("The weights are").input_ids
    forms = ["The weights are", ["The weights are"], ids, [ids, ids]]
    answers = [
        client.completions.create(model="tiny", prompt=form, max_tokens=6, temperature=0).choices for form in forms
    ]
    assert [len(choices) for choices in answers] == [1, 1, 1, 2]
    assert len({choice.text for choices in answers for choice in choices}) == 1
    assert [choice.index for choice in answers[3]] == [0, 1]


def test_max_tokens_of_a_completion_is_16_when_it_is_not_given(client):
    answer = client.completions.create(model="tiny", prompt="a", temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_a_stop_string_ends_the_answer(client):
    options = {"model": "tiny", "prompt": "The weights are", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    word = whole[10:14]
    stopped = client.completions.create(**options, stop=[word]).choices[0]
    assert stopped.text == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"


def test_a_prompt_longer_than_the_context_is_400_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 128 tokens; the prompt has 200"):
        client.completions.create(model="tiny", prompt=[7] * 200)
    with pytest.raises(openai.BadRequestError, match="100 were asked for"):
        client.completions.create(model="tiny", prompt=[7] * 100, max_tokens=100)


def test_an_answer_may_fill_the_context_to_its_end(client):
    answer = client.completions.create(
        model="tiny", prompt=[7] * 100, max_tokens=28, extra_body={"ignore_eos": True}, temperature=0
    )
    assert answer.usage.total_tokens == 128


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2},
        {"logprobs": 1},
        {"echo": True},
        {"best_of": 3},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"temperature": -0.5},
        {"top_p": 0},
        {"prompt": []},
        {"prompt": [9999]},
        {"prompt": [-1]},
        {"prompt": {"a": 1}},
        {"n": 0},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logit_bias": {"5": 10}},
        {"suffix": "y"},
    ],
)
def test_what_it_cannot_do_is_400_and_never_ignored(url, options):
    body = {"model": "tiny", "prompt": "x", **options}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
        {"messages": [{"role": 5, "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
)
def test_chats_that_it_cannot_answer_are_400_too(url, options):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **options}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_parameters_of_null_or_without_effect_count_as_not_given(client):
    nothing = {"stream": None, "ignore_eos": None, "logit_bias": {}, "frequency_penalty": 0, "n": None}
    options = {"response_format": {"type": "text"}, "tools": []}
    said = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(model="tiny", messages=said, max_tokens=2, extra_body=nothing | options)
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    "raw",
    [
        rb'{"prompt": "\ud800", "max_tokens": 2}',
        rb'{"prompt": "a", "stop": "\udc00", "max_tokens": 2}',
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": [' + b"9" * 5_000 + b"]}",
        b"[]",
        b"",
    ],
)
def test_a_body_that_is_no_json_by_the_book_is_400_and_the_connection_lives_on(url, raw):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=headers) as client:
        answer = client.post("/v1/completions", content=raw)
        assert answer.status_code == 400
        assert "body" in answer.json()["error"]["message"]
        assert "connection" not in answer.headers
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_generation_that_fails_is_an_answer_and_leaves_the_connection_to_the_next(url, engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine.decoder, "pieces", fail)
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "generation failed: RuntimeError: no memory"
        assert answer.json()["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_messages_of_text_parts_are_joined_and_pictures_refused(client):
    parts = [{"type": "text", "text": "What is a "}, {"type": "text", "text": "checkpoint?"}]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    split = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
    assert split.choices == client.chat.completions.create(messages=QUESTION, **options).choices
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    with pytest.raises(openai.BadRequestError, match="text only"):
        client.chat.completions.create(messages=[{"role": "user", "content": picture}], **options)


def test_a_model_of_another_name_is_404(client):
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
        client.chat.completions.create(model="other", messages=QUESTION)


def test_a_wrong_key_is_401_and_health_needs_none(url):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    assert httpx.get(f"{url}/health").status_code == 200


def test_many_at_once_get_the_answers_that_they_get_alone(client):
    prompts = ["The weights are", "A checkpoint", "def gather(rows)", "Une phrase"] * 3

    def ask(prompt):
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    alone = {prompt: ask(prompt) for prompt in set(prompts)}
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == [alone[prompt] for prompt in prompts]


def test_a_client_that_goes_away_does_not_hold_up_the_next(client):
    stream = client.completions.create(
        model="tiny", prompt="a", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny", prompt="b", max_tokens=1).usage.completion_tokens == 1
