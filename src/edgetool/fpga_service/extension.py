"""Messages of protocol A's extension (docs/fpga-protocol.md): JSON objects with request ids, both ways."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from edgetool.fpga_service.device import DeviceFacts, Finish, GenerateOptions, ScoredToken, Step
from edgetool.fpga_service.protocol_a import MalformedMessage, Messages, Strict, why_of

MOST_TOP_TOKENS = 100
LOWEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""

RequestId = Annotated[int, Field(ge=0, lt=2**53)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Prompt = str | tuple[TokenId, ...]


class Options(Strict):
    """How an answer is made; what is not given is the model's own. The meanings are those of GenerateOptions."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=64)] = ()
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_TOKENS)] | None = None
    ignore_eos: bool = False

    def resolve(self, facts: DeviceFacts) -> GenerateOptions:
        """The options with the model's own where nothing was said."""
        return GenerateOptions(
            self.max_tokens,
            facts.temperature if self.temperature is None else self.temperature,
            facts.top_p if self.top_p is None else self.top_p,
            facts.top_k if self.top_k is None else self.top_k,
            self.seed,
            self.stop,
            self.logprobs,
            self.ignore_eos,
        )


class _Request(Strict):
    id: RequestId
    timeout_s: Annotated[float, Field(gt=0)] | None = None


class Chat(_Request):
    """Answer a history."""

    type: Literal["chat"] = "chat"
    messages: Messages
    options: Options = Options()


class Complete(_Request):
    """Go on from a prompt: text or token ids."""

    type: Literal["complete"] = "complete"
    prompt: Prompt
    options: Options = Options()


class Score(_Request):
    """Say how likely every token of a prompt is, and the `top` likeliest in its place."""

    type: Literal["score"] = "score"
    prompt: Prompt
    top: Annotated[int, Field(ge=0, le=MOST_TOP_TOKENS)] = 0


class Tokenize(_Request):
    """Give the ids of a text or of a history."""

    type: Literal["tokenize"] = "tokenize"
    text: str | None = None
    messages: Messages | None = None


class Cancel(Strict):
    """Give up the request of this id."""

    type: Literal["cancel"] = "cancel"
    id: RequestId


class Ping(Strict):
    """Say that you are there."""

    type: Literal["ping"] = "ping"
    id: RequestId


Work = Chat | Complete | Score | Tokenize
"""Requests that wait for the device."""
ErrorCode = Literal[
    "bad_request",
    "context_length_exceeded",
    "queue_full",
    "timeout",
    "cancelled",
    "device_failed",
    "shutting_down",
]


class Started(Strict):
    """The device has begun with a request."""

    type: Literal["started"] = "started"
    id: RequestId
    prompt_tokens: int


class Token(Strict):
    """One token of an answer; `index` counts them from 0."""

    type: Literal["token"] = "token"
    id: RequestId
    index: int
    step: Step


class Done(Strict):
    """The end of an answer."""

    type: Literal["done"] = "done"
    id: RequestId
    finish_reason: Finish
    prompt_tokens: int
    completion_tokens: int


class Scores(Strict):
    """The answer to `score`."""

    type: Literal["scores"] = "scores"
    id: RequestId
    tokens: tuple[ScoredToken, ...]


class Tokens(Strict):
    """The answer to `tokenize`."""

    type: Literal["tokens"] = "tokens"
    id: RequestId
    ids: tuple[TokenId, ...]


class Failed(Strict):
    """A request that ends without its answer; id None: what was meant could not be read.

    prompt_tokens and max_context_tokens come with context_length_exceeded.
    """

    type: Literal["error"] = "error"
    id: RequestId | None = None
    code: ErrorCode
    message: str
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_context_tokens: int | None = None


class Pong(Strict):
    """The answer to `ping`."""

    type: Literal["pong"] = "pong"
    id: RequestId


Request = Work | Cancel | Ping
Reply = Started | Token | Done | Scores | Tokens | Failed | Pong

_REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="type")])
_REPLIES: TypeAdapter[Reply] = TypeAdapter(Annotated[Reply, Field(discriminator="type")])


def read_request(text: str) -> Request:
    """What a gateway asks in the extension. Raises MalformedMessage, with the id where one can be read."""
    try:
        return _REQUESTS.validate_json(text)
    except ValidationError as error:
        raise MalformedMessage(why_of(error), _id_in(text)) from error


def read_reply(text: str) -> Reply:
    """What a host says in the extension. Raises MalformedMessage."""
    try:
        return _REPLIES.validate_json(text)
    except ValidationError as error:
        raise MalformedMessage(why_of(error)) from error


def write(message: Request | Reply) -> str:
    """The text of a message of the extension."""
    # the null of a first token without logprob is said, every other stands for "not given"
    return message.model_dump_json(exclude_none=not isinstance(message, Scores))


def finite(step: Step) -> Step:
    """`step` with log-probabilities that JSON can hold."""
    if step.logprob is None and not step.top:
        return step
    logprob = None if step.logprob is None else _finite(step.logprob)
    return replace(step, logprob=logprob, top=tuple((id, text, _finite(value)) for id, text, value in step.top))


def finite_score(token: ScoredToken) -> ScoredToken:
    """`token` with log-probabilities that JSON can hold."""
    logprob = None if token.logprob is None else _finite(token.logprob)
    return replace(token, logprob=logprob, top=tuple((id, text, _finite(value)) for id, text, value in token.top))


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def _id_in(text: str) -> int | None:
    try:
        found = json.loads(text).get("id")
    except (ValueError, RecursionError, AttributeError):
        return None
    return found if type(found) is int and 0 <= found < 2**53 else None
