"""The host of the first implementation, as it was: one connection at a time, a pause before it takes the next one, and
answers that go to whoever is connected when they are ready.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time

END_MARKER = b"<|END|>"


class OldHost:
    """Answers `about ` and the last user message, once `gate` is set. `pause_s`: 5 s in the original.

    Use as a context manager; `port` listens inside the block.
    """

    def __init__(self, *, pause_s: float = 0.2) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.accepted = 0
        self.asked: list[str] = []
        self._pause_s = pause_s
        self._current: socket.socket | None = None
        self._messages: queue.Queue[str] = queue.Queue()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1)
        self.port = int(self._listening.getsockname()[1])
        self._ended = False

    def __enter__(self) -> OldHost:
        for work in (self._receive, self._answer):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self.gate.set()
        self._listening.close()
        self._messages.put("")
        if self._current is not None:
            self._current.close()

    def _receive(self) -> None:
        while not self._ended:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._current = connection
            self.accepted += 1
            try:
                while header := connection.recv(4):
                    wanted, text = int.from_bytes(header, "big"), b""
                    while len(text) < wanted:
                        part = connection.recv(min(wanted - len(text), 4096))
                        if not part:
                            raise ConnectionError
                        text += part
                    self._messages.put(text.removesuffix(END_MARKER).decode())
            except OSError:
                pass
            connection.close()
            self._current = None
            time.sleep(self._pause_s)

    def _answer(self) -> None:
        while message := self._messages.get():
            users = [one["content"] for one in json.loads(message)["messages"] if one["role"] == "user"]
            self.asked.append(users[-1])
            self.gate.wait()
            payload = f"about {users[-1]}".encode() + END_MARKER
            connection = self._current
            if connection is not None:
                try:
                    connection.sendall(len(payload).to_bytes(4, "big"))
                    connection.sendall(payload)
                except OSError:
                    self._current = None
