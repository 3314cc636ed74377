"""What edgetool tells the processes that it starts, as JSON on their stdin: keys in it are no arguments."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class FrontJob:
    """What the front is told.

    listen_fd: number of an inherited, bound TCP socket. engine_socket: where the engine listens. chat: whether the
    model has a chat template, so that a prompt is a question. batch: what `GET /` says /predict should be sent.
    """

    key: str
    listen_fd: int
    engine_socket: str
    served_model_name: str
    chat: bool
    batch: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class EngineJob:
    """What the engine is told. It listens on the Unix socket `socket` or, without one, on `listen_fd`."""

    model: str
    key: str
    served_model_name: str
    max_model_len: int
    dtype: str
    device: str
    socket: str | None = None
    listen_fd: int | None = None
    threads: int | None = None
    drain_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))
