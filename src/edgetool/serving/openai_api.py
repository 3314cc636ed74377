"""The part of the OpenAI API that the fallback engine speaks: requests that are checked, answers and chunks.

Field names and shapes are those of OpenAI's API reference (chat completions, completions, models). What the engine
cannot do (several choices, log-probabilities, tools, penalties, JSON mode) is refused instead of ignored, since its
absence changes results.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions when it is not given, as in OpenAI's reference."""


NOT_HONOURED = (
    ("tools", "tools are not supported"),
    ("functions", "functions are not supported"),
    ("audio", "audio is not supported"),
    ("logit_bias", "logit_bias is not supported"),
    ("presence_penalty", "presence_penalty is not supported"),
    ("frequency_penalty", "frequency_penalty is not supported"),
    ("suffix", "suffix is not supported"),
)
"""Parameters of OpenAI's that change the answer and that no engine of edgetool's own has, and what is said of them."""

DONE = b"data: [DONE]\n\n"
"""Ends a stream of events."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of request share. Unknown fields are let pass, as OpenAI servers do."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1)
    logprobs: bool | int | None = None
    echo: bool | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def unsupported(self) -> str | None:
        """The first thing in the request that this engine cannot do."""
        if (self.n or 1) > 1 or (self.best_of or 1) > 1:
            return "n and best_of must be 1"
        if self.logprobs is not None and self.logprobs is not False:
            return "logprobs are not supported"
        if self.echo:
            return "echo is not supported"
        return next((said for name, said in NOT_HONOURED if getattr(self, name, None)), None)


class CompletionRequest(Common):
    """POST /v1/completions; a prompt is text or token ids, one or several."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        return prompts_of(self.prompt)


class Message(BaseModel):
    """One message of a conversation. What else is in it (a name, calls of tools) is the chat template's to read."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: str


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    def unsupported(self) -> str | None:
        if self.response_format is not None and self.response_format.type != "text":
            return f"response_format {self.response_format.type!r} is not supported, only 'text'"
        return super().unsupported()


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt, text or token ids, for each choice."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def stream_event(document: dict[str, Any]) -> bytes:
    """A document as one of a stream's events; DONE is the last."""
    return f"data: {json.dumps(document)}\n\n".encode()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage record."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Shapes:
    """Answers to one request, whole or in chunks."""

    def __init__(self, kind: Literal["chat", "text"], model: str) -> None:
        self.kind = kind
        self.model = model
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def _record(self, what: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": what, "created": self.created, "model": self.model, "choices": choices}

    def whole(
        self, answers: Sequence[tuple[str, str]], used: dict[str, int] | None, logprobs: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """The answer; `answers` are (text, finish_reason), `logprobs` a record for each of them or nothing."""
        choices = []
        for index, (text, finish) in enumerate(answers):
            said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            likely = logprobs[index] if logprobs else None
            choices.append({"index": index, **said, "logprobs": likely, "finish_reason": finish})
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._record(name, choices), "usage": used}

    def chunk(
        self, index: int, text: str, finish: str | None, *, first: bool = False, logprobs: Any = None
    ) -> dict[str, Any]:
        """One chunk of a stream; the first of a chat names the role."""
        if self.kind == "chat":
            delta: dict[str, Any] = {"role": "assistant", "content": text} if first else {"content": text}
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return self._record("chat.completion.chunk", [choice])
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return self._record("text_completion", [choice])

    def usage_chunk(self, used: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where stream_options ask for it."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._record(name, []), "usage": used}


def error(message: str, code: int, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
