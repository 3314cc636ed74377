"""The keys in front of every route but /health, as ASGI middleware; and keys that are made here."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})


def new_key() -> str:
    """A key of 192 bits, safe in shells, URLs and headers."""
    return "et-" + secrets.token_urlsafe(24)


KEY_NAME = "edgetool_key"
"""Where the name of a request's key stands in its scope."""


class RequireKey:
    """Lets requests to `app` pass that carry `Authorization: Bearer KEY`; 401 in OpenAI's form otherwise.

    Digests are compared with those of all keys, in constant time, so that neither length nor content of a key leaks by
    timing. The name of the key that fits is put into the scope.
    """

    def __init__(self, app: App, key: str | Mapping[str, str]) -> None:
        """`key`: the one key, or several by name."""
        self.app = app
        keys = {"default": key} if isinstance(key, str) else key
        self._digests = {name: hashlib.sha256(text.encode()).digest() for name, text in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "lifespan"
            or (scope["type"] == "http" and scope["path"] in OPEN_PATHS)
            or self._allowed(scope)
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # every key is compared, so that the time does not tell which one was nearly right
        fitting = [name for name, known in self._digests.items() if secrets.compare_digest(digest, known)]
        if scheme.lower() != b"bearer" or not fitting:
            return False
        scope[KEY_NAME] = fitting[0]
        return True


async def _refuse(send: Send) -> None:
    error = {"message": "missing or wrong API key: send it as 'Authorization: Bearer KEY'", "code": "invalid_api_key"}
    body = json.dumps({"error": {**error, "type": "authentication_error", "param": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
