"""The OpenAI API in front of a host, as an ASGI app: nothing of sockets, leases or processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from edgetool import __version__
from edgetool.fpga_service import api_errors
from edgetool.fpga_service.api_requests import Refusal
from edgetool.fpga_service.exchange import Counter
from edgetool.fpga_service.generation import routes
from edgetool.fpga_service.host_client import HostClient
from edgetool.fpga_service.limits import Queue, RateLimit
from edgetool.fpga_service.metrics import CONTENT_TYPE, Metrics
from edgetool.fpga_service.observing import Observe
from edgetool.fpga_service.recording import Recorder
from edgetool.serving.auth import OPEN_PATHS, App, RequireKey

PLAIN_NAME = "fpga"
"""Name of the model of a host that does not say one, where none is set."""


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway is told; the meanings are those of ServeFpgaConfig. keys: by name; empty: no key is asked for."""

    served_model_name: str | None = None
    max_model_len: int | None = None
    temperature: float | None = None
    max_queue: int = 64
    timeout_s: float = 600.0
    rate_limit: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()


class Gateway:
    """One host and what stands before it."""

    def __init__(
        self,
        host: HostClient,
        settings: GatewaySettings,
        recorder: Recorder | None = None,
        counter: Counter | None = None,
    ) -> None:
        self.host = host
        self.settings = settings
        self.recorder = recorder
        self.counter = counter
        self.queue = Queue(settings.max_queue)
        self.rates = None if settings.rate_limit is None else RateLimit(settings.rate_limit)
        self.metrics = Metrics()

    @property
    def name(self) -> str | None:
        """Name of the model that clients ask for; None while it is not known."""
        if self.settings.served_model_name is not None:
            return self.settings.served_model_name
        if self.host.facts is not None:
            return self.host.facts.model
        return PLAIN_NAME if self.host.state == "plain" else None

    def name_for(self, asked: str | None) -> str:
        """The name to answer with. Raises Refusal when another model was asked for, or there is no host."""
        if not self.host.ready and self.host.state == "away":
            raise Refusal(503, f"the host is away: {self.host.why}", code="host_unavailable", retry_after_s=2)
        name = self.name
        if asked is not None and name is not None and asked != name:
            said = f"the model {asked!r} does not exist here; there is {name!r}"
            raise Refusal(404, said, param="model", code="model_not_found")
        return name or asked or PLAIN_NAME

    @property
    def chats(self) -> bool:
        """Whether a prompt is a question for the model, or a text to go on with."""
        return self.host.facts is None or self.host.facts.chat

    @property
    def context_tokens(self) -> int | None:
        """Longest context; None where nobody says."""
        limits = [self.settings.max_model_len, self.host.facts.max_context_tokens if self.host.facts else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def status(self) -> dict[str, Any]:
        """What /ready says."""
        facts = self.host.facts
        return {
            "status": "ready" if self.host.ready else "not ready",
            "model": self.name,
            "max_model_len": self.context_tokens,
            "host": {
                "address": self.host.address,
                "state": self.host.state,
                "why": None if self.host.ready else self.host.why,
                "board": None if facts is None else facts.board,
                "numerics": None if facts is None else facts.numerics,
            },
            "requests": self.queue.admitted,
        }


def make_app(gateway: Gateway) -> App:
    """The gateway as an ASGI app. It connects to the host while it runs."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.host:
            yield

    app = FastAPI(
        title="edgetool serve-fpga",
        version=__version__,
        description="A compiled model behind the API of OpenAI.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={400: _error("The request cannot be served."), 503: _error("The host of the model is away.")},
    )
    api_errors.install(app)
    app.include_router(routes(gateway), responses=_ASKING)

    @app.get("/", summary="Say that the server is there")
    async def here() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/health", summary="Say that the server lives (no key)")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Say whether the host is there")
    async def ready() -> Response:
        return JSONResponse(gateway.status(), 200 if gateway.host.ready else 503)

    @app.get("/metrics", summary="Figures in Prometheus' form", response_class=Response)
    async def metrics() -> Response:
        gateway.metrics.admitted.set(gateway.queue.admitted)
        gateway.metrics.host_up.set(int(gateway.host.ready))
        gateway.metrics.host_connections.set(gateway.host.connections)
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="The one model that is served")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [] if gateway.name is None else [_model(gateway)]}

    @app.get("/v1/models/{name:path}", summary="The model of this name", responses={404: _error("No such model.")})
    async def model(name: str) -> dict[str, Any]:
        if name != gateway.name:
            raise Refusal(404, f"the model {name!r} does not exist here", param="model", code="model_not_found")
        return _model(gateway)

    _describe(app, with_keys=bool(gateway.settings.keys))
    return _wrapped(app, gateway)


def _wrapped(app: App, gateway: Gateway) -> App:
    settings = gateway.settings
    inner: App = api_errors.LimitBody(app)
    if settings.keys:
        inner = RequireKey(inner, settings.keys)
    inner = Observe(inner, gateway.metrics, gateway.recorder)
    if settings.cors_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return inner


def _model(gateway: Gateway) -> dict[str, Any]:
    record = {"id": gateway.name, "object": "model", "created": 0, "owned_by": "edgetool"}
    return {**record, "max_model_len": gateway.context_tokens}


def _error(description: str) -> dict[str, Any]:
    error = {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
        "required": ["message", "type", "param", "code"],
    }
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_ASKING: dict[int | str, dict[str, Any]] = {
    404: _error("Another model was asked for."),
    413: _error("The body is too long."),
    429: _error("The queue is full, or the key has sent too much; Retry-After says when to come back."),
    502: _error("The host failed."),
    504: _error("The answer was not complete in time."),
}


def _describe(app: FastAPI, *, with_keys: bool) -> None:
    """Let the OpenAPI document say what is answered: errors are 400 here, never FastAPI's 422."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if with_keys and path in OPEN_PATHS:
                    operation["security"] = []
                elif with_keys:
                    operation["responses"]["401"] = _error("The key is missing or wrong.")
        schemas = document.get("components", {}).get("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if with_keys:
            document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
