"""What a job has said, and what it goes on to say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from edgetool.errors import BadInput
from edgetool.jobs.store import RUNNING, JobStore
from edgetool.process.log import LogFollower

_LOOK_S = 0.2


def lines(store: JobStore, number: int, follow: bool) -> Iterator[str]:
    """The lines of a job's log; with `follow` until the job has ended.

    Raises BadInput where there is no such job, or its log is gone.
    """
    job = store.get(number)
    try:
        follower = LogFollower(Path(job.log), from_start=True)
    except OSError as error:
        raise BadInput(f"the log of job {number} cannot be read: {job.log}: {error.strerror}") from error
    with contextlib.closing(follower):
        while True:
            # asked before reading, so that what it said last is read after it has ended
            running = follow and store.get(number).state == RUNNING
            yield from follower.lines(final=not running)
            if not running:
                return
            time.sleep(_LOOK_S)
