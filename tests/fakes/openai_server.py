"""A server that speaks as much of the OpenAI API as a stranger's might, on a TCP port or a Unix socket, in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Stranger:
    """How it behaves. `seen`: (path, body, authorization) of every request, in order.

    first_s, each_s: pauses before the first and each further piece. knows: extra fields it accepts, any other is a 400.
    tells_usage: whether it counts tokens; it calls each word a token, plus `template_tokens`. pieces_per_chunk: words
    sent in one event. cut_after: breaks a stream off after so many pieces; read once, when the request comes. failing:
    answers 500 to all but /v1/models. answer: what it says when it is not asked for a stream, in place of `text` again
    and again. gate: every piece of a stream waits for it.
    """

    key: str | None = None
    models: tuple[str, ...] = ("fake",)
    first_s: float = 0.0
    each_s: float = 0.0
    knows: frozenset[str] = frozenset({"ignore_eos", "stream_options"})
    tells_usage: bool = True
    template_tokens: int = 0
    pieces_per_chunk: int = 1
    cut_after: int | None = None
    failing: bool = False
    healthy: bool = True
    text: str = "lorem"
    answer: str | None = None
    gate: threading.Semaphore | None = None
    seen: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = dict(scope["headers"]).get(b"authorization")
        body = await _body(receive)
        self.seen.append((scope["path"], body, given.decode() if given else None))
        if scope["path"] == "/health":
            await _json(send, 200 if self.healthy else 503, {})
        elif self.key is not None and given != f"Bearer {self.key}".encode():
            await _json(send, 401, {"error": {"message": "no"}})
        elif scope["path"] == "/v1/models":
            await _json(send, 200, {"data": [{"id": name} for name in self.models]})
        elif scope["path"] not in ("/v1/chat/completions", "/v1/completions"):
            await _json(send, 404, {"error": {"message": f"no {scope['path']}"}})
        else:
            await self._complete(scope["path"], body, receive, send)

    async def _complete(self, path: str, body: dict[str, Any], receive: Any, send: Send) -> None:
        cut_after = self.cut_after
        usual = {"model", "messages", "prompt", "max_tokens", "temperature", "stream", "seed", "stop"}
        strange = set(body) - usual - self.knows
        if self.failing or strange or body.get("model") not in self.models:
            await _json(send, 500 if self.failing else 400, {"error": {"message": f"cannot: {sorted(strange)}"}})
            return
        chat = "chat" in path
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        count = body.get("max_tokens", 16)
        usage = {
            "prompt_tokens": len(str(prompt).split()) + self.template_tokens,
            "completion_tokens": count,
            "total_tokens": 0,
        }
        said = {"usage": usage} if self.tells_usage else {}
        if not body.get("stream"):
            await asyncio.sleep(self.first_s)
            text = self.answer or " ".join([self.text] * count) + f" ({prompt})"
            choice = {"message": {"content": text}} if chat else {"text": text}
            await _json(send, 200, {"choices": [{"index": 0, **choice}], **said})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.ensure_future(_gone(receive))
        try:
            if chat:  # the first event of a chat names the role and holds no text
                await _event(send, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for number in range(0, count, self.pieces_per_chunk):
                if number == cut_after:
                    raise ConnectionResetError
                await asyncio.wait({gone}, timeout=self.each_s if number else self.first_s)
                while self.gate is not None and not gone.done() and not self.gate.acquire(blocking=False):
                    await asyncio.wait({gone}, timeout=0.005)
                if gone.done():
                    self.cancelled.set()
                    return
                text = f"{self.text} " * min(self.pieces_per_chunk, count - number)
                await _event(send, {"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
            if self.tells_usage and (body.get("stream_options") or {}).get("include_usage"):
                await _event(send, {"choices": [], "usage": usage})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            gone.cancel()


class Running:
    """A server in a thread: `url`, or the socket that was given. Use as a context manager."""

    def __init__(self, app: Any, socket: Path | None = None) -> None:
        config = uvicorn.Config(app, log_level="critical", lifespan="auto", port=0, uds=str(socket) if socket else None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> Running:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.005)
        address = self._server.servers[0].sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{address[1]}" if isinstance(address, tuple) else ""
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)


async def _body(receive: Any) -> dict[str, Any]:
    data, more = b"", True
    while more:
        message = await receive()
        data += message.get("body", b"")
        more = message.get("more_body", False)
    return dict(json.loads(data)) if data else {}


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _event(send: Send, document: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": f"data: {json.dumps(document)}\n\n".encode(), "more_body": True})


async def _json(send: Send, status: int, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
