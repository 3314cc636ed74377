"""What clients of the gateway see when the host is away, slow, wrong or overrun, and when they go away themselves."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.fakes.fake_host import FakeHost
from tests.fakes.gateway_server import CHAT, LIMIT_S, Served, read_events, run, serving, until

NOBODY = 1  # no host listens on port 1


def error_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_without_a_host_requests_are_503_at_once_and_readiness_says_why() -> None:
    async def test() -> None:
        async with serving(NOBODY) as served:
            begun_s = time.monotonic()
            for body in ({}, {"stream": True}):
                response = await served.chat("a", **body)
                assert error_of(response) == (503, "host_unavailable")
                assert int(response.headers["retry-after"]) >= 1
            assert time.monotonic() - begun_s < 5
            assert (await served.post("/predict", prompt="a")).status_code == 503
            ready = await served.client.get("/ready")
            assert ready.status_code == 503 and "no connection to 127.0.0.1:1" in ready.json()["host"]["why"]
            assert (await served.client.get("/health")).status_code == 200
            assert (await served.client.get("/v1/models")).json()["data"] == []

    run(test)


def test_the_host_is_found_again_when_it_is_back() -> None:
    async def test() -> None:
        async with FakeHost() as host:
            port = host.port
            async with serving(host) as served:
                assert (await served.chat("a")).status_code == 200
                await host.__aexit__()
                await until(lambda: not served.gateway.host.ready)
                assert (await served.chat("b")).status_code == 503
                async with FakeHost(port=port):
                    await until(lambda: served.gateway.host.ready)
                    assert (await served.client.get("/ready")).status_code == 200
                    answer = (await served.chat("c")).json()
                    assert answer["choices"][0]["message"]["content"] == "echo: c"

    run(test)


def test_a_host_that_dies_in_the_middle_of_a_stream_ends_it_with_an_error() -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=60) as host, serving(host) as served:
            body = {"messages": user("hello"), "stream": True}
            async with served.client.stream("POST", CHAT, json=body) as response:
                lines = response.aiter_lines()
                assert '"role": "assistant"' in await anext(lines)
                host.drop()
                rest = [line async for line in lines if line.startswith("data: ")]
            assert rest[-1] == "data: [DONE]" and '"code": "host_unavailable"' in rest[-2]
            assert served.gateway.queue.admitted == 0

    run(test)


@pytest.mark.parametrize("fault", ["garbage", "half", "close", "gap", "stranger", "miscount"])
def test_a_host_that_breaks_the_protocol_is_an_error_and_the_next_request_works(fault: str) -> None:
    async def test() -> None:
        async with FakeHost(fault=fault, faulty=1) as host, serving(host) as served:
            response = await served.chat("a")
            assert response.status_code in (502, 503), response.text
            await until(lambda: served.gateway.host.ready)
            assert (await served.chat("b")).json()["choices"][0]["message"]["content"] == "echo: b"

    run(test)


def test_a_host_that_never_answers_is_a_504_when_the_time_is_over() -> None:
    async def test() -> None:
        async with FakeHost(fault="never", faulty=2) as host, serving(host, timeout_s=0.3) as served:
            assert error_of(await served.chat("a")) == (504, "timeout")
            assert error_of(await served.chat("a", stream=True)) == (504, "timeout")
            await until(lambda: len(host.cancelled) == 2)
            served.gateway.settings = replace(served.gateway.settings, timeout_s=LIMIT_S)
            assert (await served.chat("b")).status_code == 200

    run(test)


def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    async def test() -> None:
        # the time is enough for the first token, also on a busy machine, and the second one never comes
        async with FakeHost(token_delay_s=60) as host, serving(host, timeout_s=3.0) as served:
            body = {"messages": user("a long one, so that there are many tokens in it")}
            async with served.client.stream("POST", CHAT, json={**body, "stream": True}) as response:
                *chunks, last = await read_events(response)
            assert chunks and last["error"]["code"] == "timeout"

    run(test)


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("fault", ["late", "twice"])
def test_no_answer_reaches_another_request(fault: str, extended: bool) -> None:
    async def test() -> None:
        host = FakeHost(extended, fault, delay_s=0.5 if fault == "late" else 0.0, faulty=3)
        async with host, serving(host, timeout_s=0.2 if fault == "late" else LIMIT_S) as served:
            for number in range(12):
                response = await served.chat(f"question {number}")
                if response.status_code == 200:
                    assert response.json()["choices"][0]["message"]["content"] == f"echo: question {number}"
                host.delay_s = 0.0 if number >= 3 else host.delay_s

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_generation_along(stream: bool) -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=0.05, pieces=200) as host, serving(host) as served:
            body = {"messages": user("x" * 300), "stream": stream}

            async def begin() -> None:
                async with served.client.stream("POST", CHAT, json=body) as response:
                    async for _ in response.aiter_raw():
                        pass

            asking = asyncio.create_task(begin())
            await until(lambda: bool(host.asked) and (not stream or served.gateway.queue.admitted == 1))
            await asyncio.sleep(0)
            asking.cancel()
            await until(lambda: host.cancelled == [host.asked[0]["id"]])
            await until(lambda: served.gateway.queue.admitted == 0)
            assert (await served.chat("b")).status_code == 200

    run(test)


def test_a_client_that_leaves_between_two_prompts_leaves_no_place_taken() -> None:
    async def test() -> None:
        async with FakeHost(delay_s=0.05) as host, serving(host) as served:
            asking = asyncio.create_task(served.post("/v1/completions", prompt=["a"] * 100))
            await until(lambda: len(host.asked) >= 3)
            asking.cancel()
            await until(lambda: served.gateway.queue.admitted == 0)
            await served.chat("b")
            assert host.asked[-1]["messages"] == user("b")  # the other prompts are not asked any more
            assert len(host.asked) < 100

    run(test)


def test_a_client_that_does_not_read_loses_its_place_when_its_time_is_over() -> None:
    async def test() -> None:
        async with FakeHost(pieces=2000) as host, serving(host, timeout_s=1.0) as served:
            port = int(served.url.rsplit(":", 1)[1])
            body = json.dumps({"messages": user("x" * (7 << 20)), "stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            # small buffers of the client, so that the answer does not fit on the way
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            _, writer = await asyncio.open_connection(sock=deaf, limit=1024)
            writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await until(lambda: len(host.asked) == 1)
            await until(lambda: served.gateway.queue.admitted == 0)
            writer.transport.abort()

    run(test)


def test_a_full_queue_is_a_429_and_places_come_back() -> None:
    async def test() -> None:
        async with FakeHost() as host, serving(host, max_queue=3) as served:
            host.gate = asyncio.Event()
            asking = [asyncio.create_task(served.chat(str(number))) for number in range(10)]
            await until(lambda: sum(task.done() for task in asking) == 6)
            host.gate.set()
            responses = await asyncio.gather(*asking)
            codes = sorted(response.status_code for response in responses)
            assert codes == [200] * 4 + [429] * 6  # one is served and three wait
            refused = next(response for response in responses if response.status_code == 429)
            assert error_of(refused) == (429, "queue_full") and int(refused.headers["retry-after"]) >= 1
            assert (await served.chat("again")).status_code == 200

    run(test)


def test_a_bug_is_a_500_in_openais_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    async def test() -> None:
        async with FakeHost() as host, serving(host) as served:
            monkeypatch.setattr("edgetool.fpga_service.generation._options", bug)
            transport = httpx.ASGITransport(_app(served), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                response = await client.post(CHAT, json={"messages": user("a")})
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
            assert "secret detail" not in response.text

    run(test)


def _app(served: Served) -> Any:
    from edgetool.fpga_service.gateway import make_app

    return make_app(served.gateway)
