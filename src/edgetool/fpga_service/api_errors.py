"""Every way in which a request can fail, in OpenAI's form of an error."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from edgetool.fpga_service.api_requests import Refusal
from edgetool.serving.auth import App, Receive, Scope, Send
from edgetool.serving.strict_json import complaint

MOST_BODY_BYTES = 8 * 2**20
"""Longest body of a request; a context of a million tokens fits."""

_DRAINED_LIMITS = 8

_Made = TypeVar("_Made")


class Gone(Exception):
    """The client went away before its answer was there."""


async def while_there(request: Request, work: Coroutine[Any, Any, _Made]) -> _Made:
    """What `work` gives. It is cancelled, and Gone raised, when the client goes away before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def respond(refusal: Refusal) -> JSONResponse:
    """The answer that a refusal is."""
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return JSONResponse(refusal.body(), refusal.status, headers)


def install(app: FastAPI) -> None:
    """Let every error of `app` leave in OpenAI's form."""

    @app.exception_handler(Refusal)
    async def _refused(_request: Request, refusal: Refusal) -> JSONResponse:
        return respond(refusal)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, invalid: RequestValidationError) -> JSONResponse:
        message, param = complaint(invalid)
        return respond(Refusal(400, message, param=param))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        answer = respond(Refusal(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _bug(_request: Request, error: Exception) -> JSONResponse:
        return respond(Refusal(500, f"a bug in edgetool: {type(error).__name__}; the traceback is in its log"))


class LimitBody:
    """Refuses bodies that are longer than a limit, whether they say so before or not.

    What is too long is still read, and thrown away, up to a second limit: a client that is cut off while it sends often
    never sees the answer.
    """

    def __init__(self, app: App, limit_bytes: int = MOST_BODY_BYTES) -> None:
        self.app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit_bytes:
                while message.get("more_body") and seen < _DRAINED_LIMITS * self._limit_bytes:
                    message = await receive()
                    seen += len(message.get("body", b""))
                raise HTTPException(413, f"a body may have {self._limit_bytes} bytes")
            return message

        await self.app(scope, counted, send)
