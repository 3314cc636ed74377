"""Protocol B by hand-written bytes, and the old client with u16 ids against the host."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest

from edgetool.fpga_service import protocol_b as b
from edgetool.fpga_service.device import DeviceFacts
from edgetool.fpga_service.frames import ProtocolError
from tests.fakes.fake_device import FakeDevice
from tests.fakes.old_client import OldTokenClient
from tests.fakes.running_host import Raw, RunningHost

RKVS = b"commandrkvsattrs0010\x02\x00\x00\x00\x01\x00\x34\x12\xff\xff"
RKS4 = b"commandrks4attrs00000016\x01\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x52\x02\x00"
TEXT = (Path(__file__).parents[3] / "docs" / "fpga-protocol.md").read_text()


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


class TestBytes:
    def test_commands_are_the_bytes_of_the_document(self) -> None:
        assert b.write_command("rkvs", (2, 0, 1), (0x1234, 0xFFFF)) == RKVS
        assert b.write_command("rks4", (1, 5, 0), (152_064,)) == RKS4

    def test_commands_are_read_from_any_pieces(self) -> None:
        stream = RKVS + RKS4 + b"commandhel4attrs00000000" + b"quit" + RKVS
        expected = [
            b.Command("rkvs", (2, 0, 1), (0x1234, 0xFFFF)),
            b.Command("rks4", (1, 5, 0), (152_064,)),
            b.Command("hel4", (), ()),
            b.Quit(),
            b.Command("rkvs", (2, 0, 1), (0x1234, 0xFFFF)),
        ]
        for size in (1, 2, 3, 7, len(stream)):
            reader = b.CommandReader()
            found = []
            for at in range(0, len(stream), size):
                reader.feed(stream[at : at + size])
                while (command := reader.next()) is not None:
                    found.append(command)
            assert found == expected and not reader.pending

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"hello", "begins with"),
            (b"comet", "begins with"),
            (b"quiz", "begins with"),
            (b"commandxxxx", "no operation 'xxxx'"),
            (b"command\xff\xfe\xfd\xfc", "no operation"),
            (b"commandrkvsattrz", "attrs"),
            (b"commandrkvsattrs00-1", "length"),
            (b"commandrkvsattrs 010", "length"),
            (b"commandrkvsattrs0004", "4 bytes"),
            (b"commandrkvsattrs0007", "7 bytes"),
            (b"commandrks4attrs00000014", "14 bytes"),
            (b"commandrks4attrs99999996", "99999996 bytes"),
        ],
    )
    def test_what_is_no_command_is_refused_as_soon_as_it_can_be_seen(self, data: bytes, why: str) -> None:
        for size in (1, len(data)):
            reader = b.CommandReader()
            with pytest.raises(ProtocolError, match=why):
                for at in range(0, len(data), size):
                    reader.feed(data[at : at + size])
                    assert reader.next() is None

    def test_replies_are_frames_of_1024_bytes(self) -> None:
        assert b.ids_frame([1, 0xABCD], wide=False) == b"\x02\x00\x01\x00\xcd\xab" + bytes(1018)
        assert b.ids_frame([152_063], wide=True) == b"\x01\0\0\0\xff\x51\x02\x00" + bytes(1016)
        assert b.ids_frame([], wide=False) == bytes(1024)
        assert len(b.ids_frame(range(511), wide=False)) == len(b.ids_frame(range(255), wide=True)) == 1024
        assert b.id_frame(7, wide=False) == b"\x07" + bytes(1023)
        assert b.error_frame("no") == b"\xff\xff\xff\xff\x02\0\0\0no" + bytes(1014)
        for too_much in ((range(512), False), (range(256), True), ([65_536], False), ([2**32], True)):
            with pytest.raises(ValueError, match="fit"):
                b.ids_frame(too_much[0], wide=too_much[1])

    def test_a_long_error_is_cut_between_characters(self) -> None:
        frame = b.error_frame("é" * 600)
        (length,) = struct.unpack("<I", frame[4:8])
        assert len(frame) == 1024 and frame[8 : 8 + length].decode() == "é" * 508

    def test_the_hello_says_what_the_client_must_know(self) -> None:
        facts = DeviceFacts("m", "qwen2", 152_064, 2048, (151_645, 151_643), "et1", "ab", "sim")
        head = b"edgetool-b\0\0\0\0\0\0" + struct.pack("<6I", 1, 152_064, 2048, 2, 151_645, 151_643)
        assert b.hello_frame(facts) == head.ljust(1024, b"\0")

    def test_numbers_that_do_not_fit_are_not_written(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            b.write_command("rkvs", (1, 0, 0), (65_536,))
        with pytest.raises(ValueError, match="digits"):
            b.write_command("rkvs", (5000, 0, 0), range(5000))

    def test_chance_bytes_end_in_commands_or_in_a_protocol_error(self) -> None:
        chance = random.Random(3)
        refused = 0
        for _ in range(1000):
            stream = bytearray(RKVS + RKS4 + b"quit")
            for _ in range(chance.randint(0, 3)):
                stream[chance.randrange(len(stream))] = chance.randrange(256)
            reader = b.CommandReader()
            try:
                reader.feed(bytes(stream))
                while reader.next() is not None:
                    pass
            except ProtocolError:
                refused += 1
        assert 300 < refused < 1000

    def test_the_document_names_every_operation(self) -> None:
        for operation in get_args(b.Operation):
            assert f"| `{operation}` |" in TEXT


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(vocab=65_536)


@pytest.fixture
def host(device: FakeDevice) -> Iterator[RunningHost]:
    with RunningHost(device) as running:
        yield running


@pytest.fixture
def old(host: RunningHost) -> Iterator[OldTokenClient]:
    client = OldTokenClient(host.port_b)
    yield client
    client.connection.close()


@pytest.fixture
def raw(host: RunningHost) -> Iterator[Raw]:
    with Raw(host.port_b) as connection:
        yield connection


def wide_reply(raw: Raw) -> list[list[int]]:
    """The ids of each frame; an error's text as characters, behind -1."""
    frames = []
    while (numbers := struct.unpack("<256I", raw.exactly(1024)))[0]:
        if numbers[0] == 0xFFFFFFFF:
            text = struct.pack("<254I", *numbers[2:])[: numbers[1]].decode()
            return [*frames, [-1, *ids(text)]]
        frames.append(list(numbers[1 : 1 + numbers[0]]))
    return frames


class TestOldClient:
    def test_the_next_id_and_all_ids_and_a_stream_of_them(self, old: OldTokenClient, device: FakeDevice) -> None:
        assert old.rmod(ids("say hi"), 6, 0) == ord("<")
        assert old.rkvc(ids("say hi")) == [*ids("<hi>"), 0]
        assert old.rkvs(ids("say hi")) == [[*ids("<hi>"), 0]]
        assert old.rkvs(ids("say 你好")) == [[*ids("<你好>"), 0]]
        assert all(options.temperature == 0 for options in device.options)
        assert old.quit()

    def test_a_stream_has_32_ids_a_frame(self, old: OldTokenClient) -> None:
        frames = old.rkvs(ids("x" * 70))
        assert [len(frame) for frame in frames] == [32, 32, 9]
        assert list(chain(*frames)) == [*ids("<" + "x" * 70 + ">"), 0]
        assert [len(frame) for frame in old.rkvs(ids("y" * 61))] == [32, 32]

    def test_one_frame_of_ids_is_all_that_rkvc_gives(self, old: OldTokenClient) -> None:
        assert old.rkvc(ids("x" * 600)) == ids("<" + "x" * 510)
        assert old.rmod(ids("x"), 1, 0) == ord("<")  # nothing of it is left over

    def test_memory_goes_on_from_prompt_and_answer(self, old: OldTokenClient, device: FakeDevice) -> None:
        old.rkvc(ids("one"))
        assert old.rkvs(ids(" two"), memory=1) == [[*ids("<two>"), 0]]
        assert old.rkvc(ids("three"), memory=0) == [*ids("<three>"), 0]
        assert device.prompts == ["one", "one<one> two", "three"]

    def test_rmod_goes_on_with_what_is_new(self, old: OldTokenClient, device: FakeDevice) -> None:
        old.rmod(ids("ab"), 2, 0)
        old.rmod(ids("c"), 3, 1)
        old.rmod(ids("de"), 5, 1)
        old.rmod(ids("fgh"), 2, 0)  # two of them count
        assert device.prompts == ["ab", "abc", "abcde", "fg"]

    def test_commands_sent_together_are_answered_in_their_order(self, old: OldTokenClient) -> None:
        for word in ("a", "bb", "ccc"):
            old._send("rkvs", [len(word), 0, 0, *ids(word)])
        frames = [old._numbers() for _ in range(6)]
        assert [list(frame[1 : 1 + frame[0]]) for frame in frames] == [
            [*ids("<a>"), 0],
            [],
            [*ids("<bb>"), 0],
            [],
            [*ids("<ccc>"), 0],
            [],
        ]

    @pytest.mark.parametrize(
        "bad",
        [
            b"hello",
            b"commandxxxxattrs0000",
            b"commandrkvsattrs0006\x05\x00\x00\x00\x00\x00",
            b"commandrkvsattrs0006\x00\x00\x00\x00\x00\x00",
            b"commandrmodattrs0006\x03\x00\x01\x00\x05\x00",
            b"commandrkvcattrs0008\x01\x00\x00\x00\x00\x00\xff\xff" * 70,
        ],
    )
    def test_what_cannot_be_done_closes_the_connection(self, host: RunningHost, device: FakeDevice, bad: bytes) -> None:
        device.gate = threading.Semaphore(0)
        with Raw(host.port_b) as raw:
            raw.socket.sendall(bad)
            assert raw.closed()
        device.gate = None
        other = OldTokenClient(host.port_b)
        assert other.rmod(ids("x"), 1, 0) == ord("<")
        assert other.quit()

    def test_a_prompt_without_room_closes_the_connection(self) -> None:
        with RunningHost(FakeDevice(vocab=65_536, context_tokens=3)) as host, Raw(host.port_b) as raw:
            raw.socket.sendall(b.write_command("rkvs", (3, 0, 0), ids("abc")))
            assert raw.closed()

    def test_a_vocabulary_that_16_bits_do_not_hold_is_refused(self) -> None:
        with RunningHost(FakeDevice(vocab=65_537)) as host:
            for operation in ("rmod", "rkvc", "rkvs"):
                with Raw(host.port_b) as raw:
                    raw.socket.sendall(f"command{operation}attrs0008".encode() + struct.pack("<4H", 1, 0, 0, 65))
                    assert raw.closed()
            with Raw(host.port_b) as raw:
                raw.socket.sendall(b.write_command("rks4", (1, 0, 0), ids("x")))
                assert wide_reply(raw) == [[*ids("<x>"), 0]]


class TestWide:
    def test_the_hello_of_a_running_host(self, raw: Raw) -> None:
        raw.socket.sendall(b"commandhel4attrs00000000")
        reply = raw.exactly(1024)
        assert reply[:16] == b"edgetool-b".ljust(16, b"\0")
        assert struct.unpack("<5I", reply[16:36]) == (1, 65_536, 10_000, 1, 0)

    def test_ids_and_streams_and_their_limits(self, raw: Raw) -> None:
        raw.socket.sendall(b.write_command("rkv4", (300, 0, 0), ids("x" * 300)))
        frames = wide_reply(raw)
        assert [len(frame) for frame in frames] == [255, 48] and list(chain(*frames)) == [
            *ids("<" + "x" * 300 + ">"),
            0,
        ]
        raw.socket.sendall(b.write_command("rks4", (40, 35, 0), ids("x" * 40)))
        assert [len(frame) for frame in wide_reply(raw)] == [32, 3]
        raw.socket.sendall(b.write_command("rmd4", (3, 0), ids("abc")))
        assert struct.unpack("<I", raw.exactly(1024)[:4]) == (ord("<"),)

    def test_errors_are_texts_and_the_connection_goes_on(self, raw: Raw, device: FakeDevice) -> None:
        raw.socket.sendall(b.write_command("rks4", (5, 0, 0), ids("abc")))
        assert "5 ids were announced" in "".join(map(chr, wide_reply(raw)[-1][1:]))
        raw.socket.sendall(b.write_command("rks4", (1, 0, 0), [65_536]))
        assert "65536" in "".join(map(chr, wide_reply(raw)[-1][1:]))
        device.fail = RuntimeError("a bug")
        raw.socket.sendall(b.write_command("rks4", (1, 0, 0), ids("x")))
        assert "a bug" in "".join(map(chr, wide_reply(raw)[-1][1:]))
        device.fail = None
        raw.socket.sendall(b.write_command("rks4", (1, 0, 0), ids("x")))
        assert wide_reply(raw) == [[*ids("<x>"), 0]]
