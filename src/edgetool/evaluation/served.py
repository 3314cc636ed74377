"""`--via serve-gpu`: a checkpoint served for the time of the measurement, under a lease, and stopped in any case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.config import Config
from edgetool.progress import Progress
from edgetool.serving import service
from edgetool.serving.memory import sizes
from edgetool.serving.ready import Endpoint

LONGEST_TOKENS = 4096
"""Context of the server where nothing is asked: the longest questions have half of it, and a cache takes memory."""


def length_tokens(checkpoint: Checkpoint, wanted: int | None) -> int:
    """The context that the server is started with, and that questions are cut to."""
    own = sizes(checkpoint, None).context_tokens or LONGEST_TOKENS
    return wanted or min(own, LONGEST_TOKENS)


def settings_for(config: Config, spec: str, max_length: int) -> Config:
    """The configuration of a serve-gpu that serves one model: that of [serve_gpu], and the run's own."""
    asked = config.eval
    own: dict[str, Any] = {
        "model": spec,
        "with_model": None,
        "detach": False,
        "port": 0,
        "host": "127.0.0.1",
        "max_model_len": max_length,
        "revision": asked.revision if spec == asked.model else None,
    }
    if asked.dtype != "auto":
        own["dtype"] = asked.dtype
    if asked.device in ("cpu", "cuda"):
        own["device"] = asked.device
    if asked.threads is not None:
        own["threads"] = asked.threads
    return config.model_copy(update={"serve_gpu": config.serve_gpu.model_copy(update=own)})


def starter(config: Config, progress: Progress) -> Callable[[contextlib.ExitStack], Endpoint]:
    """What starts the server of `config.serve_gpu` and has it stopped when the stack is closed."""

    def start(held: contextlib.ExitStack) -> Endpoint:
        progress.note(f"serving {config.serve_gpu.model}")
        ready = held.enter_context(service.started(config, progress))
        server = ready.servers[0]
        progress.note(f"{server.url} serves it (log: {ready.documents[0]['log']})")
        return server.endpoint

    return start
