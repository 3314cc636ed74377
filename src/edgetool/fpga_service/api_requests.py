"""What clients may ask the gateway: the bodies of its routes, checked. Names and meanings are those of OpenAI's API.

Unknown fields are let pass. Known ones that the device cannot honour are refused by name, since an answer without them
would be another answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgetool.serving.openai_api import (
    DEFAULT_COMPLETION_TOKENS,
    NOT_HONOURED,
    ResponseFormat,
    StreamOptions,
    prompts_of,
)

MOST_PROMPTS = 128
MOST_STOPS = 32
MOST_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Stop = Annotated[str, Field(max_length=1024)]


class Refusal(Exception):
    """A request that cannot be served, in OpenAI's words: status, message, parameter, code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Common(BaseModel):
    """What chat and completion requests share."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in given if word)

    @property
    def with_usage(self) -> bool:
        """Whether a stream is to end with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise Refusal for what cannot be honoured."""
        if (self.n or 1) > 1:
            raise Refusal(400, "n must be 1: one answer at a time", param="n", code="unsupported_value")
        for name, message in NOT_HONOURED:
            if getattr(self, name, None):
                raise Refusal(400, message, param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options are allowed only with stream: true", param="stream_options")


class TextPart(BaseModel):
    """A part of a message. Others than text exist, and are refused with their name."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to name; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.response_format is not None and self.response_format.type != "text":
            said = f"response_format {self.response_format.type!r} is not supported, only 'text'"
            raise Refusal(400, said, param="response_format", code="unsupported_value")
        if any(modality != "text" for modality in self.modalities or ()):
            raise Refusal(400, "only text can be answered", param="modalities", code="unsupported_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")

    def history(self) -> list[dict[str, str]]:
        """The messages as role and text. Raises Refusal for what is no text, such as images."""
        return [_plain(position, message) for position, message in enumerate(self.messages)]


class CompletionRequest(Common):
    """POST /v1/completions; a prompt is text or token ids, one or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if (self.best_of or 1) > 1:
            raise Refusal(400, "best_of must be 1: one answer at a time", param="best_of", code="unsupported_value")
        if self.max_tokens == 0 and not self.echo:
            raise Refusal(400, "max_tokens 0 makes sense with echo only", param="max_tokens")

    @property
    def tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One prompt for each choice."""
        return prompts_of(self.prompt)


def _plain(position: int, message: Message) -> dict[str, str]:
    where = f"messages[{position}]"
    if message.role in ("tool", "function"):
        raise Refusal(400, f"{where}: role {message.role!r} is not supported: there are no tools", param="messages")
    text = message.content
    if isinstance(text, list):
        for part in text:
            if part.type != "text" or part.text is None:
                said = f"{where}: a part of type {part.type!r} is not supported; messages may hold text only"
                raise Refusal(400, said, param="messages", code="unsupported_value")
        text = "".join(part.text or "" for part in text)
    # developer is what OpenAI now calls system; templates of open models know the old name
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text or ""}
