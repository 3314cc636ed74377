"""A thousand frames of chance against each side: it neither hangs, nor falls, nor says what was not asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
from typing import Any

import pytest

from edgetool.errors import EdgetoolError
from edgetool.fpga_service import host_client
from edgetool.fpga_service import protocol_b as b
from edgetool.fpga_service.answers import Ended, Started
from edgetool.fpga_service.device import GenerateOptions, Step
from edgetool.fpga_service.host_client import HostClient
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_host import FakeHost, frame
from tests.fakes.old_client import OldTokenClient, ask_bare
from tests.fakes.running_host import MARKER, Raw, RunningHost

FRAMES = 1000

REQUESTS: list[dict[str, Any]] = [
    {"type": "chat", "id": 1, "messages": [{"role": "user", "content": "say 你"}], "options": {"logprobs": 1}},
    {"type": "complete", "id": 2, "prompt": [1, 2, 3], "options": {"max_tokens": 5, "stop": ["a"]}, "timeout_s": 5},
    {"type": "score", "id": 3, "prompt": "abc", "top": 2},
    {"type": "tokenize", "id": 4, "text": "abc"},
    {"type": "cancel", "id": 2},
    {"type": "ping", "id": 5},
    {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "max_tokens": 3},
]
REPLIES: list[dict[str, Any]] = [
    {"type": "started", "id": 1, "prompt_tokens": 3},
    {"type": "token", "id": 1, "index": 0, "step": {"id": 5, "text": "a", "logprob": -1.0, "top": [[5, "a", -1.0]]}},
    {"type": "done", "id": 1, "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1},
    {"type": "scores", "id": 1, "tokens": [{"id": 1, "text": "a", "text_offset": 0, "logprob": None, "top": []}]},
    {"type": "tokens", "id": 1, "ids": [1, 2]},
    {"type": "error", "id": 1, "code": "timeout", "message": "x"},
    {"type": "pong", "id": 1},
]
ODD = [None, True, -1, 2**63, 1e308, "", "x" * 100, [], {}, [[]], "\x00", "<|END|>", 0.5]


def chance_value(chance: random.Random, value: object) -> object:
    """`value` with something in it put in place of something else."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kept = {name: item for name, item in value.items() if name != key or chance.random() < 0.8}
        return {**kept, **({key: chance_value(chance, value[key])} if chance.random() < 0.8 else {})}
    if isinstance(value, list) and value and chance.random() < 0.7:
        return [chance_value(chance, item) if chance.random() < 0.5 else item for item in value]
    return chance.choice(ODD)


def chance_frame(chance: random.Random, messages: list[dict[str, Any]]) -> bytes:
    """A frame that is right, nearly right, or nothing like one."""
    message: Any = chance.choice(messages)
    kind = chance.random()
    if kind < 0.15:
        return chance.randbytes(chance.randint(1, 40))
    if kind < 0.6:
        message = chance_value(chance, message)
    data = bytearray(frame(json.dumps(message)))
    if kind > 0.8:
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    if 0.7 < kind < 0.8:
        data = data[: chance.randrange(len(data))]
    return bytes(data)


@pytest.mark.parametrize("after_hello", [False, True])
def test_a_thousand_frames_of_chance_against_the_host(after_hello: bool) -> None:
    chance = random.Random(11 + after_hello)
    replies, enough = 0, 20 if after_hello else 1
    with RunningHost(FakeDevice(), half_frame_s=0.5) as host:
        sent = 0
        while sent < FRAMES:
            with Raw(host.port_a) as raw:
                if after_hello:
                    raw.hello()
                count = chance.randint(1, 20)
                for _ in range(count):
                    with contextlib.suppress(ConnectionError):
                        raw.socket.sendall(chance_frame(chance, REQUESTS))
                sent += count
                raw.socket.settimeout(0.02 if replies >= enough else 2.0)  # some must come, however slow the host is
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        (length,) = struct.unpack(">I", raw.exactly(4))
                        payload = raw.exactly(length)
                        replies += 1
                        if after_hello:
                            said = json.loads(payload.removesuffix(MARKER))
                            assert said["type"] in ("started", "token", "done", "scores", "tokens", "error", "pong")
        assert ask_bare(host.port_a, "still there") == "<there>"
        assert "Traceback" not in "".join(host.lines)
    assert replies >= enough


def test_a_thousand_commands_of_chance_against_the_host() -> None:
    chance = random.Random(13)
    commands = [
        b.write_command("rkvs", (2, 0, 1), (72, 73)),
        b.write_command("rmod", (1, 1), (72,)),
        b.write_command("rks4", (1, 5, 0), (72,)),
        b.write_command("hel4", (), ()),
        b"quit",
    ]
    with RunningHost(FakeDevice(vocab=65_536), half_frame_s=0.5) as host:
        sent = 0
        while sent < FRAMES:
            with Raw(host.port_b) as raw:
                for _ in range(chance.randint(1, 10)):
                    data = bytearray(chance.choice(commands))
                    for _ in range(chance.choice([0, 0, 0, 1, 2])):
                        data[chance.randrange(len(data))] = chance.randrange(256)
                    sent += 1
                    with contextlib.suppress(ConnectionError):
                        raw.socket.sendall(data)
                raw.socket.settimeout(0.02)
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        raw.exactly(1024)
        client = OldTokenClient(host.port_b)
        assert client.rkvc([ord("x")]) == [*map(ord, "<x>"), 0]
        assert client.quit()
        assert "Traceback" not in "".join(host.lines)


class _ChanceHost(FakeHost):
    """Answers with frames of chance, then hangs up."""

    chance = random.Random(17)
    frames = 0

    async def _answer(self, writer: asyncio.StreamWriter, request: dict[str, Any], extended: bool) -> None:
        if request.get("type") in ("cancel", "ping") or self.fault is None:
            await super()._answer(writer, request, extended)
            return
        self.asked.append(request)
        messages = [{**reply, "id": request["id"]} for reply in REPLIES] if extended else [{"a": "text"}] * 7
        if self.chance.random() < 0.5:
            self.chance.shuffle(messages)
        for message in messages:
            self.frames += 1
            right = self.chance.random() < 0.7
            writer.write(frame(json.dumps(message)) if right else chance_frame(self.chance, messages))
        writer.close()


@pytest.mark.parametrize("extended", [True, False])
def test_a_thousand_frames_of_chance_against_the_gateways_side(extended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_client, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(host_client, "_LONGEST_PAUSE_S", 0.002)

    async def ask(client: HostClient, text: str) -> list[object]:
        async with client.chat([{"role": "user", "content": text}], GenerateOptions(), 5) as answer:
            return [event async for event in answer]

    async def test() -> tuple[int, int]:
        ended, failed = 0, 0
        host = _ChanceHost(extended, fault="garbage")
        async with host, HostClient("127.0.0.1", host.port, settle_s=0.001) as client:
            while host.frames < FRAMES:
                await client.wait_ready(20)
                try:
                    events = await ask(client, "x")
                except EdgetoolError:
                    failed += 1
                    continue
                assert isinstance(events[0], Started) and isinstance(events[-1], Ended)
                assert all(isinstance(event, Step) for event in events[1:-1])
                ended += 1
            host.fault = None
            await client.wait_ready(20)
            events = await ask(client, "nonce")
            assert "".join(event.text for event in events if isinstance(event, Step)) == "echo: nonce"
        return ended, failed

    ended, failed = asyncio.run(asyncio.wait_for(test(), 120))
    assert failed > 10 and ended > 10
