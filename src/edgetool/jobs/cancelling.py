"""Ending a job: the command is asked, then its whole tree is ended and proven gone, and half an output is removed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgetool.artifacts import OutputDirectory
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.jobs.store import LOST, RUNNING, STOPPED, Job, JobStore
from edgetool.process.tree import End, ProcessId, alive, carriers, descendants, end_tree, own_ancestors
from edgetool.progress import Progress

_KILLED = 137


def cancel(store: JobStore, number: int, *, grace_s: float, keep: bool, progress: Progress) -> dict[str, Any]:
    """End job `number` and everything it has started; returns what was done.

    A killed one is not asked, but what it left is found and removed. What a job below it was writing goes too. With
    `keep`, what --resume can go on with stays under its .partial name.

    Raises:
        BadInput: there is no such job, it has ended, it is another machine's, or this very process belongs to it.
        ResourceUnavailable: processes are left that even SIGKILL has not ended, or another run writes to its output.
    """
    job = store.get(number)
    _refuse(job)
    begun_unix_s = time.time()
    progress.note(f"ending job {number}: {' '.join(('edgetool', *job.command))}")
    end = _end(job, grace_s)
    if end.left:
        listing = ", ".join(str(process.pid) for process in end.left)
        raise ResourceUnavailable(f"processes of job {number} still run: {listing}", "they hang in the kernel")
    # asked now: the job may have started others while it was being ended
    below = [one for one in store.below(number) if one.ended_unix_s is None or one.ended_unix_s >= begun_unix_s]
    family = [job, *below]
    for one in family:
        store.finish(one.id, STOPPED, _KILLED, "cancelled")
    removed, kept = _unfinished(family, keep)
    return {
        "id": number,
        "state": store.get(number).state,
        "processes_ended": len(end.seen),
        "processes_killed": len(end.killed),
        "processes_left": 0,
        "removed": removed,
        "kept": kept,
    }


def _refuse(job: Job) -> None:
    if job.elsewhere:
        raise BadInput(f"job {job.id} runs on {job.host}", "cancel it there")
    if job.state not in (RUNNING, LOST):
        raise BadInput(f"job {job.id} has ended already: it is {job.state}", "edgetool jobs lists what runs")
    if job.pid in own_ancestors() and alive(job.process):
        raise BadInput(f"this command runs inside job {job.id} and cannot end it", "type it in another shell")


def _end(job: Job, grace_s: float) -> End:
    """Everything that carries the job's token, and whatever was once seen below its process.

    Forked children show the environment that the command itself was started with, which has no token of its own job.
    """
    known: set[ProcessId] = {job.process} if job.state == RUNNING else set()
    spared = own_ancestors()

    def find() -> Iterable[ProcessId]:
        known.update(carriers(job.token))
        for process in list(known):
            if alive(process):
                known.update(descendants(process.pid))
        return {process for process in known if process.pid not in spared and alive(process)}

    deadline = time.monotonic() + grace_s
    return end_tree(find, job.process if job.state == RUNNING else None, lambda: deadline)


def _unfinished(family: Iterable[Job], keep: bool) -> tuple[list[str], list[str]]:
    """Partial directories of the ended jobs: (removed, kept)."""
    removed: list[str] = []
    kept: list[str] = []
    for job in family:
        if job.output is None:
            continue
        out = OutputDirectory(Path(job.output))
        if not out.partial.is_dir():
            continue
        if keep:
            kept.append(str(out.partial))
        else:
            out.discard_unfinished()
            removed.append(str(out.partial))
    return removed, kept
