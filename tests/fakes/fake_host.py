"""A host of protocol A that answers at once with what it was asked, and misbehaves on request.

Written from docs/fpga-protocol.md with no code of edgetool's, so that gateways are tested against the text. The answer
to a chat is `echo: ` and the last message, so that a test sees at once whose answer it got.

    python tests/fakes/fake_host.py --port 0 --fault twice      # prints its port, then serves until it is killed
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import struct
from typing import Any

MARKER = b"<|END|>"
FACTS = {
    "model": "echo",
    "family": "llama",
    "vocab": 1000,
    "max_context_tokens": 4096,
    "eos_token_ids": [2],
    "numerics": "et1",
    "image_sha256": "00" * 32,
    "board": "fake",
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "chat": True,
}
FAULTS = ("never", "late", "twice", "garbage", "gap", "stranger", "half", "miscount", "close", "silent")
"""never: no answer. late: the answer comes after `delay_s`, to whoever is connected then. twice: every answer comes two
times. garbage: bytes that are no frame. gap: a token is left out. stranger: a reply to an id that was never used. half:
half a frame, then the end. miscount: done counts wrongly. close: the end in place of an answer. silent: nothing after
the hello, not even pongs."""


def frame(text: str) -> bytes:
    payload = text.encode() + MARKER
    return struct.pack(">I", len(payload)) + payload


class FakeHost:
    """Use as `async with FakeHost(...) as host`, and connect to `host.port`.

    Args:
        extended: whether it knows the extension.
        fault: one of FAULTS, or None.
        delay_s: between question and answer.
        token_delay_s: between two tokens (extension).
        faulty: how many requests the fault is for; None: all.
        pieces: tokens of an answer (extension).
    """

    def __init__(
        self,
        extended: bool = True,
        fault: str | None = None,
        delay_s: float = 0.0,
        token_delay_s: float = 0.0,
        faulty: int | None = None,
        pieces: int = 4,
        port: int = 0,
    ) -> None:
        assert fault is None or fault in FAULTS
        self.extended = extended
        self.fault = fault
        self.delay_s = delay_s
        self.token_delay_s = token_delay_s
        self.faulty = faulty
        self.pieces = pieces
        self.port = port
        self.gate: asyncio.Event | None = None
        """What every answer waits for."""
        self.asked: list[dict[str, Any]] = []
        """Requests as they came, hellos and pings left out."""
        self.hellos = 0
        self.pings = 0
        self.connections = 0
        self.cancelled: list[int] = []
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeHost:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.drop()
        for task in list(self._tasks):
            task.cancel()

    def drop(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        spoken = False
        try:
            while True:
                (length,) = struct.unpack(">I", await reader.readexactly(4))
                request = json.loads((await reader.readexactly(length)).removesuffix(MARKER))
                hello = request.get("edgetool")
                if hello is not None:
                    self.hellos += 1
                    if self.extended:
                        spoken = True
                        proof = hashlib.sha256(hello["nonce"].encode()).hexdigest()
                        said = {"hello": 1, "proof": proof, "host": "fake 1", "max_queue": 64, "facts": FACTS}
                        writer.write(frame(json.dumps({"edgetool": said})))
                    else:
                        writer.write(frame("Hello! How can I help?"))
                    continue
                task = asyncio.ensure_future(self._answer(writer, request, spoken))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if writer in self._writers:
                self._writers.remove(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, request: dict[str, Any], extended: bool) -> None:
        fault = self.fault
        if request.get("type") == "cancel":
            self.cancelled.append(request["id"])
            return
        if request.get("type") == "ping":
            self.pings += 1
            if fault != "silent":
                writer.write(frame(json.dumps({"type": "pong", "id": request["id"]})))
            return
        self.asked.append(request)
        if fault is not None and self.faulty is not None:
            self.faulty -= 1
            if self.faulty < 0:
                fault = None
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.gate is not None:
            await self.gate.wait()
        if fault == "late" and not extended:
            # as hosts of the first kind do: to the connection there is now
            writer = self._writers[-1] if self._writers else writer
        if fault in ("never", "silent"):
            return
        if fault == "garbage":
            writer.write(b"\xff\xff\xff\xff no frame")
        elif fault == "half":
            writer.write(frame("this is cut")[:8])
            await writer.drain()
            writer.close()
        elif fault == "close":
            writer.close()
        elif extended:
            await self._tokens(writer, request, fault)
        else:
            for _ in range(2 if fault == "twice" else 1):
                writer.write(frame(answer_to(request)))

    async def _tokens(self, writer: asyncio.StreamWriter, request: dict[str, Any], fault: str | None) -> None:
        id = request["id"]
        if request["type"] == "tokenize":
            writer.write(frame(json.dumps({"type": "tokens", "id": id, "ids": [1, 2, 3]})))
            return
        if request["type"] == "score":
            first = {"id": 1, "text": "a", "text_offset": 0, "logprob": None, "top": []}
            second = {"id": 2, "text": "b", "text_offset": 1, "logprob": -0.5, "top": [[2, "b", -0.5]]}
            writer.write(frame(json.dumps({"type": "scores", "id": id, "tokens": [first, second]})))
            return
        if fault == "stranger":
            writer.write(frame(json.dumps({"type": "started", "id": id + 1000, "prompt_tokens": 1})))
            return
        said = [frame(json.dumps({"type": "started", "id": id, "prompt_tokens": 7}))]
        text = answer_to(request)
        count = min(self.pieces, len(text))
        cuts = [len(text) * part // count for part in range(count + 1)]
        for index in range(count):
            if fault == "gap" and index == 1:
                continue
            step = {"id": 10 + index, "text": text[cuts[index] : cuts[index + 1]]}
            if index == count - 1:
                step["finish"] = "stop"
            said.append(frame(json.dumps({"type": "token", "id": id, "index": index, "step": step})))
        made = count + (fault == "miscount")
        done = {"type": "done", "id": id, "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": made}
        said.append(frame(json.dumps(done)))
        if fault == "twice":
            said *= 2
        if not self.token_delay_s:
            writer.write(b"".join(said))
            return
        writer.write(said[0])
        for part in said[1:]:
            if id in self.cancelled and fault != "late":
                return
            writer.write(part)
            await asyncio.sleep(self.token_delay_s)


def answer_to(request: dict[str, Any]) -> str:
    """What it answers to a request."""
    if "messages" in request:
        return "echo: " + str(request["messages"][-1]["content"])
    return "echo: " + str(request["prompt"])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--token-delay-s", type=float, default=0.0)
    parser.add_argument("--pieces", type=int, default=4)
    given = parser.parse_args()
    host = FakeHost(
        not given.plain, given.fault, given.delay_s, given.token_delay_s, pieces=given.pieces, port=given.port
    )
    async with host:
        print(host.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
