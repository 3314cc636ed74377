"""Jobs as a table and as JSON."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edgetool.console import Block, Table, Text
from edgetool.jobs.store import Job
from edgetool.progress_lines import duration

_COMMAND_SHOWN = 60


def document(job: Job) -> dict[str, Any]:
    """A job for programs: all that is known of it, without what only edgetool itself can use."""
    values = asdict(job)
    for key in ("token", "boot", "start_ticks"):
        del values[key]
    return {**values, "command": ["edgetool", *job.command], "seconds": job.seconds()}


def blocks(jobs: Sequence[Job]) -> list[Block]:
    """The table of `edgetool jobs`."""
    if not jobs:
        return [Text("", "no job is recorded")]
    headers = ["id", "state", "exit", "started", "took", "command"]
    return [Table("jobs", [_row(job) for job in jobs], headers), *_why(jobs)]


def _row(job: Job) -> list[str]:
    seconds = job.seconds()
    return [
        str(job.id),
        f"{job.state} on {job.host}" if job.elsewhere else job.state,
        "-" if job.exit_code is None else str(job.exit_code),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started_unix_s)),
        "-" if seconds is None else duration(seconds),
        _short(job),
    ]


def _short(job: Job) -> str:
    text = shlex.join(job.command)
    return text if len(text) <= _COMMAND_SHOWN else text[: _COMMAND_SHOWN - 3] + "..."


def _why(jobs: Sequence[Job]) -> list[Block]:
    failed = [f"{job.id}: {' '.join(job.message.split())}" for job in jobs if job.state == "failed" and job.message]
    return [Text("why they failed", "\n".join(failed))] if failed else []
