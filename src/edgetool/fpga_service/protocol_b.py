"""Protocol B (docs/fpga-protocol.md): commands with token ids in, frames of 1024 bytes with token ids out. No sockets.

Written for the u16 clients of the first boards, and for u32 ids by operations of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgetool.fpga_service.device import DeviceFacts
from edgetool.fpga_service.frames import ProtocolError

FRAME_BYTES = 1024
IDS_A_FRAME = 32
"""In replies that are streamed."""
ERROR = 0xFFFFFFFF
MAGIC = b"edgetool-b".ljust(16, b"\0")
VERSION = 1
LARGEST_U16_VOCABULARY = 1 << 16

_COMMAND, _ATTRS, _QUIT = b"command", b"attrs", b"quit"
_LIMIT_BYTES = 4 * 2**20

Operation = Literal["rmod", "rkvc", "rkvs", "hel4", "rmd4", "rkv4", "rks4"]
_PARAMETERS: dict[str, int] = {"rmod": 2, "rkvc": 3, "rkvs": 3, "hel4": 0, "rmd4": 2, "rkv4": 3, "rks4": 3}
"""How many numbers stand before the ids."""


@dataclass(frozen=True)
class Command:
    """One command. parameters: as the operation has them; ids: u16 or u32."""

    operation: Operation
    parameters: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def wide(self) -> bool:
        """Whether its numbers are u32."""
        return self.operation.endswith("4")


@dataclass(frozen=True)
class Quit:
    """The client has no more to ask."""


class CommandReader:
    """Cuts a stream of bytes into commands, however they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether the beginning of a command is here and its end is not (once `next` has given None)."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the connection."""
        self._buffer += data

    def next(self) -> Command | Quit | None:
        """The next whole command; None when more bytes are needed. Raises ProtocolError for what is none."""
        buffer = self._buffer
        if not _agrees(buffer, _COMMAND):
            if not _agrees(buffer, _QUIT):
                raise ProtocolError(f"a command begins with {bytes(buffer[:8])!r}")
            if len(buffer) < len(_QUIT):
                return None
            del buffer[: len(_QUIT)]
            return Quit()
        at = len(_COMMAND) + 4
        if len(buffer) < at:
            return None
        operation = buffer[len(_COMMAND) : at].decode("ascii", "replace")
        if operation not in _PARAMETERS:
            raise ProtocolError(f"there is no operation {operation!r}")
        wide = operation.endswith("4")
        if not _agrees(buffer[at:], _ATTRS):
            raise ProtocolError(f"{operation}: 'attrs' is missing")
        digits = 8 if wide else 4
        begin = at + len(_ATTRS) + digits
        if len(buffer) < begin:
            return None
        length_text = bytes(buffer[begin - digits : begin])
        if not length_text.isdigit():
            raise ProtocolError(f"{operation}: the length is {length_text!r}")
        length_bytes = int(length_text)
        size = 4 if wide else 2
        parameters = _PARAMETERS[operation]
        if length_bytes % size or not parameters * size <= length_bytes <= _LIMIT_BYTES:
            raise ProtocolError(f"{operation}: a payload of {length_bytes} bytes")
        if len(buffer) < begin + length_bytes:
            return None
        numbers = _numbers(bytes(buffer[begin : begin + length_bytes]), size)
        del buffer[: begin + length_bytes]
        return Command(operation, numbers[:parameters], numbers[parameters:])  # type: ignore[arg-type]


def _agrees(buffer: bytes | bytearray, word: bytes) -> bool:
    """Whether the buffer begins with the word, as far as both go."""
    length = min(len(buffer), len(word))
    return bytes(buffer[:length]) == word[:length]


def _numbers(data: bytes, size: int) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // size}{'H' if size == 2 else 'I'}", data)


def write_command(operation: Operation, parameters: Sequence[int], ids: Sequence[int]) -> bytes:
    """The bytes of a command. Raises ValueError for a number or a payload that does not fit."""
    wide = operation.endswith("4")
    numbers = [*parameters, *ids]
    try:
        payload = struct.pack(f"<{len(numbers)}{'I' if wide else 'H'}", *numbers)
    except struct.error as error:
        raise ValueError(f"{operation}: a number does not fit: {error}") from error
    digits = 8 if wide else 4
    if len(payload) >= 10**digits:
        raise ValueError(f"{operation}: a payload of {len(payload)} bytes does not fit into {digits} digits")
    return _COMMAND + operation.encode() + _ATTRS + f"{len(payload):0{digits}d}".encode() + payload


def ids_frame(ids: Sequence[int], *, wide: bool) -> bytes:
    """A frame with the count of `ids` and them. Raises ValueError for too many (511 fit; wide 255) or too large ids."""
    code = "I" if wide else "H"
    try:
        data = struct.pack(f"<{len(ids) + 1}{code}", len(ids), *ids)
    except struct.error as error:
        raise ValueError(f"an id does not fit: {error}") from error
    if len(data) > FRAME_BYTES:
        raise ValueError(f"{len(ids)} ids do not fit into a frame")
    return data.ljust(FRAME_BYTES, b"\0")


def id_frame(id: int, *, wide: bool) -> bytes:
    """A frame with the one id that `rmod` and `rmd4` answer with, and no count."""
    return struct.pack("<I" if wide else "<H", id).ljust(FRAME_BYTES, b"\0")


def most_ids(*, wide: bool) -> int:
    """Most ids that fit into a frame."""
    return FRAME_BYTES // (4 if wide else 2) - 1


def split(ids: Sequence[int], *, wide: bool) -> Iterator[bytes]:
    """Frames of as many ids as fit, without the last frame 0."""
    step = most_ids(wide=wide)
    for begin in range(0, len(ids), step):
        yield ids_frame(ids[begin : begin + step], wide=wide)


def error_frame(message: str) -> bytes:
    """A frame that ends a command with u32 ids without its answer."""
    text = message.encode(errors="replace")[: FRAME_BYTES - 8]
    # a character that was cut in the middle is left out
    text = text.decode(errors="ignore").encode()
    return (struct.pack("<II", ERROR, len(text)) + text).ljust(FRAME_BYTES, b"\0")


def hello_frame(facts: DeviceFacts) -> bytes:
    """The answer to `hel4`."""
    numbers = (VERSION, facts.vocab, facts.max_context_tokens, len(facts.eos_token_ids), *facts.eos_token_ids)
    return (MAGIC + struct.pack(f"<{len(numbers)}I", *numbers)).ljust(FRAME_BYTES, b"\0")
