"""`edgetool fpga-host`: what it refuses before it starts, and as users run it, on a tiny image."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetool.fpga_service.answers import Ended, Started
from edgetool.fpga_service.device import GenerateOptions, Step
from edgetool.fpga_service.host_client import HostClient
from edgetool.fpga_service.host_errors import HostAway
from tests.fakes.old_client import OldGateway, OldTokenClient, ask_bare
from tests.fakes.running_host import Raw
from tests.fakes.served import Served, is_free
from tests.fakes.tiny_image import make_tiny_image

LIMIT_S = 120.0
QUESTION = [{"role": "user", "content": "the quick brown fox"}]
GREEDY = GenerateOptions(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_image(tmp_path_factory.mktemp("image"), max_context=256)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            ([], 2, "fpga-host needs --image"),
            (["--image", "{image}", "--protocol", "C"], 3, "must be A, B or both"),
            (["--image", "{image}", "--protocol", "both", "--port", "9123", "--port-b", "9123"], 3, "9123"),
            (["--image", "{image}/nowhere"], 4, "no such directory"),
            (["--image", "{image}/hbm"], 4, "not a compiled image"),
            (["--image", "{image}", "--port", "0", "--listen", "no.such.host.invalid"], 3, "is no address"),
            (["--image", "{image}", "--port", "0", "--listen", "192.0.2.1"], 3, "not an address of this machine"),
        ],
    )
    def test_what_cannot_work_is_said_in_a_sentence(
        self, image: Path, edgetool: Callable[..., Any], tmp_path: Path, arguments: list[str], code: int, words: str
    ) -> None:
        line = [part.format(image=image) for part in arguments]
        result = edgetool("fpga-host", *line, "--json", env={"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")})
        assert result.exit_code == code, result.output
        document = json.loads(result.stdout)
        assert not document["ok"] and words in document["message"]

    def test_a_port_in_use_is_refused_and_the_board_is_free_again(
        self, image: Path, edgetool: Callable[..., Any], tmp_path: Path
    ) -> None:
        environment = {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            line = ("--image", str(image), "--port", port, "--board", "b")
            result = edgetool("fpga-host", *line, "--json", env=environment)
            assert result.exit_code == 6 and port in json.loads(result.stdout)["message"]
        shown = edgetool("gpus", "--json", env=environment)
        assert json.loads(shown.stdout)["boards"] == [] and json.loads(shown.stdout)["ports"] == []


def host_at(directory: Path, image: Path, *arguments: str) -> Served:
    line = ("--image", str(image), "--port", "0", "--port-b", "0", "--threads", "1", *arguments)
    return Served(directory, *line, command="fpga-host", key=None)


@pytest.fixture(scope="module")
def running(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with host_at(tmp_path_factory.mktemp("host"), image, "--protocol", "both", "--board", "left") as served:
        served.ready()
        yield served


@pytest.fixture(scope="module")
def expected(image: Path) -> list[Step]:
    """The greedy answer to QUESTION, from the device itself."""
    from edgetool.fpga_service.simulator_device import open_device

    device = open_device(image)
    return list(device.generate(device.encode_chat(QUESTION), GREEDY, lambda: False))


def events_of(port: int, options: GenerateOptions) -> list[Any]:
    async def test() -> list[Any]:
        async with HostClient("127.0.0.1", port) as client:
            await client.wait_ready(LIMIT_S)
            async with client.chat(QUESTION, options, LIMIT_S) as answer:
                return [event async for event in answer]

    return asyncio.run(test())


@pytest.mark.slow
class TestRunning:
    def test_the_document_says_what_a_script_needs(self, running: Served, image: Path) -> None:
        document = running.ready()
        assert document["schema"] == "edgetool.fpga-host/1" and set(document["ports"]) == {"A", "B"}
        assert document["pid"] == running.process.pid and document["image"] == str(image)
        assert (document["board"], document["numerics"], document["max_context_tokens"]) == ("left", "et1", 256)

    def test_board_and_ports_are_leased(self, running: Served) -> None:
        shown = json.loads(running.edgetool("gpus", "--json").stdout)
        assert [board["board"] for board in shown["boards"]] == ["left"]
        assert {port["port"] for port in shown["ports"]} == set(running.ready()["ports"].values())

    def test_the_same_board_is_not_had_twice(self, running: Served, image: Path) -> None:
        second = running.edgetool("fpga-host", "--image", str(image), "--port", "0", "--board", "left", "--json")
        assert second.returncode == 6
        assert "board left is leased by" in json.loads(second.stdout)["message"]

    def test_the_extension_brings_the_devices_own_tokens(self, running: Served, expected: list[Step]) -> None:
        events = events_of(running.ready()["ports"]["A"], GREEDY)
        assert isinstance(events[0], Started) and events[1:-1] == expected
        assert events[-1] == Ended(expected[-1].finish or "stop", events[0].prompt_tokens, len(expected))

    def test_old_gateway_and_oldest_client_get_the_same_text(self, running: Served, expected: list[Step]) -> None:
        port = running.ready()["ports"]["A"]
        gateway = OldGateway(port)
        try:
            text = gateway.ask({"messages": QUESTION, "temperature": 0, "max_tokens": 12})
        finally:
            gateway.close()
        assert text == "".join(step.text for step in expected)
        assert ask_bare(port, "the quick brown fox")

    def test_old_token_client_gets_the_same_ids(self, running: Served) -> None:
        prompt = [5, 6, 7, 8]
        client = OldTokenClient(running.ready()["ports"]["B"])
        frames = client.rkvs(prompt)
        ids = [id for frame in frames for id in frame]
        assert len(ids) == 252 or ids[-1] in running.ready()["eos_token_ids"]  # the context, or an end
        sequence = list(prompt)
        for id in ids[:5]:
            assert client.rmod(sequence, len(sequence), 0) == id
            sequence.append(id)
        assert client.rmod([sequence[-1]], len(sequence), 1) == ids[5]
        assert client.quit()

    def test_a_client_that_leaves_stops_the_device(self, running: Served, expected: list[Step]) -> None:
        port = running.ready()["ports"]["A"]
        for _ in range(5):
            with Raw(port) as raw:
                raw.say(messages=QUESTION, max_tokens=200)
        assert events_of(port, GREEDY)[1:-1] == expected

    def test_garbage_leaves_it_answering(self, running: Served, expected: list[Step]) -> None:
        ports = running.ready()["ports"]
        for data in (b"\0\0\0\0", b"\xff" * 4, struct.pack(">I", 9) + b"\xff\xfe<|END|>", b"GET / HTTP/1.0\r\n\r\n"):
            for port in ports.values():
                with Raw(port) as raw:
                    raw.socket.sendall(data)
                    assert raw.closed()
        assert events_of(ports["A"], GREEDY)[1:-1] == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_clients_are_told_and_nothing_is_left(image: Path, tmp_path: Path, number: int) -> None:
    async def test(served: Served, port: int) -> None:
        async with HostClient("127.0.0.1", port) as client:
            await client.wait_ready(LIMIT_S)
            sent = False
            with pytest.raises(HostAway):
                async with client.chat(QUESTION, GenerateOptions(ignore_eos=True), LIMIT_S) as answer:
                    async for event in answer:
                        if isinstance(event, Step) and not sent:
                            sent = True  # a second one ends it the hard way, wherever it is
                            served.process.send_signal(number)

    with host_at(tmp_path, image) as served:
        port = served.ready()["ports"]["A"]
        asyncio.run(test(served, port))
        assert served.wait() == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        assert served.left() == [] and is_free(port)
        shown = json.loads(served.edgetool("gpus", "--json").stdout)
        assert shown["boards"] == [] and shown["ports"] == []
        assert "Traceback" not in served.errors.read_text()
