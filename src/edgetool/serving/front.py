"""What stands between clients and an engine: the key on every route, `POST /predict`, `GET /`; all else passes through.

vLLM guards only /v1: its /metrics, /invocations, /tokenize and others are open, so it listens on a Unix socket that
nobody else can reach, and this process owns the port. Run as `python -m edgetool.serving.front`, with its job as one
JSON object on stdin (the key is in it, so it is no argument).
"""

from __future__ import annotations

import asyncio
import json
import socket as sockets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException

from edgetool.serving.auth import RequireKey
from edgetool.serving.jobs import FrontJob
from edgetool.serving.prediction import Prediction
from edgetool.serving.proxy import Proxy, engine_client
from edgetool.serving.strict_json import StrictRoute

PREDICT_AT_ONCE = 256
"""Prompts of one /predict that are with the engine at the same time."""


def make_app(job: FrontJob, engine: httpx.AsyncClient) -> RequireKey:
    """The front as an ASGI app."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(title="edgetool", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.route_class = StrictRoute

    @app.get("/")
    async def status() -> dict[str, str]:
        return {"status": "batch" if job.batch else "ok"}

    @app.post("/predict")
    async def predict(body: Prediction) -> dict[str, Any]:
        if isinstance(body.prompt, str):
            return {"response": await ask(body.prompt, body)}
        free = asyncio.Semaphore(PREDICT_AT_ONCE)

        async def one(prompt: str) -> str:
            async with free:
                return await ask(prompt, body)

        tasks = [asyncio.ensure_future(one(prompt)) for prompt in body.prompt]
        try:
            return {"response": await asyncio.gather(*tasks)}
        finally:
            for task in tasks:
                task.cancel()

    async def ask(prompt: str, body: Prediction) -> str:
        options = body.model_dump(exclude={"prompt"}, exclude_none=True)
        request: dict[str, Any] = {"model": job.served_model_name, **options}
        if job.chat:
            request["messages"] = [{"role": "user", "content": prompt}]
        else:
            request["prompt"] = prompt
        try:
            answer = await engine.post("/v1/chat/completions" if job.chat else "/v1/completions", json=request)
        except httpx.TransportError as error:
            raise HTTPException(503, "the engine does not answer") from error
        if answer.status_code != 200:
            raise HTTPException(answer.status_code, _reason(answer))
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if job.chat else choice["text"])

    app.mount("/", Proxy(engine))
    return RequireKey(app, job.key)


def _reason(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return answer.text[:500]


def main() -> None:
    """Serve until a signal comes."""
    import uvicorn

    job = FrontJob(**json.loads(sys.stdin.read()))
    listening = sockets.socket(fileno=job.listen_fd)
    app = make_app(job, engine_client(Path(job.engine_socket), job.key))
    # the engine's own Date and Server headers pass through, so none are added
    settings = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=2,
        server_header=False,
        date_header=False,
    )
    uvicorn.Server(settings).run(sockets=[listening])


if __name__ == "__main__":
    main()
