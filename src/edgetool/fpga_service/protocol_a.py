"""Messages of plain protocol A and of the hello (docs/fpga-protocol.md): what the texts in the frames say.

Plain A asks in JSON and is answered in plain text. The hello is a request that plain hosts can answer too; what comes
after it is in extension.py. No sockets here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from edgetool.fpga_service.device import DeviceFacts, GenerateOptions
from edgetool.fpga_service.frames import ProtocolError

VERSION = 1
"""Of the extension."""
PLAIN_MAX_TOKENS = 1024
"""Of a plain request that does not say, as the first gateway asks: an answer that rambles must end some time."""


class MalformedMessage(ProtocolError):
    """A frame whose text is no message. `id`: of the request it belongs to, where it says so."""

    def __init__(self, message: str, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id


def _plain_text(content: Any) -> Any:
    """OpenAI's content as text: parts of text are joined, null is no text; everything else is refused."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("parts other than text")
        content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, str):
        content.encode()  # raises for lone surrogates, which no tokenizer takes
    return "" if content is None else content


class Record(BaseModel):
    """Unknown keys are let pass, so that later versions can add some."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Strict(Record):
    """Values are of the type that the document says, and of no other that could be made into it."""

    model_config = ConfigDict(strict=True)


class ChatMessage(Record):
    """One message of a history; content is text."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str, BeforeValidator(_plain_text)] = ""


Messages = Annotated[tuple[ChatMessage, ...], Field(min_length=1)]


class Hello(Strict):
    """What a gateway that knows the extension puts into its first request."""

    hello: Annotated[int, Field(ge=1)]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{16,128}$")]


class PlainRequest(Record):
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


class HelloReply(Strict):
    """What a host that knows the extension answers: `proof` is the SHA-256 of the nonce, which no model would write."""

    hello: Annotated[int, Field(ge=1)]
    proof: str
    host: str
    facts: DeviceFacts
    max_queue: int


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
        raise MalformedMessage(why_of(error)) from error


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
        raise MalformedMessage(why_of(error)) from error


def why_of(error: ValidationError) -> str:
    """The first thing that is wrong, in words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
