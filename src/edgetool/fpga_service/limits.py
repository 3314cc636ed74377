"""What keeps the gateway from taking more than it can do: a rate for each key, and a bounded queue."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from edgetool.fpga_service.api_requests import Refusal

_LONGEST_RETRY_S = 60
_SMOOTHING = 0.2


class RateLimit:
    """At most `per_minute` requests a minute for each key, with a burst of as many after a quiet minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_minute / 60
        self._burst = float(per_minute)
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> None:
        """Count one request of the key `name`. Raises Refusal (429) when it has none left."""
        now_s = self._clock()
        left, at_s = self._left.get(name, (self._burst, now_s))
        left = min(self._burst, left + (now_s - at_s) * self._per_s)
        if left < 1:
            self._left[name] = (left, now_s)
            wait_s = max(1, math.ceil((1 - left) / self._per_s))
            raise Refusal(
                429,
                f"this key may send {self._burst:.0f} requests a minute; the next one in {wait_s} s",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        self._left[name] = (left - 1, now_s)


class Queue:
    """Counts the requests that are admitted; beyond `limit` waiting ones and the one that is served, 429.

    The device does one thing at a time, so what is admitted is either served or waits.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.admitted = 0
        self._limit = limit
        self._clock = clock
        self._each_s = 1.0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request. Raises Refusal (429) when there is none."""
        if self.admitted > self._limit:
            raise Refusal(
                429,
                f"{self._limit} requests wait already",
                code="queue_full",
                retry_after_s=self.retry_after_s,
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    def served(self, seconds: float) -> None:
        """Learn how long one request kept the device."""
        self._each_s += _SMOOTHING * (seconds - self._each_s)

    @property
    def retry_after_s(self) -> int:
        """When a place is likely to be free, in whole seconds from 1 to 60."""
        return max(1, min(_LONGEST_RETRY_S, math.ceil(self._each_s)))
