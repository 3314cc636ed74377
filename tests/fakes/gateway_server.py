"""A gateway on a real port before a fake host, both in the test's own event loop: nothing is mocked between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import uvicorn

from edgetool.fpga_service.gateway import Gateway, GatewaySettings, make_app
from edgetool.fpga_service.host_client import HostClient
from edgetool.fpga_service.recording import Recorder
from tests.fakes.fake_host import FakeHost

LIMIT_S = 60.0
CHAT = "/v1/chat/completions"


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 3 * LIMIT_S))


async def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


class Served:
    """A gateway that listens: `url`, `gateway`, and `client`, whose requests go to it."""

    def __init__(self, gateway: Gateway, url: str, client: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.url = url
        self.client = client

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, text: str, **body: Any) -> httpx.Response:
        return await self.post(CHAT, messages=[{"role": "user", "content": text}], **body)

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, whose end must be [DONE]."""
        async with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            return await read_events(response)


async def read_events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextlib.asynccontextmanager
async def serving(
    host: FakeHost | int,
    recorder: Recorder | None = None,
    key: str | None = None,
    settle_s: float = 2.0,
    **settings: Any,
) -> AsyncIterator[Served]:
    """A gateway of `host` (or of a host on that port of this machine), once it has found out what the host is."""
    port = host if isinstance(host, int) else host.port
    gateway = Gateway(HostClient("127.0.0.1", port, settle_s=settle_s), GatewaySettings(**settings), recorder)
    config = uvicorn.Config(make_app(gateway), port=0, log_level="critical", access_log=False, timeout_keep_alive=75)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started or task.done())
    await until(lambda: gateway.host.state != "connecting")
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=60, limits=limits, trust_env=False
        ) as client:
            yield Served(gateway, url, client)
    finally:
        server.should_exit = server.force_exit = True
        await task
