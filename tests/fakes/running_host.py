"""A real host (edgetool.fpga_service.host) on a device of the test's, in a thread; and raw connections to it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from typing import Any

from edgetool.fpga_service.device import Device
from edgetool.fpga_service.host import Host
from edgetool.fpga_service.work import Worker

MARKER = b"<|END|>"


class RunningHost:
    """As a context manager; `port_a` and `port_b` answer inside the block. `lines`: what it logged."""

    def __init__(
        self, device: Device, *, max_queue: int = 64, timeout_s: float = 30.0, half_frame_s: float = 60.0
    ) -> None:
        self.device = device
        self.lines: list[str] = []
        self._limits = (max_queue, timeout_s, half_frame_s)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> RunningHost:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, as SIGTERM does."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        max_queue, timeout_s, half_frame_s = self._limits
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.port_a, self.port_b = (bound.getsockname()[1] for bound in sockets)
        worker = Worker(self.device, max_queue, self.lines.append)
        listening = (("A", sockets[0]), ("B", sockets[1]))
        async with Host(worker, listening, timeout_s, self.lines.append, half_frame_s=half_frame_s):  # type: ignore[arg-type]
            self._ready.set()
            await self._stop.wait()


class Raw:
    """A connection that sends and reads bytes, and frames made by hand."""

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)

    def frame(self, text: str | bytes, marker: bytes = MARKER) -> None:
        payload = (text.encode() if isinstance(text, str) else text) + marker
        self.socket.sendall(struct.pack(">I", len(payload)) + payload)

    def say(self, **message: Any) -> None:
        self.frame(json.dumps(message))

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError(data)
            data += more
        return data

    def text(self) -> str:
        """The text of the next frame, which must have the marker."""
        (length,) = struct.unpack(">I", self.exactly(4))
        payload = self.exactly(length)
        assert payload.endswith(MARKER)
        return payload.removesuffix(MARKER).decode()

    def heard(self) -> dict[str, Any]:
        return dict(json.loads(self.text()))

    def hello(self) -> dict[str, Any]:
        """Go over to the extension."""
        asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 1}
        self.say(**asked, edgetool={"hello": 1, "nonce": "ab" * 16})
        return dict(self.heard()["edgetool"])

    def until_end(self, id: int) -> list[dict[str, Any]]:
        """All messages of one request; those of others are dropped."""
        found: list[dict[str, Any]] = []
        while not found or found[-1]["type"] not in ("done", "error", "scores", "tokens", "pong"):
            message = self.heard()
            if message["id"] == id:
                found.append(message)
        return found

    def closed(self) -> bool:
        """Whether the other side closes without another word."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
