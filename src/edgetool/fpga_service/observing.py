"""Counts and records every request, whatever becomes of it, as ASGI middleware around all others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from edgetool.fpga_service.exchange import Conversation, Exchange
from edgetool.fpga_service.metrics import Metrics
from edgetool.fpga_service.recording import Recorder
from edgetool.serving.auth import KEY_NAME, App, Receive, Scope, Send

NOTES = "edgetool_notes"
"""Where the notes of a request stand in its scope."""

ASKING = frozenset({"/v1/chat/completions", "/v1/completions", "/predict"})
KNOWN = ASKING | {"/", "/health", "/ready", "/metrics", "/v1/models", "/openapi.json"}
CLIENT_GONE = 499


@dataclass
class Notes:
    """What a route says about its request. `error`: code or type of the error that it ended with."""

    id: str | None = None
    stream: bool | None = None
    exchange: Exchange | None = None
    error: str | None = None
    started_s: float = field(default_factory=time.monotonic)


class Observe:
    """Passes requests to `app`, and notes how they end."""

    def __init__(self, app: App, metrics: Metrics, recorder: Recorder | None) -> None:
        self.app = app
        self._metrics = metrics
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        notes = scope[NOTES] = Notes()
        status, whole = 500, False

        async def watched(message: Any) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._note(scope, notes, status if whole or status >= 400 else CLIENT_GONE)

    def _note(self, scope: Scope, notes: Notes, status: int) -> None:
        route = _route(scope["path"])
        key = scope.get(KEY_NAME, "-")
        seconds = time.monotonic() - notes.started_s
        metrics = self._metrics
        metrics.requests.labels(route, str(status), key).inc()
        if route not in ASKING or scope["method"] != "POST":
            return
        metrics.latency_s.labels(route).observe(seconds)
        if status == CLIENT_GONE:
            metrics.cancelled.inc()
        exchange = notes.exchange
        if exchange is not None:
            if exchange.first_token_s is not None:
                metrics.first_token_s.labels(route).observe(exchange.first_token_s)
            metrics.prompt_tokens.inc(sum(choice.prompt_tokens or 0 for choice in exchange.choices))
            metrics.completion_tokens.inc(sum(choice.made for choice in exchange.choices))
        if self._recorder is not None:
            self._recorder.add(_record(scope, notes, route, key, status, seconds, contents=self._recorder.contents))


def _route(path: str) -> str:
    if path in KNOWN:
        return path
    if "/v1" + path in KNOWN:
        return "/v1" + path
    return "/v1/models" if path.startswith("/v1/models/") else "other"


def _record(
    scope: Scope, notes: Notes, route: str, key: str, status: int, seconds: float, *, contents: bool
) -> dict[str, Any]:
    exchange = notes.exchange
    record: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": notes.id,
        "key": key,
        "route": route,
        "status": status,
        "stream": notes.stream,
        "seconds": round(seconds, 6),
        "error": notes.error,
    }
    if exchange is None:
        return record
    choices = exchange.choices
    record |= {
        "first_token_s": None if exchange.first_token_s is None else round(exchange.first_token_s, 6),
        "prompt_tokens": sum(choice.prompt_tokens or 0 for choice in choices),
        "completion_tokens": sum(choice.made for choice in choices),
        "finish_reason": choices[-1].finish if choices else None,
    }
    if contents:
        record["asked"] = [ask.messages if isinstance(ask, Conversation) else ask for ask in exchange.wish.asks]
        record["answered"] = [choice.text for choice in choices]
    return record
