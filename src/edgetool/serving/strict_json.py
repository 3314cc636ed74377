"""Bodies of requests that are JSON by the book, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json


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


def complaint(invalid: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and the parameter that it is about, where it is one."""
    first = invalid.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}", None
    if not where:
        return "the body must be a JSON object, sent as application/json", None
    return f"{'.'.join(where)}: {first['msg']}", where[0]
