"""Every way in which a request can fail, in OpenAI's form of an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from edgetool.fpga_service.api_requests import Refusal
from edgetool.serving.auth import App, Receive, Scope, Send

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


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body as JSON by the book: the standard library lets NaN and halves of surrogate pairs pass."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route whose bodies are JSON by the book."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await usual(_StrictRequest(request.scope, request.receive))

        return handle


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
        return respond(_of_validation(invalid))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        answer = respond(Refusal(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _bug(_request: Request, error: Exception) -> JSONResponse:
        return respond(Refusal(500, f"a bug in edgetool: {type(error).__name__}; the traceback is in its log"))


def _of_validation(invalid: RequestValidationError) -> Refusal:
    first = invalid.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']}")
    if not where:
        return Refusal(400, "the body must be a JSON object, sent as application/json")
    return Refusal(400, f"{'.'.join(where)}: {first['msg']}", param=where[0])


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
