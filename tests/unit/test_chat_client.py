"""The conversation of `edgetool chat` with servers that are not ours, and with answers that end early."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from edgetool import chat_client
from edgetool.config import ChatConfig
from edgetool.errors import BackendFailed, ConfigError, EdgetoolError
from edgetool.progress import NullProgress
from tests.fakes.openai_server import Running, Stranger


def once(url: str, key: str | None = None, **settings: Any) -> tuple[dict[str, Any], str]:
    """The result of one question, and what was said meanwhile."""
    said: list[str] = []
    given = ChatConfig(url=url, message="hi", **settings)
    with chat_client.open_talker(given, key, NullProgress()) as talker:
        return chat_client.ask_once(talker, given, said.append), "".join(said)


def test_an_answer_is_said_as_it_comes_and_measured() -> None:
    stranger = Stranger(each_s=0.02, text="word")
    with Running(stranger) as running:
        result, said = once(running.url, max_tokens=5, temperature=0.5, seed=7, system="be short")
    assert result["answer"] == "word " * 5 and said == result["answer"] + "\n"
    assert (result["completion_tokens"], result["model"]) == (5, "fake")
    # by the reader's clock: what comes late on a busy machine comes the faster afterwards
    assert 0 < result["first_token_s"] < result["seconds"]
    assert result["tokens_per_s"] > 4 / (result["seconds"] - result["first_token_s"])
    body = stranger.seen[-1][1]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 5)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_a_key_that_is_refused_and_a_server_that_fails_are_said() -> None:
    with Running(Stranger(key="right")) as running:
        assert once(running.url, "right", max_tokens=2)[0]["completion_tokens"] == 2
        with pytest.raises(ConfigError, match="refuses the key"):
            once(running.url, "wrong")
    with Running(Stranger(failing=True)) as running, pytest.raises(BackendFailed, match="answers 500"):
        once(running.url)
    with Running(Stranger(cut_after=2)) as running, pytest.raises(EdgetoolError):
        once(running.url, max_tokens=5)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (b'data:{"choices":[{"delta":{"content":"ok"}}]}\n\ndata:[DONE]\n\n', "ok"),  # the space is optional
        (b'data: {"choices":[{"delta":{"content":"ok"},"finish_reason":"stop"}]}\n\n', "ok"),
        (b': ping\r\n\r\ndata: {"choices":[{"delta":{"content":"ok"}}]}\r\n\r\ndata: [DONE]\r\n\r\n', "ok"),
        (b'data: {"choices":null,"usage":null}\n\ndata: [DONE]\n\n', ""),
        (b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n', "the answer has no end"),
        (b"", "the answer has no end"),
        (b'data: {"error":"boom"}\n\n', "in the middle of the answer: boom"),
        (b'data: {"error":{"message":"boom"}}\n\n', "in the middle of the answer: boom"),
        (b"data: 5\n\n", "does not answer in OpenAI's form"),
    ],
)
def test_streams_are_read_as_servers_write_them_and_one_without_an_end_is_no_answer(events: bytes, said: str) -> None:
    class Says(Stranger):
        async def _complete(self, path: str, body: dict[str, Any], receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream"), (b"content-length", str(len(events)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": events})

    with Running(Says()) as running:
        if said in ("ok", ""):
            assert once(running.url)[0]["answer"] == said
        else:
            with pytest.raises(EdgetoolError, match=said):
                once(running.url)


class Scripted:
    """Answers from a script; None is Ctrl-C, an error is raised."""

    model = "scripted"

    def __init__(self, *answers: list[str | EdgetoolError | None]) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, str]]] = []
        self.closed = 0

    def answer(self, messages: list[dict[str, str]], speed: chat_client.Speed) -> Iterator[str]:
        self.asked.append(list(messages))
        try:
            for piece in self.answers.pop(0):
                if piece is None:
                    raise KeyboardInterrupt
                if isinstance(piece, EdgetoolError):
                    raise piece
                speed.piece()
                yield piece
        finally:
            self.closed += 1


def test_history_grows_and_what_failed_is_not_part_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talker = Scripted(["one"], ["two", None], [BackendFailed("it broke")], ["four"], ["five"])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\nd\n/new\ne\n"))
    said: list[str] = []
    chat_client.converse(talker, ChatConfig(url="x", system="s"), said.append)
    system = {"role": "system", "content": "s"}
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    stopped = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]
    assert talker.asked[2] == [system, *first, *stopped, {"role": "user", "content": "c"}]
    assert talker.asked[3] == [system, *first, *stopped, {"role": "user", "content": "d"}]  # c had no answer
    assert talker.asked[4] == [system, {"role": "user", "content": "e"}]
    assert "".join(said) == "one\ntwo\nfour\nfive\n" and talker.closed == 5
    told = capsys.readouterr().err
    assert "stopped; 1 tokens" in told and "error: it broke" in told
