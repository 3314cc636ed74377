"""Messages of protocol A and of its extension (docs/fpga-protocol.md): what the texts in the frames say.

Plain A asks in JSON and is answered in plain text. The extension begins with a request that plain hosts can answer too,
and speaks in JSON objects with request ids both ways afterwards. No sockets here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from edgetool.fpga_service.device import DeviceFacts, Finish, GenerateOptions, ScoredToken, Step
from edgetool.fpga_service.frames import ProtocolError

VERSION = 1
"""Of the extension."""
PLAIN_MAX_TOKENS = 1024
"""Of a plain request that does not say, as the first gateway asks: an answer that rambles must end some time."""
MOST_TOP_TOKENS = 100
LOWEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


class MalformedMessage(ProtocolError):
    """A frame whose text is no message. `id`: of the request it belongs to, where it says so."""

    def __init__(self, message: str, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id


def _plain_text(content: Any) -> Any:
    """OpenAI's content as text: parts of text are joined, none is empty; everything else is refused."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("parts other than text")
        return "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, str):
        content.encode()  # raises for lone surrogates, which no tokenizer takes
    return "" if content is None else content


class _Record(BaseModel):
    """Unknown keys are let pass, so that later versions can add some."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class _Strict(_Record):
    model_config = ConfigDict(strict=True)


class ChatMessage(_Record):
    """One message of a history; content is text."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, BeforeValidator(_plain_text)] = ""


Messages = Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
RequestId = Annotated[int, Field(ge=0, lt=2**53)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Prompt = str | tuple[TokenId, ...]


class Hello(_Strict):
    """What a gateway that knows the extension puts into its first request."""

    hello: Annotated[int, Field(ge=1)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{16,128}$")]


class PlainRequest(_Record):
    """A request of plain A. Gateways pass on what their users sent, so null counts as not given."""

    messages: Messages
    model: Any = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    edgetool: Hello | None = None

    def options(self, facts: DeviceFacts) -> GenerateOptions:
        """How to answer, with the model's own where nothing was said."""
        temperature = facts.temperature if self.temperature is None else self.temperature
        return GenerateOptions(self.max_tokens or PLAIN_MAX_TOKENS, temperature, facts.top_p, facts.top_k)


class HelloReply(_Strict):
    """What a host that knows the extension answers: `proof` is the SHA-256 of the nonce, which no model would write."""

    hello: Annotated[int, Field(ge=1)]
    proof: str
    host: str
    facts: DeviceFacts
    max_queue: int


class Options(_Strict):
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


class _Request(_Strict):
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


class Cancel(_Strict):
    """Give up the request of this id."""

    type: Literal["cancel"] = "cancel"
    id: RequestId


class Ping(_Strict):
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


class Started(_Strict):
    """The device has begun with a request."""

    type: Literal["started"] = "started"
    id: RequestId
    prompt_tokens: int


class Token(_Strict):
    """One token of an answer; `index` counts them from 0."""

    type: Literal["token"] = "token"
    id: RequestId
    index: int
    step: Step


class Done(_Strict):
    """The end of an answer."""

    type: Literal["done"] = "done"
    id: RequestId
    finish_reason: Finish
    prompt_tokens: int
    completion_tokens: int


class Scores(_Strict):
    """The answer to `score`."""

    type: Literal["scores"] = "scores"
    id: RequestId
    tokens: tuple[ScoredToken, ...]


class Tokens(_Strict):
    """The answer to `tokenize`."""

    type: Literal["tokens"] = "tokens"
    id: RequestId
    ids: tuple[TokenId, ...]


class Failed(_Strict):
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


class Pong(_Strict):
    """The answer to `ping`."""

    type: Literal["pong"] = "pong"
    id: RequestId


Request = Work | Cancel | Ping
Reply = Started | Token | Done | Scores | Tokens | Failed | Pong

_REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="type")])
_REPLIES: TypeAdapter[Reply] = TypeAdapter(Annotated[Reply, Field(discriminator="type")])


def read_plain(text: str) -> PlainRequest:
    """A request of plain A: a JSON object or, as the oldest clients send it, the question itself.

    Raises MalformedMessage.
    """
    if not text.lstrip().startswith("{"):
        if not text.strip():
            raise MalformedMessage("an empty question")
        return PlainRequest(messages=(ChatMessage(role="user", content=text),))
    try:
        return PlainRequest.model_validate_json(text)
    except ValidationError as error:
        raise MalformedMessage(_why(error)) from error


def write_plain(messages: Sequence[Mapping[str, Any]], model: str | None, options: GenerateOptions) -> str:
    """A request of plain A, with the four keys that hosts of the first kind know."""
    return json.dumps(
        {
            "model": model,
            "messages": list(messages),
            "temperature": options.temperature,
            "max_tokens": options.max_tokens or PLAIN_MAX_TOKENS,
        }
    )


def write_hello(nonce: str) -> str:
    """The first request of a gateway that knows the extension: to a plain host, a short question."""
    asked = {"role": "user", "content": "Hi"}
    request = {"model": None, "messages": [asked], "temperature": 0, "max_tokens": 1}
    return json.dumps({**request, "edgetool": {"hello": VERSION, "nonce": nonce}})


def proof_of(nonce: str) -> str:
    """What shows that a host has understood the hello: SHA-256 of the nonce's ASCII characters, in hexadecimal."""
    return hashlib.sha256(nonce.encode("ascii")).hexdigest()


def write_hello_reply(nonce: str, facts: DeviceFacts, host: str, max_queue: int) -> str:
    """The host's answer to a hello."""
    reply = HelloReply(hello=VERSION, proof=proof_of(nonce), host=host, facts=facts, max_queue=max_queue)
    return json.dumps({"edgetool": reply.model_dump(mode="json")})


def read_hello_reply(text: str, nonce: str) -> HelloReply | None:
    """The host's answer to a hello; None when it is the answer of a model, so that the host is a plain one.

    Raises MalformedMessage where the proof is right and the rest cannot be used.
    """
    try:
        said = json.loads(text)["edgetool"]
        right = hmac.compare_digest(str(said["proof"]).encode(errors="replace"), proof_of(nonce).encode())
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    if not right:
        return None
    try:
        return HelloReply.model_validate_json(json.dumps(said))
    except ValidationError as error:
        raise MalformedMessage(_why(error)) from error


def read_request(text: str) -> Request:
    """What a gateway asks in the extension. Raises MalformedMessage, with the id where one can be read."""
    try:
        return _REQUESTS.validate_json(text)
    except ValidationError as error:
        raise MalformedMessage(_why(error), _id_in(text)) from error


def read_reply(text: str) -> Reply:
    """What a host says in the extension. Raises MalformedMessage."""
    try:
        return _REPLIES.validate_json(text)
    except ValidationError as error:
        raise MalformedMessage(_why(error)) from error


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


def _why(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _id_in(text: str) -> int | None:
    try:
        found = json.loads(text).get("id")
    except (ValueError, RecursionError, AttributeError):
        return None
    return found if type(found) is int and 0 <= found < 2**53 else None
