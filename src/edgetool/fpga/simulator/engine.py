"""The simulated board: one image, run from its bytes alone, for any number of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from edgetool.fpga.image import Image
from edgetool.fpga.simulator.interfaces import NumericsName, SimulatorFacts, Trace, Wanted
from edgetool.fpga.simulator.traffic import Traffic

Array = npt.NDArray[Any]

Cancelled = Callable[[], bool]


class Session:
    """One sequence: its KV cache, and how far it is. Close it (or use `with`) to keep its prefix for others."""

    position: int
    """Tokens whose keys and values are in the cache; a new session may start beyond 0 with a shared prefix."""
    traffic: Traffic
    """What this session has read since `traffic.reset()`."""
    overflows: dict[str, int]
    """Operation -> values that became infinite or NaN, over the session's whole life."""

    def feed(self, ids: Sequence[int], logits: Wanted = "last", cancelled: Cancelled | None = None) -> Array:
        """Put tokens behind those that are there; returns logits [1, len(ids) or 0, vocab]: float16 of `et1`.

        `last`: of the last token, [1, vocab]; `all`: [len(ids), vocab]; `none`: [0, vocab].
        Raises ContextFull (and takes nothing) where the context has no room for all of them, BadInput for ids outside
        of the vocabulary or none at all, Stopped when `cancelled` says so: whole chunks that went through are kept.
        """
        raise NotImplementedError

    def truncate(self, tokens: int) -> None:
        """Forget what is behind the first `tokens`."""
        raise NotImplementedError

    def fork(self) -> Session:
        """Another sequence with the same tokens so far."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the tokens' keys and values to the prefix cache. Twice is once."""
        raise NotImplementedError

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Simulator:
    """An image on a simulated board. Sessions may be used from several threads, each from one at a time."""

    facts: SimulatorFacts

    def __init__(
        self,
        image: Image,
        numerics: NumericsName = "et1",
        threads: int | None = None,
        device: str = "cpu",
        trace: Trace | None = None,
        prefix_cache_bytes: int = 1 << 30,
    ) -> None:
        """Read all of the image. threads: of torch, for the whole process (None: leave it as it is)."""
        raise NotImplementedError

    def session(self, prompt: Sequence[int] = ()) -> Session:
        """A new sequence. Where a kept one begins like `prompt`, it starts behind the longest shared prefix, at most
        len(prompt) - 1 tokens: feed `prompt[session.position:]`."""
        raise NotImplementedError
