"""An HTTP proxy to one engine, as an ASGI app: bytes pass as they come, so streams stay streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from edgetool.serving.auth import Receive, Scope, Send

# RFC 9110, section 7.6.1: these belong to one connection. Host and the key are the engine's own.
_NOT_PASSED = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"host", b"authorization", b"expect",
}  # fmt: skip

_WITHOUT_V1 = ("/chat/completions", "/completions", "/models", "/responses", "/embeddings")
"""Routes of the OpenAI API that are also answered without /v1: clients are often given the bare address."""


def engine_client(socket: Path, key: str) -> httpx.AsyncClient:
    """A client for the engine behind a Unix socket. It never waits in a queue of its own: the engine has one."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(
            uds=str(socket), limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
        ),
        base_url="http://engine",
        headers={"Authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(None, connect=5.0),
        trust_env=False,
    )


class Proxy:
    """Passes every request on to the engine. A client that goes away takes its request along."""

    def __init__(self, engine: httpx.AsyncClient) -> None:
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            return
        body_read = asyncio.Event()
        path = scope["path"]
        url = httpx.URL("http://engine" + ("/v1" if path in _WITHOUT_V1 else "") + (scope["raw_path"] or b"/").decode())
        request = self.engine.build_request(
            scope["method"],
            url.copy_with(query=scope["query_string"] or None),
            headers=[(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED],
            content=_body(receive, body_read) if _has_body(scope) else None,
        )
        if not _has_body(scope):
            body_read.set()
        answer = asyncio.ensure_future(self._answer(request, send))
        gone = asyncio.ensure_future(_disconnected(receive, body_read))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
        finally:
            for task in (answer, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                    await task

    async def _answer(self, request: httpx.Request, send: Send) -> None:
        try:
            response = await self.engine.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            await _error(send, 503, "the engine does not answer: it is starting, or has ended")
            return
        except httpx.TransportError as error:
            await _error(send, 502, f"the engine broke the request off ({type(error).__name__})")
            return
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _NOT_PASSED]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        try:
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError:
            if not events:
                raise  # the connection is then cut, which a client with a content length notices
            # In a stream of events an end looks like a full answer, so the failure is said as OpenAI clients expect it.
            said = {"message": "the engine ended in the middle of this answer", "type": "server_error", "code": 500}
            lines = f"\n\ndata: {json.dumps({'error': said})}\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})
        finally:
            await response.aclose()
        await send({"type": "http.response.body", "body": b""})


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"content-length" in names or b"transfer-encoding" in names


async def _body(receive: Receive, read: asyncio.Event) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise httpx.WriteError("the client went away")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            read.set()
            return


async def _disconnected(receive: Receive, body_read: asyncio.Event) -> None:
    await body_read.wait()
    while (await receive())["type"] != "http.disconnect":
        continue


async def _error(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
