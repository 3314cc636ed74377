"""One sequence on the simulated board: its tokens, its KV cache, and what was read for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgetool.errors import BadInput, Stopped
from edgetool.fpga.simulator.errors import ContextFull
from edgetool.fpga.simulator.interfaces import Call, KvStore, Wanted
from edgetool.fpga.simulator.traffic import Traffic

if TYPE_CHECKING:
    from edgetool.fpga.simulator.engine import Simulator

Array = npt.NDArray[Any]
Cancelled = Callable[[], bool]


class Session:
    """One sequence. Close it (or use `with`) to keep its keys and values for others that begin like it.

    ids: the tokens that are in the cache; a new session may begin with a shared prefix. traffic: what it has read since
    `traffic.reset()`. overflows: operation -> values that became infinite or NaN, over the session's whole life.
    """

    def __init__(self, simulator: Simulator, cache: KvStore, ids: Sequence[int] = ()) -> None:
        self._simulator = simulator
        self._cache: KvStore | None = cache
        self.ids = list(ids)
        self.traffic = Traffic()
        self.overflows: dict[str, int] = {}

    @property
    def position(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.ids)

    @property
    def cache(self) -> KvStore:
        """Its keys and values. Raises RuntimeError when the session is closed."""
        if self._cache is None:
            raise RuntimeError("the session is closed")
        return self._cache

    def feed(self, ids: Sequence[int], logits: Wanted = "last", cancelled: Cancelled | None = None) -> Array:
        """Put tokens behind those that are there; returns logits: float16 in `et1`, float32 in `fast`.

        `last`: of the last token, [1, vocab]; `all`: [len(ids), vocab]; `none`: [0, vocab].
        Raises ContextFull (and takes nothing) where the context has no room for all of them, BadInput for ids outside
        of the vocabulary or none at all, Stopped when `cancelled` says so: whole chunks that went through are kept.
        """
        new = self._checked(ids)
        room = self._simulator.facts.max_context_tokens
        if self.position + len(new) > room:
            raise ContextFull(self.position, len(new), room)
        found = []
        done = 0
        while done < len(new):
            part = new[done : done + self._simulator.chunk_tokens(self.position)]
            done += len(part)
            wanted: Wanted = logits if logits == "all" or done == len(new) else "none"
            call = Call(torch.tensor(part, dtype=torch.int64), self.position, self.cache, self.traffic, wanted)
            if not self._simulator.run(call, cancelled):
                raise Stopped(f"stopped on request after {done - len(part)} of {len(new)} tokens")
            self.ids += part
            self.traffic.tokens += len(part)
            self.traffic.calls += 1
            for label, count in call.overflows.items():
                self.overflows[label] = self.overflows.get(label, 0) + count
            if wanted != "none":
                found.append(self._simulator.logits_of(call))
        if not found:
            return np.empty((0, self._simulator.facts.vocab), dtype=self._simulator.logits_dtype)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def truncate(self, tokens: int) -> None:
        """Forget what is behind the first `tokens`."""
        if not 0 <= tokens <= self.position:
            raise BadInput(f"cannot truncate a sequence of {self.position} tokens to {tokens}")
        del self.ids[tokens:]

    def fork(self) -> Session:
        """Another sequence with the same tokens so far, and counters of its own."""
        cache = self._simulator.new_cache()
        if self.position:
            cache.restore(self.cache.snapshot(self.position), self.position)
        return Session(self._simulator, cache, self.ids)

    def close(self) -> None:
        """Give the keys and values to the prefix cache. Closing twice is closing once."""
        if self._cache is not None:
            cache, self._cache = self._cache, None
            self._simulator.keep(self.ids, cache)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, ids: Sequence[int]) -> list[int]:
        new = [int(one) for one in ids]
        vocab = self._simulator.facts.vocab
        if not new:
            raise BadInput("no tokens to feed", "give at least one token id")
        wrong = next((one for one in new if not 0 <= one < vocab), None)
        if wrong is not None:
            raise BadInput(f"token id {wrong} is outside of the vocabulary, 0 .. {vocab - 1}")
        return new
