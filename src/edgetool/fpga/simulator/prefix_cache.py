"""Keys and values of finished sequences by their tokens, so that a prompt that begins like one starts behind it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.fpga.simulator.interfaces import Snapshot

Array = npt.NDArray[Any]

_LARGEST_COUNT = 256  # looking for a prefix compares with every kept sequence


@dataclass(frozen=True)
class _Kept:
    ids: Array
    snapshot: Snapshot


class PrefixCache:
    """At most `limit_bytes` of snapshots; the one that was not used for longest goes first. For many threads."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.hits = 0
        self.hit_tokens = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, ids: Sequence[int]) -> tuple[int, Snapshot | None]:
        """How many first tokens of `ids` a kept sequence shares, at most, and its snapshot (None for 0)."""
        wanted = np.asarray(ids, dtype=np.int64)
        with self._lock:
            best, found = 0, None
            for key, kept in self._kept.items():
                shared = _shared(kept.ids, wanted)
                if shared > best:
                    best, found = shared, key
            if found is None:
                return 0, None
            self._kept.move_to_end(found)
            self.hits += 1
            self.hit_tokens += best
            return best, self._kept[found].snapshot

    def keep(self, ids: Sequence[int], snapshot: Callable[[], Snapshot]) -> None:
        """Keep a sequence, unless one that begins with it is there; those that it begins with itself are let go.

        snapshot: makes the copy; not called where a longer sequence has it already.
        """
        mine = np.asarray(ids, dtype=np.int64)
        if not mine.size:
            return
        with self._lock:
            for key, kept in self._kept.items():
                if _shared(kept.ids, mine) == mine.size:
                    self._kept.move_to_end(key)
                    return
            new = snapshot()
            if new.nbytes > self.limit_bytes:
                return
            for key, kept in list(self._kept.items()):
                if _shared(kept.ids, mine) == kept.ids.size:
                    self._drop(key)
            while self._kept and (self.nbytes + new.nbytes > self.limit_bytes or len(self._kept) >= _LARGEST_COUNT):
                self._drop(next(iter(self._kept)))
            self._kept[self._next] = _Kept(mine, new)
            self._next += 1
            self.nbytes += new.nbytes

    def _drop(self, key: int) -> None:
        self.nbytes -= self._kept.pop(key).snapshot.nbytes


def _shared(a: Array, b: Array) -> int:
    """How many first elements are equal."""
    length = min(a.size, b.size)
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if differ.size else length
