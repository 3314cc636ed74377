"""What the gateway tells the host that it starts, as JSON on its stdin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class HostJob:
    """What a host process is told.

    listen: pairs of a protocol (A or B) and the number of an inherited, bound socket. board: name of what is leased.
    """

    image: str
    board: str
    numerics: str
    device: str
    listen: tuple[tuple[str, int], ...]
    max_queue: int
    timeout_s: float
    threads: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HostJob:
        """The reverse."""
        values = json.loads(text)
        return cls(**{**values, "listen": tuple((protocol, fd) for protocol, fd in values["listen"])})
