"""Frames of protocol A (docs/fpga-protocol.md): bytes in, texts out, and back. It knows no sockets.

A frame is a u32 big endian length, then that many bytes: UTF-8 text and, counted in the length, the marker `<|END|>`.
The length alone says where a frame ends; a marker inside the text is text.
"""

from __future__ import annotations

from dataclasses import dataclass

MARKER = b"<|END|>"
HEADER_BYTES = 4
LIMIT_BYTES = 16 * 2**20
"""Longest frame that is read, marker included; far above any context, far below what would fill a memory."""


class ProtocolError(Exception):
    """The other side broke the protocol. Where its next frame begins is unknown: the connection has to be closed."""


@dataclass(frozen=True)
class Frame:
    """One frame. `marked`: it ended with the marker, which is not part of `text`."""

    text: str
    marked: bool = True


class FrameReader:
    """Cuts a stream of bytes into frames, however they arrive.

    Args:
        limit_bytes: longest frame; a longer one is refused as soon as its length is known.
        bare: also take frames without the marker, as the oldest clients send them.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES, *, bare: bool = False) -> None:
        self._limit_bytes = limit_bytes
        self._bare = bare
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether the beginning of a frame is here and its end is not (once `next` has given None)."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the connection."""
        self._buffer += data

    def next(self) -> Frame | None:
        """The next whole frame; None when more bytes are needed.

        Raises ProtocolError for a length that no frame can have, a missing marker and bytes that are not UTF-8, again
        at every further call.
        """
        if len(self._buffer) < HEADER_BYTES:
            return None
        length_bytes = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        least_bytes = 1 if self._bare else len(MARKER)
        if not least_bytes <= length_bytes <= self._limit_bytes:
            raise ProtocolError(
                f"a frame of {length_bytes} bytes was announced; it must have {least_bytes} to {self._limit_bytes}"
            )
        end = HEADER_BYTES + length_bytes
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[HEADER_BYTES:end])
        marked = payload.endswith(MARKER)
        if not marked and not self._bare:
            raise ProtocolError(f"a frame of {length_bytes} bytes does not end with {MARKER.decode()}")
        try:
            text = (payload[: -len(MARKER)] if marked else payload).decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a frame of {length_bytes} bytes is not UTF-8: byte {error.start}") from error
        del self._buffer[:end]
        return Frame(text, marked)


def encode_frame(text: str, *, marked: bool = True, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """The frame of `text`; what cannot be UTF-8 (lone surrogates) becomes question marks.

    Raises ValueError when it is longer than `limit_bytes`.
    """
    payload = text.encode(errors="replace") + (MARKER if marked else b"")
    if len(payload) > limit_bytes:
        raise ValueError(f"a frame of {len(payload)} bytes; at most {limit_bytes} can be sent")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload
