"""One request of a client from its admission to its end: pieces of its choices, as the host makes them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgetool.errors import BadInput, EdgetoolError
from edgetool.fpga_service.answers import Answer, Ended, Started
from edgetool.fpga_service.api_answers import Choice, Likely
from edgetool.fpga_service.api_requests import Refusal
from edgetool.fpga_service.device import ContextLengthExceeded, GenerateOptions, Step
from edgetool.fpga_service.host_client import HostClient
from edgetool.fpga_service.host_errors import HostAway, HostBusy, TimedOut
from edgetool.fpga_service.limits import Queue


@dataclass(frozen=True)
class Conversation:
    """Messages to be answered, each with role and content."""

    messages: Sequence[dict[str, str]]


Ask = Conversation | str | list[int]
"""What one choice answers: a conversation, or a prompt (text or token ids) that is gone on with."""


class Counter(Protocol):
    """Counts tokens where the host does not."""

    def prompt(self, ask: Ask) -> int: ...

    def text(self, text: str) -> int: ...


@dataclass(frozen=True)
class Piece:
    """What one step adds to the choice `index`; `finish` with its last piece."""

    index: int
    text: str
    likely: tuple[Likely, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Wish:
    """What a client wants: a choice for each of `asks`.

    tokens: at most so many new ones for each; None: until the context is full; 0: none, prompts are only scored. echo:
    the prompts are part of the choices. param: what OpenAI calls the part that may be too long.
    """

    asks: Sequence[Ask]
    options: GenerateOptions
    tokens: int | None
    param: str
    echo: bool = False


@dataclass
class Exchange:
    """A wish and what has come of it.

    limit_tokens: longest context, where the gateway allows less than the device does. counter: for hosts that do not
    count.
    """

    host: HostClient
    wish: Wish
    timeout_s: float
    limit_tokens: int | None = None
    counter: Counter | None = None
    begun_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    choices: list[Choice] = field(default_factory=list)

    async def pieces(self, queue: Queue) -> AsyncIterator[Piece]:
        """The pieces, choice after choice. Leaving early gives the answer up. Raises Refusal."""
        with queue.place():
            admitted_s = time.monotonic()
            try:
                for index, ask in enumerate(self.wish.asks):
                    choice = Choice()
                    self.choices.append(choice)
                    async for piece in self._one(index, ask, choice):
                        yield piece
            except EdgetoolError as error:
                raise refusal_of(error, self.wish.param) from error
            queue.served((time.monotonic() - admitted_s) / max(1, queue.admitted))

    def usage(self) -> dict[str, int] | None:
        """Tokens of all choices; None where the host does not count."""
        if any(choice.prompt_tokens is None or choice.completion_tokens is None for choice in self.choices):
            return None
        prompt = sum(choice.prompt_tokens or 0 for choice in self.choices)
        made = sum(choice.completion_tokens or 0 for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    @property
    def _left_s(self) -> float:
        left_s = self.begun_s + self.timeout_s - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"no complete answer within {self.timeout_s:g} s")
        return left_s

    async def _one(self, index: int, ask: Ask, choice: Choice) -> AsyncIterator[Piece]:
        if self.wish.echo and not isinstance(ask, Conversation):
            tokens = await self.host.score(ask, self.wish.options.logprobs or 0, timeout_s=self._left_s)
            choice.add_prompt(tokens, ask if isinstance(ask, str) else None)
            self._check_length(choice.prompt_tokens)
            if self.wish.tokens == 0:
                choice.completion_tokens, choice.finish = 0, "length"
                yield Piece(index, choice.text, tuple(choice.likely), choice.finish)
                return
            yield Piece(index, choice.text, tuple(choice.likely))
        elif self.counter is not None and self.host.facts is None:
            choice.prompt_tokens = self.counter.prompt(ask)
            self._check_length(choice.prompt_tokens)
        async with self._ask(ask) as answer:
            async for event in answer:
                if isinstance(event, Started) and event.prompt_tokens is not None:
                    choice.prompt_tokens = event.prompt_tokens
                    self._check_length(event.prompt_tokens)
                elif isinstance(event, Step):
                    piece = self._piece(index, choice, event)
                    yield piece
                    if piece.finish is not None and event.finish is None:
                        return  # the gateway's own limit; leaving stops the host
                elif isinstance(event, Ended):
                    self._end(choice, event)

    def _ask(self, ask: Ask) -> Answer:
        if isinstance(ask, Conversation):
            return self.host.chat(ask.messages, self.wish.options, self._left_s)
        return self.host.complete(ask, self.wish.options, self._left_s)

    def _piece(self, index: int, choice: Choice, step: Step) -> Piece:
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.begun_s
        likely = choice.add(step, () if self.host.facts is None else self.host.facts.eos_token_ids)
        choice.steps += 1
        finish: str | None = step.finish
        if finish is None and self._full(choice):
            finish = choice.finish = "length"
            choice.completion_tokens = choice.steps
        return Piece(index, step.text, () if likely is None else (likely,), finish)

    def _end(self, choice: Choice, ended: Ended) -> None:
        choice.finish = ended.finish
        if ended.prompt_tokens is not None:
            choice.prompt_tokens = ended.prompt_tokens
            choice.completion_tokens = ended.completion_tokens
        elif self.counter is not None:
            choice.completion_tokens = self.counter.text(choice.text)

    def _full(self, choice: Choice) -> bool:
        """Whether the gateway's own limit is reached."""
        limit, prompt_tokens = self.limit_tokens, choice.prompt_tokens
        return limit is not None and prompt_tokens is not None and prompt_tokens + choice.steps >= limit

    def _check_length(self, prompt_tokens: int | None) -> None:
        """Raise where the gateway allows less than the device."""
        if self.limit_tokens is None or prompt_tokens is None:
            return
        needed = prompt_tokens + (1 if self.wish.tokens is None else self.wish.tokens)
        if needed > self.limit_tokens:
            raise ContextLengthExceeded(prompt_tokens, self.wish.tokens, self.limit_tokens)


def refusal_of(error: EdgetoolError, param: str) -> Refusal:
    """The answer to a client whose request ended with `error`."""
    if isinstance(error, ContextLengthExceeded):
        asked = f" and {error.max_tokens} were asked for" if error.max_tokens is not None else ""
        said = (
            f"This model's maximum context length is {error.max_context_tokens} tokens; the {param} "
            f"{'have' if param == 'messages' else 'has'} {error.prompt_tokens}{asked}"
        )
        return Refusal(400, said, param=param, code="context_length_exceeded")
    if isinstance(error, BadInput):
        return Refusal(400, error.message, param=param)
    if isinstance(error, HostBusy):
        return Refusal(429, error.message, code="queue_full", retry_after_s=2)
    if isinstance(error, TimedOut):
        return Refusal(504, error.message, code="timeout")
    if isinstance(error, HostAway):
        return Refusal(503, error.message, code="host_unavailable", retry_after_s=2)
    return Refusal(502, error.message, code="host_failed")
