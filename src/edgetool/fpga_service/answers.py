"""One request to a host, as the gateway sees it: events that come until the last, an error, or the end of its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from edgetool.errors import EdgetoolError
from edgetool.fpga_service.device import Finish, ScoredToken, Step
from edgetool.fpga_service.host_errors import TimedOut

PLAIN_TOKEN = -1
"""Id of the one Step that a plain host's whole answer is."""


@dataclass(frozen=True)
class Started:
    """The device has begun. prompt_tokens: None from a plain host, which does not count."""

    prompt_tokens: int | None


@dataclass(frozen=True)
class Ended:
    """The answer is complete. The counts are None from a plain host."""

    finish: Finish
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Scored:
    """The answer to a request for scores."""

    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Encoded:
    """The answer to a request for token ids."""

    ids: tuple[int, ...]


Event = Started | Step | Ended | Scored | Encoded


class Way(Protocol):
    """How an answer's request gets out, and is given up."""

    def give_up(self, answer: Answer) -> None:
        """The answer is of no use any more: nothing may reach it, and the host should stop."""
        ...


class Answer:
    """The events of one request. Use it as

        async with client.chat(...) as answer:
            async for event in answer: ...

    The request goes out at the beginning of the block, and leaving the block before the end gives it up, so that the
    host stops. Iterating raises an EdgetoolError when the request fails (host_errors.py, ContextLengthExceeded).
    """

    def __init__(self, send: Callable[[Answer], Awaitable[Way]], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.tokens = 0
        """Steps so far."""
        self._send = send
        self._way: Way | None = None
        self._events: asyncio.Queue[Event | EdgetoolError] = asyncio.Queue()
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self._begun_s = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing can come any more."""
        return self._over

    @property
    def left_s(self) -> float:
        """What is left of its time."""
        return max(0.0, self._begun_s + self.timeout_s - asyncio.get_running_loop().time())

    def put(self, event: Event) -> None:
        """For connections: what the host said."""
        if self._over:
            return
        if isinstance(event, Step):
            self.tokens += 1
        elif not isinstance(event, Started):
            self._finish()
        self._events.put_nowait(event)

    def fail(self, error: EdgetoolError) -> None:
        """For connections: the request has failed."""
        if not self._over:
            self._finish()
            self._events.put_nowait(error)

    async def __aenter__(self) -> Answer:
        loop = asyncio.get_running_loop()
        self._begun_s = loop.time()
        self._timer = loop.call_later(self.timeout_s, self._expire)
        try:
            async with asyncio.timeout(self.timeout_s):
                self._way = await self._send(self)
        except TimeoutError:
            self._expire()
        except BaseException:
            self._finish()
            raise
        if self._over and self._way is not None:  # its time ended while it went out
            self._way.give_up(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._over:
            self._finish()
            if self._way is not None:
                self._way.give_up(self)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Event:
        if self._over and self._events.empty():
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, EdgetoolError):
            raise event
        return event

    def _expire(self) -> None:
        if self._over:
            return
        why = f"no complete answer within {self.timeout_s:g} s"
        self.fail(TimedOut(why, "ask for fewer tokens, or give it more time"))
        if self._way is not None:
            self._way.give_up(self)

    def _finish(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
