"""The host over real sockets, spoken to byte by byte, on a device without a model."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edgetool.fpga_service import host as host_module
from edgetool.fpga_service.device import GenerateOptions, ScoredToken
from tests.fakes.fake_device import FakeDevice
from tests.fakes.old_client import OldGateway, ask_bare
from tests.fakes.running_host import MARKER, Raw, RunningHost

LIMIT_S = 30.0


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def host(device: FakeDevice) -> Iterator[RunningHost]:
    with RunningHost(device) as running:
        yield running


@pytest.fixture
def raw(host: RunningHost) -> Iterator[Raw]:
    with Raw(host.port_a) as connection:
        yield connection


@pytest.fixture
def extended(raw: Raw) -> Raw:
    raw.hello()
    return raw


def question(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def complete(id: int, text: str, **options: Any) -> dict[str, Any]:
    return {"type": "complete", "id": id, "prompt": text, "options": options}


class TestPlain:
    def test_the_old_gateway_gets_its_answers_one_after_another(self, host: RunningHost, device: FakeDevice) -> None:
        gateway = OldGateway(host.port_a)
        for n in range(3):
            asked = question(f"say nonce-{n}", model="glm", temperature=0.5, max_tokens=100, stream=False)
            assert gateway.ask(asked) == f"<nonce-{n}>"
        gateway.close()
        assert device.options[0] == GenerateOptions(100, 0.5, 1.0, 0)

    def test_what_the_old_gateways_clients_leave_out_is_the_models_own(
        self, host: RunningHost, device: FakeDevice
    ) -> None:
        gateway = OldGateway(host.port_a)
        assert gateway.ask(question("say this")) == "<this>"
        gateway.close()
        assert device.options == [GenerateOptions(1024, 1.0, 1.0, 0)]

    def test_the_oldest_client_asks_without_json_or_marker_and_is_answered_alike(self, host: RunningHost) -> None:
        assert ask_bare(host.port_a, "say 你好") == "<你好>"

    def test_the_whole_history_is_used(self, raw: Raw, device: FakeDevice) -> None:
        history = [("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three")]
        raw.say(messages=[{"role": role, "content": text} for role, text in history])
        assert raw.text() == "<three>"
        assert device.prompts == ["[system] Be brief.[user] one[assistant] two[user] three"]

    def test_an_answer_that_does_not_fit_ends_with_max_tokens_or_the_context(self) -> None:
        with RunningHost(FakeDevice(context_tokens=20)) as host, Raw(host.port_a) as raw:
            raw.say(**question("ab", max_tokens=1000))  # [user] ab has 9 characters
            assert raw.text() == "<ab>"
            raw.say(**question("abcdefghij", max_tokens=1000))  # 17
            assert raw.text() == "<ab"
            raw.say(**question("abcdefghij", max_tokens=2))
            assert raw.text() == "<a"

    def test_requests_sent_together_are_answered_in_their_order(self, raw: Raw) -> None:
        for n in range(10):
            raw.say(**question(f"nonce-{n}"))
        assert [raw.text() for _ in range(10)] == [f"<nonce-{n}>" for n in range(10)]

    def test_a_marker_inside_question_and_answer_is_text(self, raw: Raw) -> None:
        raw.say(**question("x a<|END|>b"))
        assert raw.text() == "<a<|END|>b>"

    @pytest.mark.parametrize(
        "bad",
        [
            b"\0\0\0\0",
            b"\xff\xff\xff\xff",
            struct.pack(">I", 2**24 + 1),
            struct.pack(">I", 9) + b"\xff\xfe" + MARKER,
            struct.pack(">I", 9) + b"{}" + MARKER,
            struct.pack(">I", 7) + MARKER,
            struct.pack(">I", 25) + b'{"messages": "hi"}' + MARKER,
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
    )
    def test_what_is_no_request_closes_the_connection_without_a_reply(
        self, host: RunningHost, device: FakeDevice, bad: bytes
    ) -> None:
        with Raw(host.port_a) as raw:
            raw.socket.sendall(bad)
            assert raw.closed()
        assert ask_bare(host.port_a, "still there") == "<there>"
        assert any("closed" in line for line in host.lines) and device.prompts == ["[user] still there"]

    @pytest.mark.parametrize("why", ["context", "role", "device"])
    def test_what_cannot_be_answered_closes_the_connection_and_never_looks_like_an_answer(self, why: str) -> None:
        failure = RuntimeError() if why == "device" else None
        device = FakeDevice(context_tokens=5 if why == "context" else 100, fail=failure)
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.say(messages=[{"role": "tool" if why == "role" else "user", "content": "x"}])
            assert raw.closed()
            until(lambda: bool(host.lines))

    def test_every_split_of_a_request_is_the_same_request(self, host: RunningHost) -> None:
        payload = json.dumps(question("x 你<|END|>好")).encode() + MARKER
        data = struct.pack(">I", len(payload)) + payload
        with Raw(host.port_a) as raw:
            for cut in range(1, len(data), 7):
                raw.socket.sendall(data[:cut])
                raw.socket.sendall(data[cut:])
                assert raw.text() == "<你<|END|>好>"
            for at in range(len(data)):
                raw.socket.sendall(data[at : at + 1])
            assert raw.text() == "<你<|END|>好>"

    def test_a_client_that_leaves_in_the_middle_of_any_byte_does_no_harm(self, host: RunningHost) -> None:
        payload = json.dumps(question("x")).encode() + MARKER
        data = struct.pack(">I", len(payload)) + payload
        for cut in range(len(data) + 1):
            with Raw(host.port_a) as raw:
                raw.socket.sendall(data[:cut])
        assert ask_bare(host.port_a, "still there") == "<there>"

    def test_half_a_frame_is_waited_for_no_longer_than_its_time(self, device: FakeDevice) -> None:
        with RunningHost(device, half_frame_s=0.2) as host, Raw(host.port_a) as raw, Raw(host.port_a) as idle:
            raw.socket.sendall(b"\0\0\0")
            assert raw.closed()
            assert any("half a frame" in line for line in host.lines)
            idle.say(**question("an idle connection stays"))
            assert idle.text() == "<stays>"

    def test_a_client_that_leaves_ends_its_generation(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device) as host:
            with Raw(host.port_a) as raw:
                raw.say(**question("first"))
                until(lambda: device.prompts == ["[user] first"])
            until(lambda: device.stopped == 1)
            device.gate = None
            assert ask_bare(host.port_a, "second") == "<second>"


class TestHello:
    def test_the_reply_proves_the_nonce_and_says_what_there_is(self, host: RunningHost) -> None:
        with Raw(host.port_a) as raw:
            said = raw.hello()
        assert said["proof"] == hashlib.sha256(b"ab" * 16).hexdigest()
        assert said["hello"] == 1 and said["max_queue"] == 64
        assert said["facts"] == {
            "model": "fake",
            "family": "llama",
            "vocab": 0x110000,
            "max_context_tokens": 10_000,
            "eos_token_ids": [0],
            "numerics": "et1",
            "image_sha256": "ab" * 32,
            "board": "fake-board",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "chat": True,
        }

    def test_it_does_not_reach_the_device(self, host: RunningHost, device: FakeDevice) -> None:
        with Raw(host.port_a) as raw:
            raw.hello()
        assert device.prompts == []

    def test_after_a_plain_request_it_is_a_plain_request_too(self, raw: Raw) -> None:
        raw.say(**question("one"))
        assert raw.text() == "<one>"
        raw.say(**question("two"), edgetool={"hello": 1, "nonce": "ab" * 16})
        assert raw.text() == "<two>"


class TestExtension:
    def test_a_chat_is_streamed_token_by_token_and_counted(self, extended: Raw) -> None:
        extended.say(type="chat", id=7, **question("hi"), options={"temperature": 0})
        said = extended.until_end(7)
        assert said[0] == {"type": "started", "id": 7, "prompt_tokens": 9}
        assert [one["index"] for one in said[1:-1]] == [0, 1, 2, 3, 4]
        assert "".join(one["step"]["text"] for one in said[1:-1]) == "<hi>"
        assert said[-2]["step"] == {"id": 0, "text": "", "finish": "stop", "token": "", "top": []}
        assert said[-1] == {
            "type": "done",
            "id": 7,
            "finish_reason": "stop",
            "prompt_tokens": 9,
            "completion_tokens": 5,
        }

    def test_options_reach_the_device_and_logprobs_come_back(self, extended: Raw, device: FakeDevice) -> None:
        wanted = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 4, "stop": ["a"]}
        extended.say(**complete(1, "hi", **wanted, logprobs=2, ignore_eos=True))
        said = extended.until_end(1)
        assert device.options == [GenerateOptions(9, 0.5, 0.5, 3, 4, ("a",), 2, True)]
        assert said[1]["step"]["top"] == [[60, "<", -0.5], [61, "=", -1.5]]
        assert said[-2]["step"]["logprob"] == -9999.0

    def test_scores_and_token_ids(self, extended: Raw) -> None:
        extended.say(type="score", id=1, prompt="ab", top=1)
        assert extended.heard()["tokens"] == [
            {"id": 97, "text": "a", "text_offset": 0, "logprob": None, "top": [[97, "a", 0.0]]},
            {"id": 98, "text": "b", "text_offset": 1, "logprob": -1.0, "top": [[98, "b", -1.0]]},
        ]
        extended.say(type="tokenize", id=2, text="ab")
        assert extended.heard() == {"type": "tokens", "id": 2, "ids": [97, 98]}
        extended.say(type="tokenize", id=3, **question("a"))
        assert extended.heard()["ids"] == [ord(c) for c in "[user] a"]

    def test_pings_are_answered_while_the_device_works(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "x"))
            assert raw.heard()["type"] == "started"
            raw.say(type="ping", id=2)
            assert raw.heard() == {"type": "pong", "id": 2}

    @pytest.mark.parametrize(
        ("message", "id", "word"),
        [
            ({"type": "sing", "id": 1}, 1, "tag"),
            ({"type": "chat", "id": 1}, 1, "messages"),
            ({"type": "chat", "id": 1, "messages": [{"role": "tool", "content": "x"}]}, 1, "template"),
            ({"type": "complete", "id": 1, "prompt": ""}, 1, "empty"),
            ({"type": "complete", "id": 1, "prompt": []}, 1, "empty"),
            ({"type": "complete", "id": 1, "prompt": [1114112]}, 1, "1114112"),
            ({"type": "score", "id": 1, "prompt": ""}, 1, "empty"),
            ({"type": "tokenize", "id": 1}, 1, "text or messages"),
            ({"id": 1}, 1, "tag"),
            ({"type": "ping", "id": "x"}, None, "integer"),
            ([1], None, ""),
        ],
    )
    def test_a_bad_request_is_an_error_and_the_connection_goes_on(
        self, extended: Raw, message: Any, id: int | None, word: str
    ) -> None:
        extended.frame(json.dumps(message))
        said = extended.heard()
        if said["type"] == "started":
            said = extended.heard()
        assert said["type"] == "error" and said["code"] == "bad_request" and said.get("id") == id
        assert word in said["message"]
        extended.say(**complete(9, "x"))
        assert extended.until_end(9)[-1]["type"] == "done"

    def test_an_id_must_rise(self, extended: Raw) -> None:
        extended.say(type="ping", id=5)
        assert extended.heard()["type"] == "pong"
        for id in (5, 4, 0):
            extended.say(**complete(id, "x"))
            said = extended.heard()
            assert said["code"] == "bad_request" and "id" not in said

    @pytest.mark.parametrize(("prompt", "most"), [("x" * 20, None), ("x" * 15, 6), ("x" * 25, None)])
    def test_what_is_longer_than_the_context_is_refused_with_the_numbers(self, prompt: str, most: int | None) -> None:
        with RunningHost(FakeDevice(context_tokens=20)) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, prompt, **({} if most is None else {"max_tokens": most})))
            said = raw.heard()
            assert said["code"] == "context_length_exceeded"
            assert said["prompt_tokens"] == len(prompt) and said["max_context_tokens"] == 20
            assert said.get("max_tokens") == most
            raw.say(**complete(2, "x" * 15, max_tokens=5))
            assert raw.until_end(2)[-1]["completion_tokens"] == 5

    def test_a_device_that_fails_is_an_error_with_a_traceback_in_the_log_and_the_host_goes_on(self) -> None:
        device = FakeDevice(fail=RuntimeError("a bug"))
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "x"))
            said = raw.until_end(1)[-1]
            assert said["code"] == "device_failed" and "RuntimeError: a bug" in said["message"]
            assert "Traceback" in "".join(host.lines)
            device.fail = None
            raw.say(**complete(2, "x"))
            assert raw.until_end(2)[-1]["type"] == "done"

    def test_a_device_that_stops_without_an_end_is_an_error(self, extended: Raw, device: FakeDevice) -> None:
        device.generate = lambda *_: iter(())  # type: ignore[method-assign]
        extended.say(**complete(1, "x"))
        assert extended.until_end(1)[-1]["code"] == "device_failed"

    def test_a_reply_that_no_frame_holds_is_an_error(self, extended: Raw, device: FakeDevice) -> None:
        huge = ScoredToken(1, "x" * 2**24, 0, None)
        device.score = lambda *_: [huge]  # type: ignore[method-assign]
        extended.say(type="score", id=1, prompt="x")
        said = extended.until_end(1)[-1]
        assert said["code"] == "bad_request" and "16777216" in said["message"]
        extended.say(type="ping", id=2)
        assert extended.heard() == {"type": "pong", "id": 2}

    def test_cancel_ends_what_runs_and_what_waits(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(2))
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "runs"))
            raw.say(**complete(2, "waits"))
            until(lambda: device.steps == 2)
            raw.say(type="cancel", id=2)
            assert raw.until_end(2) == [
                {"type": "error", "id": 2, "code": "cancelled", "message": "given up by the gateway"}
            ]
            raw.say(type="cancel", id=1)
            assert raw.until_end(1)[-1]["code"] == "cancelled"
            until(lambda: device.stopped == 1)
            for id in (1, 77):  # over, and never there
                raw.say(type="cancel", id=id)
            device.gate = None
            raw.say(**complete(3, "next"))
            assert raw.until_end(3)[-1]["type"] == "done"
            assert device.prompts == ["runs", "next"]

    def test_a_request_that_is_not_done_in_its_time_is_an_error(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device, timeout_s=0.3) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "runs"), timeout_s=1000)
            raw.say(**complete(2, "waits"), timeout_s=0.05)
            codes: dict[int, str] = {}
            while len(codes) < 2:  # on a busy machine in any order
                message = raw.heard()
                if message["type"] == "error":
                    codes[message["id"]] = message["code"]
            assert codes == {1: "timeout", 2: "timeout"}
            until(lambda: device.stopped == len(device.prompts))  # it may never have got to them

    def test_one_request_more_than_may_wait_is_refused(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device, max_queue=2) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "runs"))
            assert raw.heard()["type"] == "started"
            for id in (2, 3, 4):
                raw.say(**complete(id, "waits"))
            assert raw.heard() == {"type": "error", "id": 4, "code": "queue_full", "message": "2 requests wait already"}
            raw.say(type="cancel", id=2)
            assert raw.heard()["code"] == "cancelled"
            raw.say(**complete(5, "there is room again"))
            device.gate = None
            assert raw.until_end(5)[-1]["type"] == "done"

    def test_a_hundred_requests_of_ten_connections_get_their_own_answers(self) -> None:
        def ask(connection: int) -> list[str]:
            with Raw(host.port_a) as raw:
                raw.hello()
                texts: dict[int, str] = {}
                for n in range(10):
                    raw.say(**complete(n, f"c{connection}n{n}"))
                left = 10
                while left:
                    message = raw.heard()
                    if message["type"] == "token":
                        texts[message["id"]] = texts.get(message["id"], "") + message["step"]["text"]
                    left -= message["type"] == "done"
                return [texts[n] for n in range(10)]

        with RunningHost(FakeDevice(), max_queue=100) as host, ThreadPoolExecutor(10) as pool:
            for connection, texts in enumerate(pool.map(ask, range(10))):
                assert texts == [f"<c{connection}n{n}>" for n in range(10)]

    def test_one_thread_touches_the_device(self, host: RunningHost, device: FakeDevice) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: ask_bare(host.port_a, f"x{n}"), range(12)))
        assert device.threads == {"device"}

    @pytest.mark.parametrize("bad", [b"\0\0\0\0", b"\xff\xff\xff\xff", b'\0\0\0\x14{"type":"ping","id":9'])
    def test_a_broken_frame_closes_the_connection_and_gives_its_requests_up(self, bad: bytes) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "x"))
            until(lambda: device.prompts == ["x"])
            raw.socket.sendall(bad)
            until(lambda: device.stopped == 1)


class TestLimits:
    def test_who_reads_nothing_is_disconnected_before_it_fills_the_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(host_module, "_MOST_UNREAD_BYTES", 1 << 20)
        device = FakeDevice(context_tokens=10**6)
        with RunningHost(device) as host, Raw(host.port_a) as deaf, Raw(host.port_a) as raw:
            deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.hello()
            deaf.say(**complete(1, "x" * 10**5, logprobs=20))  # 80 MB of answer: no system's buffers take so much
            raw.hello()
            raw.say(**complete(1, "short"))
            assert raw.until_end(1)[-1]["type"] == "done"  # the device was given up for the deaf one
            assert 0 < device.steps < 10**5

    def test_more_connections_than_there_may_be_are_closed_and_the_others_stay(
        self, host: RunningHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(host_module, "MOST_CONNECTIONS", 2)
        with Raw(host.port_a) as first, Raw(host.port_a) as second:
            for raw in (first, second):
                raw.hello()
            with Raw(host.port_a) as third:
                assert third.closed()
            for raw in (first, second):
                raw.say(type="ping", id=1)
                assert raw.heard()["type"] == "pong"


class TestTurns:
    def test_a_connection_with_one_request_does_not_wait_for_all_of_another(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device) as host, Raw(host.port_a) as greedy, Raw(host.port_a) as modest:
            greedy.hello()
            modest.hello()
            for n in range(1, 11):
                greedy.say(**complete(n, f"greedy-{n}"))
            assert greedy.heard()["type"] == "started"
            greedy.say(type="ping", id=50)
            assert greedy.until_end(50)[-1]["type"] == "pong"  # so all of them wait
            modest.say(**complete(1, "modest"))
            modest.say(type="ping", id=2)
            assert modest.until_end(2)[-1]["type"] == "pong"
            device.gate = None
            assert modest.until_end(1)[-1]["type"] == "done"
            assert greedy.until_end(10)[-1]["type"] == "done"
        assert device.prompts.index("modest") <= 2
        assert [p for p in device.prompts if p != "modest"] == [f"greedy-{n}" for n in range(1, 11)]


class TestEnd:
    def test_all_who_wait_are_told_and_the_device_is_closed(self) -> None:
        device = FakeDevice(gate=threading.Semaphore(0))
        with RunningHost(device) as host, Raw(host.port_a) as raw, Raw(host.port_a) as plain:
            raw.hello()
            raw.say(**complete(1, "runs"))
            assert raw.heard()["type"] == "started"
            raw.say(**complete(2, "waits"))
            raw.say(type="ping", id=3)
            assert raw.heard()["type"] == "pong"
            plain.say(**question("waits too"))
            host.stop()
            codes = {message["id"]: message["code"] for message in (raw.heard(), raw.heard())}
            assert codes == {1: "shutting_down", 2: "shutting_down"}
            assert raw.closed() and plain.closed()
        assert device.closed

    def test_it_waits_for_a_device_that_cannot_stop_at_once(self) -> None:
        released = threading.Event()

        class Busy(FakeDevice):
            def generate(self, *arguments: Any) -> Iterator[Any]:
                self.steps = 1
                assert released.wait(LIMIT_S)
                yield from super().generate(*arguments)

        device = Busy()
        with RunningHost(device) as host, Raw(host.port_a) as raw:
            raw.hello()
            raw.say(**complete(1, "x"))
            until(lambda: device.steps == 1)
            ending = threading.Thread(target=host.stop)
            ending.start()
            assert raw.until_end(1)[-1]["code"] == "shutting_down"
            assert not device.closed and ending.is_alive()
            released.set()
            ending.join(LIMIT_S)
            assert device.closed and not ending.is_alive()
