"""`edgetool chat`: a conversation in the terminal, with a server or with an image in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from edgetool.config import ChatConfig
from edgetool.errors import BackendFailed, BadInput, ConfigError, EdgetoolError, ResourceUnavailable
from edgetool.loadtest.client import DONE, base_url, event_data, failure_of, find_model, open_client
from edgetool.messages import translated
from edgetool.progress import Progress

HELP = "/new begins again, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_CONNECT_LIMIT_S = 10.0
_THERE = "is the server still there?"

Messages = list[dict[str, str]]
Say = Callable[[str], None]


@dataclass
class Speed:
    """How fast an answer came. Counts are None where the server does not count; times: seconds since the question."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    pieces: int = 0
    first_s: float | None = None
    last_s: float | None = None
    begun_s: float = field(default_factory=time.monotonic)

    def piece(self) -> None:
        """A piece of text has come."""
        self.last_s = time.monotonic() - self.begun_s
        self.first_s = self.last_s if self.first_s is None else self.first_s
        self.pieces += 1

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token; None for an answer that has no second one."""
        tokens = self.pieces if self.completion_tokens is None else self.completion_tokens
        if self.first_s is None or self.last_s is None or tokens < 2 or self.last_s <= self.first_s:
            return None
        return (tokens - 1) / (self.last_s - self.first_s)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": self.finish_reason,
            "first_token_s": self.first_s,
            "tokens_per_s": self.tokens_per_s,
            "seconds": time.monotonic() - self.begun_s,
        }

    def __str__(self) -> str:
        tokens = self.pieces if self.completion_tokens is None else self.completion_tokens
        rate = self.tokens_per_s
        parts = [f"{tokens} tokens"] + ([] if rate is None else [f"{rate:.1f} tokens/s"])
        return ", ".join(parts + ([] if self.first_s is None else [f"first after {self.first_s:.2f} s"]))


class Talker(Protocol):
    """Whoever answers."""

    model: str

    def answer(self, messages: Messages, speed: Speed) -> Iterator[str]:
        """The text of an answer as it comes; `speed` is filled in. Raises EdgetoolError."""
        ...


@contextlib.contextmanager
def open_talker(settings: ChatConfig, key: str | None, progress: Progress) -> Iterator[Talker]:
    """Whoever the settings name.

    Raises:
        ResourceUnavailable, ConfigError, BadInput: nothing answers at the address, the key is refused, there is no such
            model, or the image cannot be used.
    """
    if settings.image is not None:
        yield _ImageTalker(settings, progress)
        return
    assert settings.url is not None
    url = base_url(settings.url)
    model = asyncio.run(_find_model(url, settings.model, key))
    limits = httpx.Timeout(settings.timeout_s, connect=_CONNECT_LIMIT_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=limits) as client:
        yield _HttpTalker(client, model, settings)


async def _find_model(url: str, wanted: str | None, key: str | None) -> str:
    async with open_client(key, _CONNECT_LIMIT_S) as client:
        return await find_model(client, url, wanted)


class _HttpTalker:
    def __init__(self, client: httpx.Client, model: str, settings: ChatConfig) -> None:
        self.model = model
        self._client = client
        given = settings.model_dump(include={"temperature", "top_p", "max_tokens", "seed"}, exclude_none=True)
        self._options = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **given}

    def answer(self, messages: Messages, speed: Speed) -> Iterator[str]:
        body = {**self._options, "messages": messages}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refused(response)
                whole = False
                for line in response.iter_lines():
                    data = event_data(line)
                    if data == DONE:
                        whole = True
                    elif data is not None:
                        yield from _read(json.loads(data), speed)
                if not whole and speed.finish_reason is None:
                    raise ResourceUnavailable(f"{self._client.base_url} broke off: the answer has no end", _THERE)
        except httpx.HTTPError as error:
            what = f"{self._client.base_url} broke off: {type(error).__name__} {error}".rstrip()
            raise ResourceUnavailable(what, _THERE) from error
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise BackendFailed(f"{self._client.base_url} does not answer in OpenAI's form: {error!r}") from error


def _read(event: dict[str, Any], speed: Speed) -> Iterator[str]:
    if "error" in event:
        raise BackendFailed(f"the server failed in the middle of the answer: {failure_of(event)}")
    usage = event.get("usage")
    if usage:
        speed.prompt_tokens, speed.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    for choice in event.get("choices") or ():
        speed.finish_reason = choice.get("finish_reason") or speed.finish_reason
        text = choice["delta"].get("content")
        if text:
            speed.piece()
            yield str(text)


def _refused(response: httpx.Response) -> EdgetoolError:
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = response.text[:300]
    words = f"{response.url.host}:{response.url.port} answers {response.status_code}: {said}"
    if response.status_code in (401, 403):
        return ConfigError(words, "set EDGETOOL_API_KEY, or use --api-key")
    if response.status_code in (429, 503, 504):
        return ResourceUnavailable(words, "ask again in a moment")
    return BadInput(words) if response.status_code < 500 else BackendFailed(words)


class _ImageTalker:
    """The simulator in this process: no server, no port, nobody else."""

    def __init__(self, settings: ChatConfig, progress: Progress) -> None:
        from edgetool.fpga_service.preparing import need_simulator

        need_simulator("chat")
        from edgetool.fpga_service.simulator_device import open_device

        assert settings.image is not None
        with progress.task(f"load {settings.image}", 1) as task:
            self._device = open_device(
                settings.image, numerics=settings.numerics, device=settings.device, threads=settings.threads
            )
            task.advance(1)
        self.model = self._device.facts.model
        self._settings = settings

    def answer(self, messages: Messages, speed: Speed) -> Iterator[str]:
        from edgetool.fpga_service.device import GenerateOptions

        given, own = self._settings, self._device.facts
        options = GenerateOptions(
            given.max_tokens,
            own.temperature if given.temperature is None else given.temperature,
            own.top_p if given.top_p is None else given.top_p,
            own.top_k,
            given.seed,
        )
        prompt = self._device.encode_chat(messages)
        speed.prompt_tokens, speed.completion_tokens = len(prompt), 0
        for step in self._device.generate(prompt, options, lambda: False):
            speed.completion_tokens += 1
            speed.finish_reason = step.finish
            if step.text:
                speed.piece()
                yield step.text


def ask_once(talker: Talker, settings: ChatConfig, say: Say | None) -> dict[str, Any]:
    """One question and its answer, said as it comes where somebody listens. Raises EdgetoolError."""
    messages = [*_beginning(settings), {"role": "user", "content": settings.message or ""}]
    speed, text = Speed(), ""
    for piece in talker.answer(messages, speed):
        text += piece
        if say is not None:
            say(piece)
    if say is not None:
        say("\n")
    return {"model": talker.model, "answer": text, **speed.to_dict()}


def converse(talker: Talker, settings: ChatConfig, say: Say) -> None:
    """Questions from stdin, answers to `say`, everything else to stderr, until the questions end."""
    history = _beginning(settings)
    _note(f"{talker.model}: {HELP}")
    while (question := _next_question()) is not None:
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            history = _beginning(settings)
            _note("a new conversation")
        elif question.startswith("/"):
            _note(HELP)
        elif question:
            history = _turn(talker, [*history, {"role": "user", "content": question}], say) or history


def _turn(talker: Talker, messages: Messages, say: Say) -> Messages | None:
    """The history after one answer; None where there was none."""
    speed, text = Speed(), ""
    pieces = talker.answer(messages, speed)
    try:
        for piece in pieces:
            text += piece
            say(piece)
        say("\n")
        _note(str(speed))
    except KeyboardInterrupt:
        say("\n")
        _note(f"stopped; {speed}")
    except EdgetoolError as error:
        if text:
            say("\n")
        _note(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        return None
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()  # a stream that is left early is closed now, so that the server stops
    return [*messages, {"role": "assistant", "content": text}]


def _beginning(settings: ChatConfig) -> Messages:
    return [] if settings.system is None else [{"role": "system", "content": settings.system}]


def _next_question() -> str | None:
    """The next line, with line editing on a terminal; None at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    # while a command runs, stdout is kept for its result; editing needs the terminal's own
    with contextlib.redirect_stdout(sys.__stdout__ or sys.stderr):
        try:
            return input("> ").strip()
        except EOFError:
            _note("")
            return None


def _note(text: str) -> None:
    sys.stderr.write(f"{translated(text)}\n")
    sys.stderr.flush()
