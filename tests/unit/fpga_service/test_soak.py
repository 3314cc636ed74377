"""Two hundred clients at once, while the host is killed and started again under them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.gateway_server import CHAT, read_events, serving, until

FAKE_HOST = Path(__file__).parent.parent.parent / "fakes" / "fake_host.py"
CLIENTS = 200
HONEST = {"host_unavailable", "host_failed", "queue_full", "timeout"}
"""Codes of errors that are clear to a client."""


@contextlib.asynccontextmanager
async def killed_again_and_again(port: int, each_s: tuple[float, float], *options: str) -> AsyncIterator[list[int]]:
    """A fake host on `port`, as a process that is killed again and again after `each_s` (least, most); its ids."""
    kills: list[int] = []
    children: list[asyncio.subprocess.Process] = []

    async def start() -> None:
        command = [sys.executable, str(FAKE_HOST), "--port", str(port), *options]
        children.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
        assert children[-1].stdout is not None
        await children[-1].stdout.readline()

    await start()

    async def kill() -> None:
        while True:
            await asyncio.sleep(random.uniform(*each_s))
            children[-1].kill()
            await children[-1].wait()
            kills.append(children[-1].pid)
            await asyncio.sleep(random.choice([0.0, 0.3]))
            await start()

    killing = asyncio.create_task(kill())
    try:
        yield kills
    finally:
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
        for child in children:
            if child.returncode is None:
                child.kill()
                await child.wait()


async def ask_once(client: httpx.AsyncClient, seen: Counter[str]) -> None:
    """One request with a nonce, whole, streamed or left half-way; an answer must hold this nonce and no other."""
    nonce = uuid.uuid4().hex
    body = {"messages": [{"role": "user", "content": nonce}]}
    way = random.choice(["whole", "stream", "leave"])
    if way == "whole":
        response = await client.post(CHAT, json=body)
        document = response.json()
        if response.status_code == 200:
            assert document["choices"][0]["message"]["content"] == f"echo: {nonce}"
        note(seen, document)
        return
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            await response.aread()
            note(seen, response.json())
            return
        if way == "leave":
            await anext(response.aiter_raw())
            seen["left"] += 1
            return
        events = await read_events(response)
        text = "".join(event["choices"][0]["delta"]["content"] for event in events if "choices" in event)
        assert f"echo: {nonce}".startswith(text)
        if "error" not in events[-1]:
            assert text == f"echo: {nonce}" and events[-1]["choices"][0]["finish_reason"] == "stop"
        note(seen, events[-1])


def note(seen: Counter[str], document: dict[str, object]) -> None:
    error = document.get("error")
    if error is None:
        seen["answered"] += 1
        return
    assert isinstance(error, dict) and error["code"] in HONEST, error
    seen[str(error["code"])] += 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seconds"), [("extended", 30.0), ("plain", 16.0)])
def test_every_request_ends_in_its_own_answer_or_a_clear_error(kind: str, seconds: float) -> None:
    options = ["--token-delay-s", "0.02"] if kind == "extended" else ["--plain"]
    each_s = (1.0, 3.0) if kind == "extended" else (3.0, 5.0)  # one request a connection takes longer to come back
    seen: Counter[str] = Counter()

    async def test() -> None:
        port = free_port()
        async with (
            killed_again_and_again(port, each_s, *options) as kills,
            serving(port, max_queue=80, timeout_s=20, settle_s=0.3) as served,
        ):
            end_s = time.monotonic() + seconds

            async def use() -> None:
                # a client of its own: one pool of 200 connections takes most of the time for itself
                transport = httpx.AsyncHTTPTransport(verify=False)
                async with httpx.AsyncClient(transport=transport, base_url=served.url, timeout=60) as client:
                    while time.monotonic() < end_s:
                        await ask_once(client, seen)  # a timeout of the client would be an error: nothing may hang
                        await asyncio.sleep(random.uniform(0, 0.05))

            await asyncio.gather(*(use() for _ in range(CLIENTS)))
            assert len(kills) >= 2
            await until(lambda: served.gateway.queue.admitted == 0)
        assert seen["answered"] > (CLIENTS if kind == "extended" else 20) and seen["left"] > 0, seen
        assert seen["host_unavailable"] > 0, seen  # the kills were felt
        if kind == "extended":
            assert seen["queue_full"] > 0, seen

    asyncio.run(asyncio.wait_for(test(), seconds + 90))
    print(dict(seen))
