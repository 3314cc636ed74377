"""Frames by hand-written bytes: every split of TCP, every length that is none, and whatever chance makes."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetool.fpga_service.frames import LIMIT_BYTES, Frame, FrameReader, ProtocolError, encode_frame

HELLO = b"\x00\x00\x00\x0chello<|END|>"
CHINESE = b"\x00\x00\x00\x0d\xe4\xbd\xa0\xe5\xa5\xbd<|END|>"
STREAM = HELLO + CHINESE + b"\x00\x00\x00\x07<|END|>" + b"\x00\x00\x00\x10<|END|>xy<|END|>"
TEXTS = ["hello", "你好", "", "<|END|>xy"]


def read_all(reader: FrameReader) -> list[str]:
    texts = []
    while (frame := reader.next()) is not None:
        texts.append(frame.text)
    return texts


def test_written_frames_are_the_bytes_of_the_document() -> None:
    assert encode_frame("hello") == HELLO
    assert encode_frame("你好") == CHINESE
    assert encode_frame("hello", marked=False) == b"\x00\x00\x00\x05hello"
    assert encode_frame("a\ud800b") == b"\x00\x00\x00\x0aa?b<|END|>"


def test_every_split_in_two_and_every_single_byte_gives_the_same_texts() -> None:
    for cut in range(len(STREAM) + 1):
        reader = FrameReader()
        texts = []
        for part in (STREAM[:cut], STREAM[cut:]):
            reader.feed(part)
            texts += read_all(reader)
        assert texts == TEXTS
        assert not reader.pending
    reader = FrameReader()
    texts = []
    for at in range(len(STREAM)):
        reader.feed(STREAM[at : at + 1])
        texts += read_all(reader)
    assert texts == TEXTS


def test_a_marker_inside_the_text_is_text() -> None:
    reader = FrameReader()
    reader.feed(encode_frame("before<|END|>after") + HELLO)
    assert read_all(reader) == ["before<|END|>after", "hello"]


@pytest.mark.parametrize("length", [0, 1, 6, LIMIT_BYTES + 1, 2**31, 2**32 - 1])
def test_a_length_that_no_frame_has_is_refused_before_anything_else_arrives(length: int) -> None:
    reader = FrameReader()
    reader.feed(HELLO + length.to_bytes(4, "big"))
    assert reader.next() == Frame("hello")
    for _ in range(2):
        with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
            reader.next()


def test_an_announced_length_takes_no_memory_before_its_bytes_come() -> None:
    tracemalloc.start()
    reader = FrameReader()
    reader.feed(LIMIT_BYTES.to_bytes(4, "big") + b"x" * 1000)
    assert reader.next() is None
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"hello, no marker", "does not end with"),
        (b"<|END|> not at the end", "does not end with"),
        (b"\xff\xfe<|END|>", "not UTF-8: byte 0"),
        (b"ab\xe4\xbd<|END|>", "not UTF-8: byte 2"),
        (b"\xed\xa0\x80<|END|>", "not UTF-8"),
        (b"\xc0\x80<|END|>", "not UTF-8"),
    ],
)
def test_a_payload_that_is_no_text_with_a_marker_is_refused(payload: bytes, why: str) -> None:
    reader = FrameReader()
    reader.feed(len(payload).to_bytes(4, "big") + payload)
    with pytest.raises(ProtocolError, match=why):
        reader.next()


def test_bare_frames_are_read_where_they_are_allowed() -> None:
    reader = FrameReader(bare=True)
    reader.feed(b"\x00\x00\x00\x02hi" + HELLO)
    assert [reader.next(), reader.next()] == [Frame("hi", marked=False), Frame("hello")]
    reader.feed(b"\0\0\0\0")
    with pytest.raises(ProtocolError):
        reader.next()


def test_what_is_longer_than_a_frame_is_not_written() -> None:
    assert len(encode_frame("x" * (LIMIT_BYTES - 7))) == LIMIT_BYTES + 4
    with pytest.raises(ValueError, match=str(LIMIT_BYTES + 1)):
        encode_frame("x" * (LIMIT_BYTES - 6))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8), st.randoms())
def test_any_texts_in_any_pieces_come_out_as_they_went_in(texts: list[str], chance: random.Random) -> None:
    stream = b"".join(len(t.encode() + b"<|END|>").to_bytes(4, "big") + t.encode() + b"<|END|>" for t in texts)
    reader = FrameReader()
    found = []
    while stream:
        size = chance.randint(1, len(stream))
        reader.feed(stream[:size])
        stream = stream[size:]
        found += read_all(reader)
    assert found == texts and not reader.pending


def test_chance_bytes_end_in_frames_or_in_a_protocol_error() -> None:
    chance = random.Random(7)
    refused = 0
    for _ in range(1000):
        reader = FrameReader(bare=chance.random() < 0.5)
        stream = bytearray(b"".join(chance.choice([HELLO, CHINESE]) for _ in range(3)))
        for _ in range(chance.randint(0, 4)):
            stream[chance.randrange(len(stream))] = chance.randrange(256)
        try:
            for at in range(0, len(stream), 5):
                reader.feed(bytes(stream[at : at + 5]))
                read_all(reader)
        except ProtocolError:
            refused += 1
    assert 200 < refused < 1000
