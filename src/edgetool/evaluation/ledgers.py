"""Where a target's answers are kept, and taking turns with other runs that ask the same model the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from edgetool.errors import ResourceUnavailable
from edgetool.evaluation.answers import Answers, InUse
from edgetool.evaluation.plan import CACHE, Side, target_id
from edgetool.progress import Progress

ANSWERS_NAME = "answers.jsonl"
_LOOK_S = 1.0


class Ledgers:
    """The answers of the sides: of checkpoints in edgetool's cache, of endpoints in the run's own `directory`.

    A file is held by one run at a time, and while its side is measured only: whoever waits for it then has the answers.
    """

    def __init__(self, cache_dir: Path, directory: Path, progress: Progress, heed_stop: Callable[[], None]) -> None:
        self._cache = cache_dir / CACHE / "answers"
        self._directory = directory
        self._progress = progress
        self._heed_stop = heed_stop
        self._open: dict[Path, Answers] = {}

    def of(self, side: Side) -> Answers:
        """The answers of a side; those of both where they are the same. Waits for another run that has them."""
        path = self._path(side)
        if path not in self._open:
            self._open[path] = self._opened(path, side)
        return self._open[path]

    def hold(self, sides: tuple[Side, ...]) -> None:
        """Open those of all `sides`, in an order in which two runs cannot wait for each other."""
        for side in sorted(sides, key=self._path):
            self.of(side)

    @contextlib.contextmanager
    def glance(self, side: Side) -> Iterator[Answers | None]:
        """The answers of a side for a moment; None while another run has them."""
        path = self._path(side)
        if path in self._open:
            yield self._open[path]
            return
        try:
            answers = Answers.open(path)
        except ResourceUnavailable:
            yield None
            return
        with answers:
            yield answers

    def close(self) -> None:
        """Let others have all of them."""
        while self._open:
            self._open.popitem()[1].close()

    def _path(self, side: Side) -> Path:
        return self._cache / f"{target_id(side.target)}.jsonl" if side.kept else self._directory / ANSWERS_NAME

    def _opened(self, path: Path, side: Side) -> Answers:
        said = False
        while True:
            try:
                return Answers.open(path, wait_s=_LOOK_S if said else 0)
            except InUse:
                if not said:
                    self._progress.note(f"another run asks {side.target.title} the same; waiting for its answers")
                    said = True
            self._heed_stop()
