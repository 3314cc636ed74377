"""A language model that is asked only what it has not answered before."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from edgetool.errors import Stopped
from edgetool.evaluation.answers import Answers, key_of
from edgetool.progress import Progress, Task

FLUSH_S = 10.0
"""Longest time between two writes to the disk; a killed process loses nothing, a crashed machine this much."""


class Remembering:
    """Stands before an `LM` of lm-evaluation-harness (`inner`) and answers from `answers` what they know.

    What they do not know goes to `inner` in one call, so that it forms batches as it does for upstream's own command
    line: a run without known answers computes the very same numbers. Each answer is kept when `inner` reports it to its
    cache hook, batch by batch, and not when the call ends. Upstream sorts before it cuts batches, so what a stopped run
    has left falls into the batches that it would have had; what was answered under another --limit does not.

    Requests are known by what is asked (text, continuation, generation settings), not by task or position. What else
    decides an answer (weights, dtype, batch size, longest context) has to be in the name of the file of `answers`.
    """

    def __init__(
        self, inner: Any, answers: Answers, progress: Progress, name: str, stop: threading.Event | None = None
    ) -> None:
        """`name`: of the progress bar. `stop`: once set, the batch at hand is finished, then Stopped is raised."""
        self._inner = inner
        self._answers = answers
        self._progress = progress
        self._name = name
        self._stop = stop
        self.seconds = 0.0
        """Time that `inner` was at work."""
        self.generated: list[str] = []
        """Texts that `inner` has generated, not those that were known."""
        self.not_numbers = 0
        """Log-likelihoods that are NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say the same) of each continuation."""
        found = [(float(value[0]), bool(value[1])) for value in self._answered("loglikelihood", requests)]
        self.not_numbers += sum(math.isnan(value) for value, _ in found)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text, in nats."""
        found = [float(value) for value in self._answered("loglikelihood_rolling", requests)]
        self.not_numbers += sum(math.isnan(value) for value in found)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model says to each context, up to a stop sequence."""
        return [str(value) for value in self._answered("generate_until", requests)]

    def _answered(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys = [key_of(kind, list(request.args)) for request in requests]
        values = [self._answers.get(key) for key in keys]
        new = [index for index, value in enumerate(values) if value is None]
        with self._progress.task(self._name, len(requests), "request", before=len(requests) - len(new)) as bar:
            if not new:
                return values
            reported = _Reports(self._answers, bar)
            try:
                self._heed_stop()
                with _hooked(self._inner, reported), _before_batches(self._inner, self._heed_stop):
                    began = time.monotonic()
                    try:
                        said = getattr(self._inner, kind)([requests[index] for index in new])
                    finally:
                        self.seconds += time.monotonic() - began
                for index, value in zip(new, said, strict=True):
                    values[index] = value
                    if not reported.count:  # a model without a hook; others do not report what they could not answer
                        self._answers.put(keys[index], value)
                bar.advance(max(len(new) - reported.count, 0))
            finally:
                self._answers.flush()
        if kind == "generate_until":
            self.generated.extend(str(values[index]) for index in new)
        return values

    def _heed_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Stopped(f"stopped on request in {self._name}: all answers so far are kept")


class _Reports:
    """The cache hook of upstream's models: called with each answer as soon as its batch is computed."""

    dbdict = None

    def __init__(self, answers: Answers, bar: Task) -> None:
        self._answers = answers
        self._bar = bar
        self._flushed = time.monotonic()
        self.count = 0

    def add_partial(self, kind: str, arguments: Any, value: Any) -> None:
        self._answers.put(key_of(kind, list(arguments)), value)
        self.count += 1
        self._bar.advance()
        if time.monotonic() - self._flushed > FLUSH_S:
            self._answers.flush()
            self._flushed = time.monotonic()


@contextmanager
def _hooked(inner: Any, hook: _Reports) -> Iterator[None]:
    if not hasattr(inner, "set_cache_hook"):
        yield
        return
    before = inner.cache_hook
    inner.set_cache_hook(hook)
    try:
        yield
    finally:
        inner.set_cache_hook(before)


@contextmanager
def _before_batches(inner: Any, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each batch that an in-process model computes; models of servers look for themselves."""
    wrapped = [name for name in ("_model_call", "_model_generate") if callable(getattr(inner, name, None))]

    def checked(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            check()
            return call(*args, **options)

        return run

    for name in wrapped:
        setattr(inner, name, checked(getattr(inner, name)))
    try:
        yield
    finally:
        for name in wrapped:
            delattr(inner, name)  # the class's own is there again
