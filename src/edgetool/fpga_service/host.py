"""The host: listens, speaks protocols A and B with whoever connects, and survives whatever they send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Literal

from edgetool.fpga_service.frames import FrameReader, ProtocolError, encode_frame
from edgetool.fpga_service.host_session_b import SessionB
from edgetool.fpga_service.host_sessions import PlainSession, Session
from edgetool.fpga_service.protocol_b import CommandReader, Quit
from edgetool.fpga_service.work import Worker

Protocol = Literal["A", "B"]

HALF_FRAME_S = 60.0
"""What has begun to arrive must be complete by then."""
MOST_CONNECTIONS = 256
_CHUNK_BYTES = 1 << 16
_MOST_UNREAD_BYTES = 64 * 2**20
"""A connection whose other side reads nothing of so much is closed."""


class Host:
    """Serves one device. Use it as an async context manager: it listens inside the block.

    Args:
        worker: the device.
        listening: bound sockets, and what is spoken on each.
        timeout_s: longest time of one request, its wait included.
        log: takes lines for people.
        half_frame_s: how long an unfinished frame may take.
    """

    def __init__(
        self,
        worker: Worker,
        listening: Sequence[tuple[Protocol, socket.socket]],
        timeout_s: float,
        log: Callable[[str], None],
        *,
        half_frame_s: float = HALF_FRAME_S,
    ) -> None:
        self._worker = worker
        self._listening = listening
        self._timeout_s = timeout_s
        self._log = log
        self._half_frame_s = half_frame_s
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Host:
        for protocol, bound in self._listening:
            speak = self._speak_a if protocol == "A" else self._speak_b
            self._servers.append(await asyncio.start_server(self._guarded(speak), sock=bound))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        self._worker.stop()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._worker.stopped()

    def _guarded(
        self, speak: Callable[[_Connection], Awaitable[None]]
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = _Connection(reader, writer, self._half_frame_s)
            if len(self._connections) >= MOST_CONNECTIONS:
                self._log(f"{connection.peer}: refused, {MOST_CONNECTIONS} connections are open")
                connection.abort()
                return
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await speak(connection)
            except ProtocolError as error:
                self._log(f"{connection.peer}: {error}; connection closed")
            except OSError as error:
                self._log(f"{connection.peer}: {error}")
            except asyncio.CancelledError:
                pass  # the host ends; asyncio's callback would print a traceback of a task that is cancelled
            finally:
                self._connections.discard(task)
                await connection.close()

        return connected

    async def _speak_a(self, connection: _Connection) -> None:
        frames = FrameReader(bare=True)
        session: Session = PlainSession(
            self._worker,
            self._timeout_s,
            lambda text, marked: connection.send(encode_frame(text, marked=marked)),
            lambda why: self._hang_up(connection, why),
        )
        try:
            while await connection.receive(frames):
                while (frame := frames.next()) is not None:
                    connection.complete()
                    session = session.take(frame)
        finally:
            session.close()

    async def _speak_b(self, connection: _Connection) -> None:
        commands = CommandReader()
        session = SessionB(self._worker, self._timeout_s, connection.send, lambda why: self._hang_up(connection, why))
        try:
            while await connection.receive(commands):
                while (command := commands.next()) is not None:
                    connection.complete()
                    if isinstance(command, Quit):
                        return
                    session.take(command)
        finally:
            session.close()

    def _hang_up(self, connection: _Connection, why: str) -> None:
        self._log(f"{connection.peer}: not answered, and closed: {why}")
        connection.abort()


class _Connection:
    """A socket, with the limits that hold for every protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, half_frame_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._half_frame_s = half_frame_s
        self._half_since_s: float | None = None
        name = writer.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "somebody"
        opened = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            # a gateway that vanished without a word is noticed in minutes, not in hours
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)

    async def receive(self, reader: FrameReader | CommandReader) -> bool:
        """Wait for bytes and feed them to `reader`; False at the end. Raises ProtocolError for a frame without end."""
        if reader.pending and self._half_since_s is None:
            self._half_since_s = asyncio.get_running_loop().time()
        until_s = None if self._half_since_s is None else self._half_since_s + self._half_frame_s
        try:
            async with asyncio.timeout_at(until_s):
                data = await self._reader.read(_CHUNK_BYTES)
        except TimeoutError:
            raise ProtocolError(f"half a frame for {self._half_frame_s:g} s") from None
        if not data and reader.pending:
            raise ProtocolError("the connection ended inside a frame")
        reader.feed(data)
        return bool(data)

    def complete(self) -> None:
        """A whole frame was here: what is left of the bytes begins another."""
        self._half_since_s = None

    def send(self, data: bytes) -> None:
        """Send in the background; nothing once the connection is closing."""
        if self._writer.is_closing():
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close when what was sent is out, or soon."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.wait_closed()
        self.abort()
