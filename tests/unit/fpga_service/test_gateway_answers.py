"""What the gateway answers, by OpenAI's shapes, before a host written from the protocol's text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.fake_host import FakeHost
from tests.fakes.gateway_server import CHAT, Served, run, serving

COMPLETIONS = "/v1/completions"


def ask(test: Any, **settings: Any) -> None:
    """Run `test(served, host)` against a gateway of a host with the extension."""

    async def body() -> None:
        async with FakeHost() as host, serving(host, **settings) as served:
            await test(served, host)

    run(body)


def said(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_chat_is_answered_in_openais_shape() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        document = (await served.chat("hello", model="echo")).json()
        assert set(document) == {"id", "object", "created", "model", "choices", "usage"}
        assert document["object"] == "chat.completion" and document["model"] == "echo"
        (choice,) = document["choices"]
        assert choice["message"] == {"role": "assistant", "content": "echo: hello"}
        assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
        assert document["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}

    ask(test)


def test_streamed_pieces_are_the_whole_answer() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        options = {"stream_options": {"include_usage": True}}
        events = await served.events(CHAT, messages=[{"role": "user", "content": "hello"}], **options)
        *chunks, last = events
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "echo: hello"
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
        assert len({event["id"] for event in events}) == 1

    ask(test)


def test_ids_of_answers_are_never_the_same() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        ids = {(await served.chat(str(number))).json()["id"] for number in range(20)}
        assert len(ids) == 20

    ask(test)


def test_the_whole_history_reaches_the_host_and_parts_of_text_are_joined() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "and now?"},
        ]
        assert said(await served.post(CHAT, messages=messages)) == "echo: and now?"
        assert host.asked[0]["messages"] == [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "and now?"},
        ]

    ask(test)


def test_options_reach_the_host_and_defaults_are_the_gateways_then_the_models() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        await served.chat("a")
        await served.chat("a", temperature=0, top_p=0.5, top_k=-1, seed=-3, stop="x", max_completion_tokens=9)
        await served.chat("a", stop=["x", "", "y"], max_tokens=3, ignore_eos=True)
        own, given, more = (request["options"] for request in host.asked)
        assert (own["temperature"], own["top_p"], own["top_k"]) == (0.25, 1.0, 0) and "max_tokens" not in own
        assert (given["temperature"], given["top_p"], given["top_k"], given["seed"]) == (0, 0.5, 0, -3)
        assert (given["stop"], given["max_tokens"]) == (["x"], 9)
        assert (more["stop"], more["max_tokens"], more["ignore_eos"]) == (["x", "y"], 3, True)

    ask(test, temperature=0.25)


def test_several_prompts_are_several_choices_in_their_order() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        document = (await served.post(COMPLETIONS, prompt=["one", "two"])).json()
        assert [choice["text"] for choice in document["choices"]] == ["echo: one", "echo: two"]
        assert [choice["index"] for choice in document["choices"]] == [0, 1]
        assert document["usage"] == {"prompt_tokens": 14, "completion_tokens": 8, "total_tokens": 22}
        ids = (await served.post(COMPLETIONS, prompt=[[1, 2], [3]])).json()
        assert [choice["text"] for choice in ids["choices"]] == ["echo: [1, 2]", "echo: [3]"]
        assert [request["options"]["max_tokens"] for request in host.asked] == [16] * 4  # OpenAI's default
        events = await served.events(COMPLETIONS, prompt=["one", "two"])
        texts = ["", ""]
        for event in events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == ["echo: one", "echo: two"]

    ask(test)


def test_echo_with_logprobs_lists_the_prompts_tokens_before_the_answers() -> None:
    """As lm-eval reads it: the prompt's tokens first, none for the first of them, one entry for each token."""

    async def test(served: Served, _: FakeHost) -> None:
        body = {"prompt": "ab", "max_tokens": 0, "logprobs": 1, "echo": True}
        (choice,) = (await served.post(COMPLETIONS, **body)).json()["choices"]
        assert choice["text"] == "ab" and choice["finish_reason"] == "length"
        assert choice["logprobs"] == {
            "tokens": ["a", "b"],
            "token_logprobs": [None, -0.5],
            "top_logprobs": [None, {"b": -0.5}],
            "text_offset": [0, 1],
        }
        (choice,) = (await served.post(COMPLETIONS, prompt="ab", echo=True)).json()["choices"]
        assert choice["text"] == "abecho: ab" and choice["logprobs"] is None

    ask(test)


def test_models_are_listed_with_the_longest_context() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        (model,) = (await served.client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("mine", "model", 100)
        assert (await served.client.get("/v1/models/mine")).json() == model
        assert (await served.client.get("/v1/models/echo")).status_code == 404
        assert (await served.chat("a", model="mine")).json()["model"] == "mine"

    ask(test, served_model_name="mine", max_model_len=100)


def test_predict_answers_strings_and_lists_as_serve_gpu_does() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        one = await served.post("/predict", prompt="a")
        many = await served.post("/predict", prompt=["a", "b"], max_tokens=3)
        assert one.json() == {"response": "echo: a"} and many.json() == {"response": ["echo: a", "echo: b"]}
        assert (await served.post("/predict", prompt=[])).json() == {"response": []}
        assert host.asked[0]["options"]["temperature"] == 0 and host.asked[1]["options"]["max_tokens"] == 3
        assert (await served.client.get("/")).json() == {"status": "ok"}

    ask(test)


def test_routes_of_the_api_are_answered_without_v1_too() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        body = {"messages": [{"role": "user", "content": "a"}]}
        assert said(await served.client.post("/chat/completions", json=body)) == "echo: a"
        assert (await served.client.get("/models")).status_code == 200

    ask(test)


def test_a_limit_of_the_gateway_ends_answers_and_refuses_prompts() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        document = (await served.chat("hello")).json()  # 7 tokens of prompt leave room for 2
        assert document["choices"][0]["finish_reason"] == "length"
        assert document["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        too_many = await served.chat("hello", max_tokens=3)
        assert too_many.status_code == 400
        assert too_many.json()["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 9 tokens" in too_many.json()["error"]["message"]

    ask(test, max_model_len=9)


REFUSED = [
    ({"n": 2}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"stop": [1]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "messages"),
]


def test_what_cannot_be_honoured_is_a_400_that_names_the_parameter() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        for extra, param in REFUSED:
            response = await served.client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}], **extra})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), extra
            assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert host.asked == []

    ask(test)


def test_fields_that_change_nothing_are_let_pass() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        harmless = {"user": "u", "store": False, "metadata": {}, "parallel_tool_calls": True, "tools": [], "n": 1}
        more = {"response_format": {"type": "text"}, "presence_penalty": 0, "logit_bias": {}, "unheard_of": [1]}
        assert said(await served.chat("a", **harmless, **more)) == "echo: a"

    ask(test)


def test_another_model_is_a_404() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        response = await served.chat("a", model="gpt-4")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")

    ask(test)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff\xfe", b"[" * 5000,
     b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_not_json_by_the_book_is_a_400(body: bytes) -> None:
    async def test(served: Served, host: FakeHost) -> None:
        response = await served.client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
        assert host.asked == []

    ask(test)


def test_a_body_that_is_too_long_is_a_413_announced_or_not() -> None:
    async def test(served: Served, host: FakeHost) -> None:
        long = b'{"messages": "' + b"x" * (9 << 20) + b'"}'

        async def pieces() -> Any:
            for start in range(0, len(long), 1 << 16):
                yield long[start : start + (1 << 16)]

        headers = {"Content-Type": "application/json"}
        for content in (long, pieces()):
            response = await served.client.post(CHAT, content=content, headers=headers)
            assert response.status_code == 413 and "8388608 bytes" in response.json()["error"]["message"]

    ask(test)


def test_unknown_routes_and_methods_answer_in_openais_form() -> None:
    async def test(served: Served, _: FakeHost) -> None:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/", 405)):
            response = await served.client.request(method, path)
            assert response.status_code == status and "message" in response.json()["error"]

    ask(test)


def test_a_plain_host_is_asked_for_chats_only_and_nothing_is_made_up() -> None:
    async def test() -> None:
        async with FakeHost(extended=False) as host, serving(host) as served:
            document = (await served.chat("hello", temperature=0.5, max_tokens=5)).json()
            assert document["choices"][0]["message"]["content"] == "echo: hello"
            assert (document["usage"], document["model"]) == (None, "fpga")
            assert host.asked[0]["max_tokens"] == 5 and host.asked[0]["temperature"] == 0.5
            events = await served.events(CHAT, messages=[{"role": "user", "content": "b"}])
            assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "echo: b"
            for path, body, param in (
                (COMPLETIONS, {"prompt": "a"}, "prompt"),
                (CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True}, "logprobs"),
                (CHAT, {"messages": [{"role": "user", "content": "a"}], "stop": "x"}, "stop"),
            ):
                response = await served.post(path, **body)
                assert (response.status_code, response.json()["error"]["param"]) == (400, param)

    run(test)
