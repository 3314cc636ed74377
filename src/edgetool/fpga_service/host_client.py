"""The gateway's side of protocol A: one host, connected again whenever it is lost, asked by many requests at once.

Works with any host of protocol A. One that answers the hello streams tokens and counts them, and stops when told to; a
plain one answers one chat at a time, as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from edgetool.fpga_service import extension, protocol_a
from edgetool.fpga_service.answers import Answer, Encoded, Ended, Event, Scored, Started, Way
from edgetool.fpga_service.device import DeviceFacts, GenerateOptions, ScoredToken, Step
from edgetool.fpga_service.frames import ProtocolError
from edgetool.fpga_service.host_connection import ExtendedConnection, PlainConnection, Wire, absorb
from edgetool.fpga_service.host_errors import HostAway, HostFailed, RequestRefused

__all__ = ["Answer", "Encoded", "Ended", "Event", "HostClient", "Scored", "Started", "Step"]

State = Literal["connecting", "away", "plain", "extended"]

_Made = TypeVar("_Made")
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_ASK_AGAIN_S = 60.0
"""A plain host that closes unused connections is asked no more often whether it still is one."""


class HostClient:
    """A host, by its address. Use it as an async context manager; it connects in the background.

    Args:
        host, port: where it listens.
        connect_timeout_s: for the TCP connection.
        hello_timeout_s: for the answer to the hello, which a plain host gives at the speed of its model.
        settle_s: after a request to a plain host that was given up unanswered: how long its reply is waited for on the
            next connection, so that no other request gets it.
        socket: a Unix socket to connect to in place of `port`; `host` is then only what it is called.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout_s: float = 5.0,
        hello_timeout_s: float = 120.0,
        settle_s: float = 30.0,
        socket: Path | None = None,
    ) -> None:
        self.address = f"{host}:{port}" if socket is None else host
        self.connections = 0
        """How many connections were made."""
        self._where = (host, port)
        self._socket = socket
        self._connect_timeout_s = connect_timeout_s
        self._hello_timeout_s = hello_timeout_s
        self._settle_s = settle_s
        self._connection: ExtendedConnection | PlainConnection | None = None
        self._hello: protocol_a.HelloReply | None = None
        self._plain = False
        self._plain_since_s = 0.0
        self._owed = 0
        self._next_id = 1
        self._turn = asyncio.Lock()
        self._decided = asyncio.Event()
        self._why = "not connected yet"
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """connecting: the first attempt, or a plain host's next connection; away: the last attempt failed."""
        if isinstance(self._connection, ExtendedConnection):
            return "extended"
        if self._connection is not None:
            return "plain"
        return "away" if self._decided.is_set() else "connecting"

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self._connection is not None or (self._plain and not self._decided.is_set())

    @property
    def why(self) -> str:
        """Why there is no connection."""
        return self._why

    @property
    def facts(self) -> DeviceFacts | None:
        """What the host said about its device, last; None from a plain host."""
        return None if self._hello is None else self._hello.facts

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the host is connected. Raises HostAway, saying why it is not."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while not self.ready or self._connection is None:
            if loop.time() >= until:
                raise self._away()
            await asyncio.sleep(0.01)

    def chat(self, messages: Sequence[Mapping[str, Any]], options: GenerateOptions, timeout_s: float) -> Answer:
        """Answer a history ({"role", "content": text}): Started, Steps, Ended.

        A plain host's answer is one Step of id -1; it is told of temperature and max_tokens only.
        """
        work = _checked(lambda: extension.Chat(id=0, messages=_messages(messages), options=_options(options)))
        plain = _checked(lambda: protocol_a.write_plain(messages, None, options))
        return Answer(self._sender(work, plain), timeout_s)

    def complete(self, prompt: str | Sequence[int], options: GenerateOptions, timeout_s: float) -> Answer:
        """Go on from a text or from token ids: Started, Steps, Ended. Not with a plain host."""
        work = _checked(lambda: extension.Complete(id=0, prompt=_prompt(prompt), options=_options(options)))
        return Answer(self._sender(work), timeout_s)

    async def score(self, prompt: str | Sequence[int], top: int = 0, *, timeout_s: float) -> tuple[ScoredToken, ...]:
        """Every token of the prompt with its logprob after those before it. Not with a plain host."""
        work = _checked(lambda: extension.Score(id=0, prompt=_prompt(prompt), top=top))
        async with Answer(self._sender(work), timeout_s) as answer:
            async for event in answer:
                if isinstance(event, Scored):
                    return event.tokens
        raise HostFailed(f"{self.address} answered a request for scores with something else")

    async def tokenize(self, what: str | Sequence[Mapping[str, Any]], *, timeout_s: float) -> tuple[int, ...]:
        """The ids of a text or of a history. Not with a plain host."""
        if isinstance(what, str):
            work = _checked(lambda: extension.Tokenize(id=0, text=what))
        else:
            work = _checked(lambda: extension.Tokenize(id=0, messages=_messages(what)))
        async with Answer(self._sender(work), timeout_s) as answer:
            async for event in answer:
                if isinstance(event, Encoded):
                    return event.ids
        raise HostFailed(f"{self.address} answered a request for token ids with something else")

    async def __aenter__(self) -> HostClient:
        self._task = asyncio.create_task(self._stay_connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and with an error every answer that is under way. Harmless when repeated."""
        assert self._task is not None
        if self._connection is not None:
            self._connection.close("the gateway is ending")
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._why = "the gateway is ending"
        self._decided.set()

    def _sender(self, work: extension.Work, plain: str | None = None) -> Callable[[Answer], Awaitable[Way]]:
        async def send(answer: Answer) -> Way:
            await self._decided.wait()
            connection = self._connection
            if isinstance(connection, ExtendedConnection):
                connection.send(answer, work)
                return connection
            if connection is None:
                raise self._away()
            if plain is None:
                raise RequestRefused(
                    f"the host at {self.address} speaks plain A, which knows chats only, not {work.type}"
                )
            return await self._send_plain(answer, plain)

        return send

    async def _send_plain(self, answer: Answer, text: str) -> Way:
        """Wait for the turn: one request at a time, first come first served."""
        async with self._turn:
            await self._decided.wait()
            connection = self._connection
            if connection is None:
                raise self._away()
            if isinstance(connection, ExtendedConnection):
                raise HostAway("the host was replaced while the request waited", "ask again")
            connection.send(answer, text)
            # the next request waits for the next connection
            self._decided.clear()
            return connection

    async def _stay_connected(self) -> None:
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                served = False
                try:
                    connection = await self._connect()
                except (OSError, ProtocolError, EOFError) as error:
                    self._why = f"no connection to {self.address}: {_words(error)}"
                    if isinstance(error, ConnectionRefusedError):  # it ended, and takes what it owed with it
                        self._plain, self._owed = False, 0
                else:
                    served = await self._use(connection)
                if served:
                    pause_s = _FIRST_PAUSE_S
                    if self._plain:
                        continue  # its next connection; requests wait for it
                self._decided.set()
                # many gateways do not all come back at the same moment
                await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))  # noqa: S311
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._decided.set()

    async def _use(self, connection: ExtendedConnection | PlainConnection) -> bool:
        """Let requests have the connection until it ends; whether it served."""
        self.connections += 1
        self._connection = connection
        self._decided.set()
        began_s = asyncio.get_running_loop().time()
        try:
            self._why = f"{self.address}: {await connection.run()}"
        finally:
            connection.close("the gateway is ending")
            self._connection = None
            if isinstance(connection, ExtendedConnection):
                self._next_id = connection.next_id
        now_s = asyncio.get_running_loop().time()
        if isinstance(connection, ExtendedConnection):
            return now_s - began_s > _LONGEST_PAUSE_S
        self._owed += connection.owed
        if connection.usable and now_s - self._plain_since_s > _ASK_AGAIN_S:
            self._plain = False  # it may be another host by now
        return not connection.usable

    async def _connect(self) -> ExtendedConnection | PlainConnection:
        async with asyncio.timeout(self._connect_timeout_s):
            if self._socket is None:
                reader, writer = await asyncio.open_connection(*self._where)
            else:
                reader, writer = await asyncio.open_unix_connection(self._socket)
        wire = Wire(reader, writer)
        try:
            if self._plain:
                if self._owed:
                    await absorb(wire, self._owed, self._settle_s)
                    self._owed = 0
                return PlainConnection(wire)
            connection = await self._say_hello(wire)
        except BaseException:
            wire.abort()
            raise
        if connection is not None:
            return connection
        wire.abort()
        self._plain, self._plain_since_s = True, asyncio.get_running_loop().time()
        return await self._connect()

    async def _say_hello(self, wire: Wire) -> ExtendedConnection | None:
        """The connection with the extension; None when the host is a plain one."""
        nonce = secrets.token_hex(16)
        wire.write(protocol_a.write_hello(nonce))
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                frame = await wire.read()
        except TimeoutError:
            if self._hello is not None:
                raise ProtocolError(f"no answer to the hello within {self._hello_timeout_s:g} s") from None
            self._owed += 1
            return None
        if frame is None:
            raise EOFError
        hello = protocol_a.read_hello_reply(frame.text, nonce)
        if hello is None:
            self._hello = None
            return None
        self._hello = hello
        return ExtendedConnection(wire, hello, self._next_id)

    def _away(self) -> HostAway:
        return HostAway(f"the host is away: {self._why}", "start it: edgetool fpga-host --image DIR")


def _words(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "it closes the connection"
    return "no answer in time" if isinstance(error, TimeoutError) else str(error)


def _messages(messages: Sequence[Mapping[str, Any]]) -> tuple[protocol_a.ChatMessage, ...]:
    return tuple(protocol_a.ChatMessage.model_validate(dict(message)) for message in messages)


def _prompt(prompt: str | Sequence[int]) -> str | tuple[int, ...]:
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _options(options: GenerateOptions) -> extension.Options:
    return extension.Options(**asdict(options))


def _checked(make: Callable[[], _Made]) -> _Made:
    """What `make` gives. Raises RequestRefused where it cannot be said in the protocol."""
    try:
        return make()
    except (ValidationError, ValueError) as error:
        raise RequestRefused(f"the request cannot be sent: {error}") from error
