"""The gateway's side of protocol A against hosts written from the text, right and wrong ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from edgetool.fpga_service import host_connection
from edgetool.fpga_service.answers import PLAIN_TOKEN, Ended, Started
from edgetool.fpga_service.device import GenerateOptions, ScoredToken, Step
from edgetool.fpga_service.host_client import HostClient
from edgetool.fpga_service.host_errors import HostAway, HostFailed, RequestRefused, TimedOut
from tests.fakes.fake_host import FakeHost, frame
from tests.fakes.old_host import OldHost

LIMIT_S = 60.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 2 * LIMIT_S))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def ask(client: HostClient, text: str, timeout_s: float = LIMIT_S) -> str:
    """The answer's text; asserts that events come in their order."""
    kinds: list[type] = []
    said = ""
    async with client.chat(user(text), GenerateOptions(), timeout_s) as answer:
        async for event in answer:
            kinds.append(type(event))
            if isinstance(event, Step):
                said += event.text
    assert kinds[0] is Started and kinds[-1] is Ended and set(kinds[1:-1]) == {Step}
    return said


async def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def client_of(host: FakeHost, **options: Any) -> HostClient:
    return HostClient("127.0.0.1", host.port, **options)


def test_a_host_with_the_extension_streams_and_counts() -> None:
    async def test() -> None:
        async with FakeHost() as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            assert client.state == "extended" and client.facts is not None and client.facts.model == "echo"
            options = GenerateOptions(max_tokens=5, temperature=0.5, seed=3, stop=("x",), logprobs=2)
            async with client.chat(user("hello"), options, LIMIT_S) as answer:
                events = [event async for event in answer]
            assert events[0] == Started(7)
            assert [event.id for event in events[1:-1] if isinstance(event, Step)] == [10, 11, 12, 13]
            assert "".join(event.text for event in events[1:-1] if isinstance(event, Step)) == "echo: hello"
            assert events[-1] == Ended("stop", 7, 4)
            asked = host.asked[0]
            assert asked["messages"] == user("hello") and 0 < asked["timeout_s"] <= LIMIT_S
            assert asked["options"] == {
                "max_tokens": 5,
                "temperature": 0.5,
                "top_p": 1.0,
                "top_k": 0,
                "seed": 3,
                "stop": ["x"],
                "logprobs": 2,
                "ignore_eos": False,
            }

    run(test)


def test_a_hundred_requests_at_once_each_get_their_own_answer_on_one_connection() -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=0.001) as host, client_of(host) as client:
            answers = await asyncio.gather(*(ask(client, f"nonce-{n}") for n in range(100)))
            assert answers == [f"echo: nonce-{n}" for n in range(100)]
            assert host.connections == 1 and len({asked["id"] for asked in host.asked}) == 100

    run(test)


def test_prompts_scores_and_token_ids() -> None:
    async def test() -> None:
        async with FakeHost() as host, client_of(host) as client:
            async with client.complete([1, 2, 3], GenerateOptions(), LIMIT_S) as answer:
                text = "".join([event.text async for event in answer if isinstance(event, Step)])
            assert text == "echo: [1, 2, 3]"
            scored = await client.score("ab", 1, timeout_s=LIMIT_S)
            assert scored == (ScoredToken(1, "a", 0, None), ScoredToken(2, "b", 1, -0.5, ((2, "b", -0.5),)))
            assert await client.tokenize("ab", timeout_s=LIMIT_S) == (1, 2, 3)
            assert await client.tokenize(user("ab"), timeout_s=LIMIT_S) == (1, 2, 3)
            assert [asked["type"] for asked in host.asked] == ["complete", "score", "tokenize", "tokenize"]

    run(test)


def test_a_plain_host_is_recognised_and_gets_only_what_it_knows() -> None:
    async def test() -> None:
        async with FakeHost(extended=False) as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            assert client.state == "plain" and client.facts is None
            async with client.chat(user("hello"), GenerateOptions(max_tokens=9, temperature=0.25), LIMIT_S) as answer:
                events = [event async for event in answer]
            assert events == [Started(None), Step(PLAIN_TOKEN, "echo: hello", finish="stop"), Ended("stop", None, None)]
            assert host.asked == [{"model": None, "messages": user("hello"), "temperature": 0.25, "max_tokens": 9}]
            for refused in (client.score("x", timeout_s=1), client.tokenize("x", timeout_s=1)):
                with pytest.raises(RequestRefused, match="plain A"):
                    await refused

    run(test)


def test_a_plain_host_is_asked_one_question_on_a_connection_and_says_hello_once() -> None:
    async def test() -> None:
        async with FakeHost(extended=False) as host, client_of(host) as client:
            answers = await asyncio.gather(*(ask(client, f"nonce-{n}") for n in range(20)))
            assert answers == [f"echo: nonce-{n}" for n in range(20)]
            assert host.hellos == 1 and host.connections >= 21

    run(test)


@pytest.mark.parametrize("extended", [True, False])
def test_an_answer_that_comes_twice_reaches_nobody_else(extended: bool) -> None:
    async def test() -> None:
        async with FakeHost(extended, fault="twice") as host, client_of(host) as client:
            for n in range(20):
                assert await ask(client, f"nonce-{n}") == f"echo: nonce-{n}"

    run(test)


@pytest.mark.parametrize("extended", [True, False])
def test_a_host_that_never_answers_is_waited_for_no_longer_than_the_deadline(extended: bool) -> None:
    async def test() -> None:
        async with FakeHost(extended, fault="never", faulty=1) as host, client_of(host, settle_s=0.05) as client:
            await client.wait_ready(LIMIT_S)
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            with pytest.raises(TimedOut, match=r"0\.2 s"):
                await ask(client, "first", timeout_s=0.2)
            assert 0.2 <= loop.time() - begun_s < 5
            assert await ask(client, "second") == "echo: second"
            if extended:
                await until(lambda: host.cancelled == [host.asked[0]["id"]])
                assert host.connections == 1

    run(test)


def test_a_late_answer_of_a_plain_host_is_dropped_though_it_comes_on_the_next_connection() -> None:
    async def test() -> None:
        host = FakeHost(extended=False, fault="late", faulty=1)
        host.gate = asyncio.Event()
        async with host, client_of(host, settle_s=LIMIT_S) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises(TimedOut):
                await ask(client, "first", timeout_s=0.1)
            await until(lambda: len(host.asked) == 1)
            second = asyncio.create_task(ask(client, "second"))
            await until(lambda: host.connections == 3)  # for the hello, the first and the second
            host.gate.set()
            assert await second == "echo: second"
            assert [asked["messages"] for asked in host.asked] == [user("first"), user("second")]

    run(test)


def test_the_host_of_the_first_implementation_answers_though_it_pauses_between_connections() -> None:
    async def test(host: OldHost) -> None:
        async with HostClient("127.0.0.1", host.port) as client:
            answers = await asyncio.gather(*(ask(client, f"nonce-{n}") for n in range(5)))
            assert answers == [f"about nonce-{n}" for n in range(5)]
            assert client.state in ("plain", "connecting") and client.ready

    with OldHost(pause_s=0.1) as host:
        run(lambda: test(host))
        assert host.asked == ["Hi", *(f"nonce-{n}" for n in range(5))]


def test_its_late_answer_which_it_sends_to_the_next_connection_is_dropped() -> None:
    async def test(host: OldHost) -> None:
        async with HostClient("127.0.0.1", host.port, settle_s=LIMIT_S) as client:
            await client.wait_ready(LIMIT_S)
            host.gate.clear()
            with pytest.raises(TimedOut):
                await ask(client, "first", timeout_s=0.2)
            await until(lambda: host.asked == ["Hi", "first"])
            second = asyncio.create_task(ask(client, "second"))
            await until(lambda: host.accepted == 3)  # for the hello, the first and the second
            host.gate.set()
            assert await second == "about second"

    with OldHost(pause_s=0.1) as host:
        run(lambda: test(host))


def test_without_waiting_for_what_is_owed_the_late_answer_would_reach_the_next_request() -> None:
    """The negative control of the test before: what it forbids does happen without the rule."""

    async def test() -> None:
        host = FakeHost(extended=False, fault="late")
        host.gate = asyncio.Event()
        async with host, client_of(host, settle_s=0.0) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises(TimedOut):
                await ask(client, "first", timeout_s=0.1)
            second = asyncio.create_task(ask(client, "second"))
            await until(lambda: len(host.asked) == 2)
            host.gate.set()
            assert await second == "echo: first"

    run(test)


def test_a_late_answer_with_an_id_is_dropped() -> None:
    async def test() -> None:
        async with FakeHost(fault="late", token_delay_s=0.05, faulty=1) as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises(TimedOut):
                await ask(client, "first", timeout_s=0.08)
            assert await ask(client, "second") == "echo: second"
            assert host.connections == 1

    run(test)


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("fault", ["garbage", "half", "close"])
def test_what_is_no_answer_fails_the_request_at_once_and_the_next_one_works(fault: str, extended: bool) -> None:
    async def test() -> None:
        async with FakeHost(extended, fault=fault, faulty=1) as host, client_of(host, settle_s=0.05) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises((HostAway, HostFailed)):
                await ask(client, "first")
            await client.wait_ready(LIMIT_S)
            assert await ask(client, "second") == "echo: second"

    run(test)


@pytest.mark.parametrize(
    ("fault", "why"), [("gap", "token 2"), ("stranger", "never made"), ("miscount", "after 5 tokens, and 4 came")]
)
def test_a_host_that_contradicts_itself_is_disconnected(fault: str, why: str) -> None:
    async def test() -> None:
        async with FakeHost(fault=fault, faulty=1) as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises(HostAway, match=why):
                await ask(client, "first")
            await client.wait_ready(LIMIT_S)
            assert await ask(client, "second") == "echo: second"
            assert host.connections == 2

    run(test)


def test_all_requests_of_a_connection_that_breaks_fail_and_later_ids_are_new() -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=30) as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            under_way = [asyncio.create_task(ask(client, f"nonce-{n}")) for n in range(5)]
            await until(lambda: len(host.asked) == 5)
            host.drop()
            for task in under_way:
                with pytest.raises(HostAway, match=r"connection"):
                    await task
            host.token_delay_s = 0
            await client.wait_ready(LIMIT_S)
            assert await ask(client, "again") == "echo: again"
            ids = [asked["id"] for asked in host.asked]
            assert ids == sorted(set(ids))

    run(test)


def test_leaving_an_answer_cancels_it() -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=0.05, pieces=100) as host, client_of(host) as client:
            async with client.chat(user("x" * 100), GenerateOptions(), LIMIT_S) as answer:
                async for event in answer:
                    if isinstance(event, Step):
                        break
            await until(lambda: host.cancelled == [host.asked[0]["id"]])
            assert await ask(client, "next") == "echo: next"

    run(test)


def test_a_request_cancelled_by_its_task_is_cancelled_at_the_host() -> None:
    async def test() -> None:
        async with FakeHost(token_delay_s=30) as host, client_of(host) as client:
            task = asyncio.create_task(ask(client, "x"))
            await until(lambda: len(host.asked) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: host.cancelled == [host.asked[0]["id"]])

    run(test)


def test_a_host_that_is_away_is_said_at_once_and_found_again_when_it_is_back() -> None:
    async def test() -> None:
        async with FakeHost() as host:
            port = host.port
        async with HostClient("127.0.0.1", port) as client:
            with pytest.raises(HostAway, match=r"away: no connection to 127\.0\.0\.1"):
                await ask(client, "x")
            assert client.state == "away" and not client.ready
            with pytest.raises(HostAway):
                await client.wait_ready(0.05)
            async with FakeHost(port=port):
                await client.wait_ready(LIMIT_S)
                assert await ask(client, "back") == "echo: back"

    run(test)


def test_a_plain_host_that_comes_back_with_the_extension_is_recognised() -> None:
    async def test() -> None:
        async with FakeHost(extended=False) as host:
            client = client_of(host)
            async with client:
                assert await ask(client, "one") == "echo: one"
                assert client._plain
                host.drop()
                await host.__aexit__()
                await until(lambda: client.state == "away" and not client._plain)
                async with FakeHost(port=host.port):
                    await until(lambda: client.state == "extended")
                    assert await ask(client, "two") == "echo: two"

    run(test)


def test_a_silent_host_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_connection, "PING_EVERY_S", 0.05)
    monkeypatch.setattr(host_connection, "SILENT_S", 0.3)

    async def test() -> None:
        async with FakeHost(fault="silent") as host, client_of(host) as client:
            with pytest.raises(HostAway, match="said nothing for"):
                await ask(client, "x")

    run(test)


def test_pings_keep_an_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_connection, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(host_connection, "SILENT_S", LIMIT_S)

    async def test() -> None:
        async with FakeHost() as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            await until(lambda: host.pings >= 3)
            assert await ask(client, "x") == "echo: x"
            assert host.connections == 1 and host.asked[0]["id"] > 3  # pings have taken ids

    run(test)


def test_a_host_that_answers_no_hello_counts_as_plain_and_its_late_answer_is_dropped() -> None:
    async def test() -> None:
        connections: list[asyncio.StreamWriter] = []
        questions: list[bytes] = []

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # like the first implementation: the answer to the hello goes to whoever is connected by then
            connections.append(writer)
            if len(connections) == 2:
                writer.write(frame("to Hi"))
            while data := await reader.read(65536):
                questions.append(data)
                if b"edgetool" not in data:
                    writer.write(frame("to other"))

        server = await asyncio.start_server(slow, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with HostClient("127.0.0.1", port, hello_timeout_s=0.1, settle_s=LIMIT_S) as client:
            assert await ask(client, "other") == "to other"
        assert len(questions) == 2
        server.close()

    run(test)


@pytest.mark.parametrize(
    "make",
    [
        lambda client: client.chat([], GenerateOptions(), 1),
        lambda client: client.chat([{"role": "user", "content": "\ud800"}], GenerateOptions(), 1),
        lambda client: client.chat([{"role": "user", "content": 5}], GenerateOptions(), 1),
        lambda client: client.chat(user("x"), GenerateOptions(max_tokens=0), 1),
        lambda client: client.chat(user("x"), GenerateOptions(temperature=float("nan")), 1),
        lambda client: client.complete([-1], GenerateOptions(), 1),
        lambda client: client.complete("x", GenerateOptions(logprobs=101), 1),
        lambda client: client.complete("\ud800", GenerateOptions(), 1),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_sent(make: Callable[[HostClient], Any]) -> None:
    async def test() -> None:
        async with FakeHost() as host, client_of(host) as client:
            await client.wait_ready(LIMIT_S)
            with pytest.raises(RequestRefused):
                async with make(client):
                    pass
            assert not host.asked

    run(test)


def test_a_request_longer_than_a_frame_is_refused_and_the_connection_stays() -> None:
    async def test() -> None:
        async with FakeHost() as host, client_of(host) as client:
            with pytest.raises(RequestRefused, match="too long"):
                await ask(client, "x" * (17 * 2**20))
            assert await ask(client, "short") == "echo: short"
            assert host.connections == 1

    run(test)
