"""The clients of the first implementation, as they were: what our host must answer.

`ask_bare` is the oldest: a connection for each question, bare text in, and all of the reply shown, whatever is in it.
`OldGateway` is the one behind port 7000: one connection that is kept, JSON and the marker, one message at a time, the
length read by one recv(4). Its pauses (before each answer is read, before connecting again) are left out.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

END_MARKER = "<|END|>"


def ask_bare(port: int, text: str) -> str:
    """One question of the oldest client."""
    question = text.encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.send(struct.pack(">I", len(question)) + question)
        announced = connection.recv(4)
        assert len(announced) == 4, "no reply"
        left = int.from_bytes(announced, "big")
        answer = b""
        while left and (more := connection.recv(left)):
            answer, left = answer + more, left - len(more)
    return answer.decode()


class OldGateway:
    """One message at a time over a kept connection; what its HTTP clients send is passed on as it is."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=10)

    def ask(self, data: dict[str, Any]) -> str:
        passed_on = {key: data.get(key) for key in ("model", "messages", "temperature", "max_tokens")}
        message = (json.dumps(passed_on) + END_MARKER).encode()
        self.connection.sendall(struct.pack(">I", len(message)))
        self.connection.sendall(message)
        length = self.connection.recv(4)
        if not length:
            raise ConnectionError("closed")
        (wanted,) = struct.unpack(">I", length)
        chunks, received = [], 0
        while received < wanted:
            chunk = self.connection.recv(min(wanted - received, 4096))
            if not chunk:
                raise ConnectionError("broken")
            chunks.append(chunk)
            received += len(chunk)
        return b"".join(chunks).decode().removesuffix(END_MARKER)

    def close(self) -> None:
        self.connection.close()


class OldTokenClient:
    """The client of protocol B with u16 ids: replies are read with one recv(1024) each."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=30)

    def _send(self, operation: str, numbers: list[int]) -> None:
        attrs = b"".join(struct.pack("<H", number) for number in numbers)
        self.connection.sendall(f"command{operation}attrs{len(attrs):04d}".encode() + attrs)

    def _numbers(self) -> tuple[int, ...]:
        data = self.connection.recv(1024)
        return struct.unpack(f"<{len(data) // 2}H", data[: len(data) // 2 * 2])

    def rmod(self, ids: list[int], token: int, kvcache: int) -> int:
        self._send("rmod", [token, kvcache, *ids])
        return self._numbers()[0]

    def rkvc(self, ids: list[int], memory: int = 0) -> list[int]:
        self._send("rkvc", [len(ids), 0, memory, *ids])
        numbers = self._numbers()
        state = self._numbers()[0]
        assert state == 0
        return list(numbers[1 : 1 + numbers[0]])

    def rkvs(self, ids: list[int], memory: int = 0) -> list[list[int]]:
        """The ids of each frame."""
        self._send("rkvs", [len(ids), 0, memory, *ids])
        frames = []
        while (numbers := self._numbers())[0]:
            frames.append(list(numbers[1 : 1 + numbers[0]]))
        return frames

    def quit(self) -> bool:
        """Say so; whether the other side has closed then."""
        self.connection.sendall(b"quit")
        closed = self.connection.recv(1024) == b""
        self.connection.close()
        return closed
