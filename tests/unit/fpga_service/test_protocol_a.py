"""Messages of protocol A and its extension by hand-written JSON."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from edgetool.fpga_service import extension as x
from edgetool.fpga_service import protocol_a as a
from edgetool.fpga_service.device import DeviceFacts, GenerateOptions, ScoredToken, Step

FACTS = DeviceFacts("m", "llama", 100, 50, (2, 3), "et1", "ab", "sim", temperature=0.6, top_p=0.9, top_k=40)
NONCE = "0123456789abcdef"
TEXT = (Path(__file__).parents[3] / "docs" / "fpga-protocol.md").read_text()


def test_a_plain_request_has_the_four_keys_of_the_document() -> None:
    text = a.write_plain([{"role": "user", "content": "你"}], "m", GenerateOptions(max_tokens=5, temperature=0.25))
    assert json.loads(text) == {
        "model": "m",
        "messages": [{"role": "user", "content": "你"}],
        "temperature": 0.25,
        "max_tokens": 5,
    }


def test_a_plain_request_is_read_with_what_was_not_given_taken_from_the_model() -> None:
    asked = {"model": None, "messages": [{"role": "user", "content": "hi"}], "temperature": None, "max_tokens": None}
    request = a.read_plain(json.dumps(asked))
    assert request.messages == (a.ChatMessage(role="user", content="hi"),)
    assert request.options(FACTS) == GenerateOptions(1024, 0.6, 0.9, 40)
    given = a.read_plain(json.dumps({**asked, "temperature": 0, "max_tokens": 7, "stream": True}))
    assert given.options(FACTS) == GenerateOptions(7, 0.0, 0.9, 40)


def test_text_parts_are_joined_and_missing_content_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]})
    assert [message.content for message in a.read_plain(text).messages] == ["ab", ""]


@pytest.mark.parametrize("text", ["What is 2 + 2?", "  你好 ", "[1, 2]", '"quoted"'])
def test_a_text_that_is_no_object_is_the_question_itself(text: str) -> None:
    assert a.read_plain(text).messages == (a.ChatMessage(role="user", content=text),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "{",
        "{}",
        '{"messages": []}',
        '{"messages": "hi"}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
        '{"messages": [{"role": "user", "content": "x"}], "temperature": -1}',
        '{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"a":' * 5000,
    ],
)
def test_what_is_no_plain_request_is_malformed(text: str) -> None:
    with pytest.raises(a.MalformedMessage):
        a.read_plain(text)


def test_the_hello_is_a_plain_request_too_and_its_reply_proves_the_nonce() -> None:
    hello = json.loads(a.write_hello(NONCE))
    assert hello["max_tokens"] == 1 and hello["temperature"] == 0 and NONCE not in json.dumps(hello["messages"])
    read = a.read_plain(json.dumps(hello))
    assert read.edgetool == a.Hello(hello=1, nonce=NONCE)
    reply = a.write_hello_reply(NONCE, FACTS, "edgetool 1", 5)
    said = json.loads(reply)["edgetool"]
    assert said["proof"] == hashlib.sha256(NONCE.encode()).hexdigest() and said["hello"] == 1
    found = a.read_hello_reply(reply, NONCE)
    assert found is not None and found.facts == FACTS and found.max_queue == 5


def test_no_other_text_counts_as_a_reply_to_the_hello() -> None:
    right = a.write_hello_reply(NONCE, FACTS, "edgetool 1", 5)
    others = ["Hello!", "", "{}", "[]", "5", '{"edgetool": 5}', '{"edgetool": {"proof": "\\ud800"}}', "[" * 10_000]
    for text in [*others, right.replace(hashlib.sha256(NONCE.encode()).hexdigest(), NONCE), a.write_hello(NONCE)]:
        assert a.read_hello_reply(text, NONCE) is None
    assert a.read_hello_reply(right, NONCE[::-1]) is None
    with pytest.raises(a.MalformedMessage):
        a.read_hello_reply(right.replace('"vocab": 100', '"vocab": "many"'), NONCE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"type":"chat","id":5,"messages":[{"role":"user","content":"x"}],"options":{"temperature":1},"later":[]}',
            x.Chat(id=5, messages=(a.ChatMessage(role="user", content="x"),), options=x.Options(temperature=1.0)),
        ),
        ('{"type":"complete","id":0,"prompt":"x"}', x.Complete(id=0, prompt="x")),
        (
            '{"type":"complete","id":0,"prompt":[1,4294967295],"options":{"stop":["a"],"seed":18446744073709551615}}',
            x.Complete(id=0, prompt=(1, 2**32 - 1), options=x.Options(stop=("a",), seed=2**64 - 1)),
        ),
        ('{"type":"score","id":1,"prompt":[7],"top":100}', x.Score(id=1, prompt=(7,), top=100)),
        ('{"type":"tokenize","id":1,"text":"x","timeout_s":2}', x.Tokenize(id=1, text="x", timeout_s=2.0)),
        ('{"type":"cancel","id":9007199254740991}', x.Cancel(id=2**53 - 1)),
        ('{"type":"ping","id":1}', x.Ping(id=1)),
    ],
)
def test_requests_are_read(text: str, message: x.Request) -> None:
    assert x.read_request(text) == message
    assert x.read_request(x.write(message)) == message


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("", None),
        ("5", None),
        ("{}", None),
        ('{"type":"sing","id":5}', 5),
        ('{"type":"ping"}', None),
        ('{"type":"ping","id":-1}', None),
        ('{"type":"ping","id":1.5}', None),
        ('{"type":"ping","id":true}', None),
        ('{"type":"ping","id":"1"}', None),
        ('{"type":"ping","id":9007199254740992}', None),
        ('{"type":"ping","id":' + "9" * 6000 + "}", None),
        ('{"type":"chat","id":5}', 5),
        ('{"type":"chat","id":5,"messages":[]}', 5),
        ('{"type":"complete","id":5,"prompt":[1.5]}', 5),
        ('{"type":"complete","id":5,"prompt":[4294967296]}', 5),
        ('{"type":"complete","id":5,"prompt":"x","options":{"max_tokens":0}}', 5),
        ('{"type":"complete","id":5,"prompt":"x","options":{"temperature":"1"}}', 5),
        ('{"type":"complete","id":5,"prompt":"x","options":{"top_p":0}}', 5),
        ('{"type":"complete","id":5,"prompt":"x","options":{"stop":[""]}}', 5),
        ('{"type":"complete","id":5,"prompt":"x","options":{"logprobs":101}}', 5),
        ('{"type":"complete","id":5,"prompt":"x","timeout_s":0}', 5),
        ('{"type":"complete","id":5,"prompt":"x","timeout_s":1e999}', 5),
        ("[" * 100_000, None),
    ],
)
def test_what_is_no_request_is_malformed_and_says_whose_it_is(text: str, id: int | None) -> None:
    with pytest.raises(a.MalformedMessage) as caught:
        x.read_request(text)
    assert caught.value.id == id


@pytest.mark.parametrize(
    "message",
    [
        x.Started(id=1, prompt_tokens=3),
        x.Token(id=1, index=0, step=Step(5, "é", -0.5, ((5, "é", -0.5), (6, "f", -2.0)), "stop", "é")),
        x.Token(id=1, index=1, step=Step(5, "")),
        x.Done(id=1, finish_reason="length", prompt_tokens=1, completion_tokens=2),
        x.Scores(id=1, tokens=(ScoredToken(1, "a", 0, None), ScoredToken(2, "b", 1, -1.0, ((2, "b", -1.0),)))),
        x.Tokens(id=1, ids=(1, 2)),
        x.Failed(id=None, code="bad_request", message="no"),
        x.Failed(id=1, code="context_length_exceeded", message="x", prompt_tokens=5, max_context_tokens=4),
        x.Pong(id=1),
    ],
)
def test_replies_are_read_as_they_were_written(message: x.Reply) -> None:
    assert x.read_reply(x.write(message)) == message


@pytest.mark.parametrize(
    "text",
    [
        "Hello!",
        "{}",
        '{"type":"token","id":1,"index":0}',
        '{"type":"token","id":1,"index":0,"step":{"id":1,"text":5}}',
        '{"type":"done","id":1,"finish_reason":"tired","prompt_tokens":1,"completion_tokens":1}',
        '{"type":"error","id":1,"code":"sad","message":""}',
        '{"type":"scores","id":1,"tokens":[{"id":1,"text":"a","text_offset":0,"logprob":NaN}]}',
    ],
)
def test_what_is_no_reply_is_malformed(text: str) -> None:
    with pytest.raises(a.MalformedMessage):
        x.read_reply(text)


def test_options_that_were_not_given_are_the_models_own() -> None:
    assert x.Options().resolve(FACTS) == GenerateOptions(None, 0.6, 0.9, 40)
    given = x.Options(
        max_tokens=1, temperature=0.0, top_p=0.5, top_k=0, seed=7, stop=("x",), logprobs=0, ignore_eos=True
    )
    assert given.resolve(FACTS) == GenerateOptions(1, 0.0, 0.5, 0, 7, ("x",), 0, True)


def test_minus_infinity_becomes_a_number_that_json_has() -> None:
    infinite = -float("inf")
    step = x.finite(Step(1, "a", infinite, ((1, "a", infinite), (2, "b", -1.0))))
    assert step == Step(1, "a", -9999.0, ((1, "a", -9999.0), (2, "b", -1.0)))
    assert x.finite_score(ScoredToken(1, "a", 0, None, ((1, "a", float("nan")),))).top == ((1, "a", -9999.0),)


def test_the_document_names_every_message_field_and_code() -> None:
    known = set(re.findall(r"[a-z_0-9]+", TEXT))
    kinds: list[Any] = [*get_args(x.Request), *get_args(x.Reply), x.Options, a.HelloReply, a.PlainRequest, a.Hello]
    for kind in kinds:
        assert set(kind.model_fields) <= known, kind
        if "type" in kind.model_fields:
            assert f"| `{kind.model_fields['type'].default}` |" in TEXT
    for name in (*DeviceFacts.__dataclass_fields__, *Step.__dataclass_fields__, *ScoredToken.__dataclass_fields__):
        assert name in known, name
    for code in get_args(x.ErrorCode):
        assert f"| `{code}` |" in TEXT
