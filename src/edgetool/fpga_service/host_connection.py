"""One TCP connection to a host: many requests by id (extension), or one and no more (plain A).

What arrives is checked against what was asked. The first thing that does not fit closes the connection, so nothing that
a host says too late, twice or by mistake can reach a request that it does not belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import assert_never

from edgetool.fpga_service import extension, host_errors, protocol_a
from edgetool.fpga_service.answers import PLAIN_TOKEN, Answer, Encoded, Ended, Scored, Started
from edgetool.fpga_service.device import Step
from edgetool.fpga_service.frames import Frame, FrameReader, ProtocolError, encode_frame
from edgetool.fpga_service.host_errors import HostAway, HostFailed, RequestRefused

_CHUNK_BYTES = 1 << 16
_AGAIN = "ask again: a new connection is being made"
PING_EVERY_S = 10.0
"""A connection on which nothing came for so long is asked whether it is alive."""
SILENT_S = 40.0
"""A host that says nothing for so long is gone."""


class Wire:
    """A connected socket as frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self.heard_s = asyncio.get_running_loop().time()

    async def read(self) -> Frame | None:
        """The next frame; None at the end of the connection. Raises ProtocolError and OSError."""
        while (frame := self._frames.next()) is None:
            data = await self._reader.read(_CHUNK_BYTES)
            self.heard_s = asyncio.get_running_loop().time()
            if not data:
                if self._frames.pending:
                    raise ProtocolError("the connection ended inside a frame")
                return None
            self._frames.feed(data)
        return frame

    @property
    def in_frame(self) -> bool:
        """Whether the beginning of a frame is here and its end is not."""
        return self._frames.pending

    def write(self, text: str) -> None:
        """Send a frame, in the background. Raises RequestRefused for one that is too long."""
        try:
            frame = encode_frame(text)
        except ValueError as error:
            raise RequestRefused(f"the request is too long: {error}") from error
        self._writer.write(frame)

    def abort(self) -> None:
        """Close at once; what was not sent yet is dropped."""
        self._writer.transport.abort()


class ExtendedConnection:
    """A connection after the hello, on which requests go by id.

    Ids are never used again by the same `HostClient`, not even on its next connection.
    """

    def __init__(self, wire: Wire, hello: protocol_a.HelloReply, first_id: int) -> None:
        self.hello = hello
        self.next_id = first_id
        self._first_id = first_id
        self._wire = wire
        self._waiting: dict[int, _UnderWay] = {}
        self._ids: dict[Answer, int] = {}
        self._closed: str | None = None

    def send(self, answer: Answer, work: extension.Work) -> None:
        """Send `work` under an id of its own; what comes for it goes to `answer`. Raises HostAway, RequestRefused."""
        if self._closed is not None:
            raise HostAway(self._closed, _AGAIN)
        id = self._take_id()
        try:
            text = extension.write(work.model_copy(update={"id": id, "timeout_s": max(answer.left_s, 0.001)}))
        except ValueError as error:  # lone surrogates
            raise RequestRefused(f"the request cannot be sent: {error}") from error
        self._wire.write(text)
        self._waiting[id] = _UnderWay(answer, work)
        self._ids[answer] = id

    def give_up(self, answer: Answer) -> None:
        """Tell the host to stop; replies that are on their way are dropped."""
        id = self._forget(answer)
        if id is not None and self._closed is None:
            self._wire.write(extension.write(extension.Cancel(id=id)))

    async def run(self) -> str:
        """Hand out what comes, until the connection is of no more use; returns why."""
        why = "the host closed the connection"
        alive = asyncio.create_task(self._stay_alive())
        try:
            while (frame := await self._wire.read()) is not None:
                self._take(extension.read_reply(frame.text))
        except ProtocolError as error:
            why = f"the host broke the protocol: {error}"
        except OSError as error:
            why = f"the connection to the host broke: {error}"
        finally:
            alive.cancel()
            self.close(why)
        return why

    def close(self, why: str) -> None:
        """End the connection; requests under way fail."""
        if self._closed is None:
            self._closed = why
            self._wire.abort()
        for answer in [one.answer for one in self._waiting.values()]:
            self._forget(answer)
            answer.fail(HostAway(why, _AGAIN))

    async def _stay_alive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_EVERY_S / 2)
            silent_s = loop.time() - self._wire.heard_s
            if silent_s > SILENT_S:
                self.close(f"the host has said nothing for {silent_s:.0f} s")
                return
            if silent_s > PING_EVERY_S:
                self._wire.write(extension.write(extension.Ping(id=self._take_id())))

    def _take_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _forget(self, answer: Answer) -> int | None:
        id = self._ids.pop(answer, None)
        if id is not None:
            del self._waiting[id]
        return id

    def _take(self, reply: extension.Reply) -> None:
        if reply.id is None:
            assert isinstance(reply, extension.Failed)
            raise ProtocolError(f"it could not read a message of ours: {reply.message}")
        if not self._first_id <= reply.id < self.next_id:
            raise ProtocolError(f"a reply to request {reply.id}, which was never made")
        under_way = self._waiting.get(reply.id)
        if under_way is None or isinstance(reply, extension.Pong):
            return  # given up, or ended: what was on its way then
        under_way.check(reply)
        answer = under_way.answer
        match reply:
            case extension.Started():
                answer.put(Started(reply.prompt_tokens))
            case extension.Token():
                answer.put(reply.step)
            case extension.Done():
                self._forget(answer)
                answer.put(Ended(reply.finish_reason, reply.prompt_tokens, reply.completion_tokens))
            case extension.Scores():
                self._forget(answer)
                answer.put(Scored(reply.tokens))
            case extension.Tokens():
                self._forget(answer)
                answer.put(Encoded(reply.ids))
            case extension.Failed():
                self._forget(answer)
                answer.fail(host_errors.of_reply(reply))
            case _:
                assert_never(reply)


@dataclass
class _UnderWay:
    """A request that was sent, and what may come for it next."""

    answer: Answer
    work: extension.Work
    started: bool = False

    def check(self, reply: extension.Reply) -> None:
        """Raise ProtocolError where `reply` cannot come for this request at this point."""
        tokens = self.answer.tokens
        match self.work, reply:
            case _, extension.Failed():
                return
            case extension.Score(), extension.Scores():
                return
            case extension.Tokenize(), extension.Tokens():
                return
            case ((extension.Chat() | extension.Complete()), extension.Started()) if not self.started:
                self.started = True
            case _, extension.Token() if self.started:
                if reply.index != tokens:
                    raise ProtocolError(f"token {reply.index} of request {reply.id} came in place of {tokens}")
            case _, extension.Done() if self.started:
                if reply.completion_tokens != tokens:
                    counts = f"{reply.completion_tokens} tokens, and {tokens} came"
                    raise ProtocolError(f"request {reply.id} ended after {counts}")
            case _:
                raise ProtocolError(f"{reply.type!r} came for request {reply.id}, {self.work.type!r}")


class PlainConnection:
    """A connection that carries one request of plain A, which has no ids.

    One request and no more: were it used again, a second reply to the first request would be the answer to the next.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._answer: Answer | None = None
        self._used = False
        self._answered = False
        self._why = "the host closed the connection"

    @property
    def usable(self) -> bool:
        """Whether a request can still go out on it."""
        return not self._used

    @property
    def owed(self) -> bool:
        """Whether a request went out whose reply has not come."""
        return self._used and not self._answered

    def send(self, answer: Answer, text: str) -> None:
        """Send the request of plain A in `text`. Raises RequestRefused, HostAway."""
        if self._wire.in_frame:
            self.close("the host spoke without being asked")
            raise HostAway(self._why, _AGAIN)
        self._wire.write(text)
        self._used = True
        self._answer = answer
        answer.put(Started(None))

    def give_up(self, answer: Answer) -> None:
        """Let nobody have the reply. The host, which cannot be told, is waited for until the request's time ends."""
        self._answer = None
        asyncio.get_running_loop().call_later(answer.left_s, self._wire.abort)

    async def run(self) -> str:
        """Wait for the reply, or for the end of an unused connection; returns why it ended."""
        try:
            frame = await self._wire.read()
            if not self._used:
                self._why = self._why if frame is None else "the host spoke without being asked"
            elif frame is not None:
                self._answered = True
                if self._answer is not None:
                    self._answer.put(Step(PLAIN_TOKEN, frame.text, finish="stop"))
                    self._answer.put(Ended("stop", None, None))
                self._why = "answered"
        except ProtocolError as error:
            self._why = f"the host broke the protocol: {error}"
        except OSError as error:
            self._why = f"the connection to the host broke: {error}"
        finally:
            self.close(self._why)
        return self._why

    def close(self, why: str) -> None:
        """End the connection; a request under way fails."""
        self._wire.abort()
        if self._answer is not None:
            failure = HostFailed if "protocol" in why else HostAway
            self._answer.fail(failure(why, _AGAIN))


async def absorb(wire: Wire, owed: int, settle_s: float) -> None:
    """Read the replies that the host still owes to requests given up; wait `settle_s` for them, no longer.

    Hosts of the first kind send a reply to whoever is connected when it is ready, so a new connection is no safety
    from old replies. Raises ProtocolError and OSError; EOFError when the host closes.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settle_s):
            while owed:
                if await wire.read() is None:
                    raise EOFError
                owed -= 1
    if wire.in_frame:
        raise ProtocolError("half a reply that nobody waits for")
