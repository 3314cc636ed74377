"""Ending jobs: what ignores requests, what was killed, and what must not be touched."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edgetool.artifacts import OutputDirectory
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.jobs.cancelling import cancel
from edgetool.jobs.store import JobStore
from edgetool.progress import NullProgress, RecordingProgress

STUBBORN = Path(__file__).parent.parent.parent / "fakes" / "stubborn_job.py"


class Stubborn:
    """The stubborn job, once it has started everything."""

    def __init__(self, directory: Path) -> None:
        self.store = JobStore(directory / "jobs")
        self.output = directory / "out"
        self.process = subprocess.Popen(
            [sys.executable, str(STUBBORN), str(self.store.directory), str(self.output)],
            cwd=STUBBORN.parent.parent.parent,
        )
        pids = self.partial / "pids"
        deadline = time.monotonic() + 60
        while not pids.is_file():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        self.pids = [int(number) for number in pids.read_text().split()]

    @property
    def partial(self) -> Path:
        return self.output.with_name("out.partial")

    def running(self) -> list[int]:
        """Those of its processes that live, found without edgetool."""
        self.process.poll()
        return [
            pid for pid in self.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Stubborn]:
    job = Stubborn(tmp_path)
    yield job
    for pid in job.running():
        os.kill(pid, signal.SIGKILL)
    job.process.wait()


def test_a_job_that_ignores_requests_is_killed_with_everything_it_has_started(stubborn: Stubborn) -> None:
    assert len(stubborn.running()) == 3
    result = cancel(stubborn.store, 1, grace_s=0.5, keep=False, progress=NullProgress())
    assert stubborn.running() == []
    assert result["processes_left"] == 0 and result["processes_killed"] >= 3
    job = stubborn.store.get(1)
    assert (job.state, job.exit_code) == ("stopped", 137)
    assert result["removed"] == [str(stubborn.partial)]
    assert not stubborn.partial.exists() and not stubborn.output.exists()


def test_with_keep_the_unfinished_output_stays_and_is_named(stubborn: Stubborn) -> None:
    result = cancel(stubborn.store, 1, grace_s=0.2, keep=True, progress=NullProgress())
    assert (result["kept"], result["removed"]) == ([str(stubborn.partial)], [])
    assert stubborn.partial.is_dir() and stubborn.running() == []


def test_of_a_killed_job_what_is_left_is_found_and_ended(stubborn: Stubborn) -> None:
    stubborn.process.kill()
    stubborn.process.wait()
    assert stubborn.store.get(1).state == "lost"
    program = stubborn.pids[1]
    assert program in stubborn.running()
    cancel(stubborn.store, 1, grace_s=0.2, keep=False, progress=NullProgress())
    assert program not in stubborn.running()
    assert not stubborn.partial.exists()
    assert stubborn.store.get(1).state == "stopped"


def test_a_bystander_of_the_same_user_is_not_touched(stubborn: Stubborn) -> None:
    bystander = subprocess.Popen(["sleep", "60"], env={**os.environ, "EDGETOOL_TREE": "somebody-else"})
    try:
        cancel(stubborn.store, 1, grace_s=0.2, keep=False, progress=NullProgress())
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_an_output_that_another_run_writes_is_left_alone(stubborn: Stubborn) -> None:
    other = OutputDirectory(stubborn.output, resume=True)
    with other, pytest.raises(ResourceUnavailable, match="another run"):
        cancel(stubborn.store, 1, grace_s=0.2, keep=False, progress=NullProgress())
    assert stubborn.partial.is_dir()


def test_what_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    number = store.start(["quantize"], "t", [], None).id
    store.finish(number, "done", 0)
    with pytest.raises(BadInput, match="it is done"):
        cancel(store, number, grace_s=1, keep=False, progress=RecordingProgress())


def test_a_command_does_not_end_the_job_that_it_runs_in(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    number = store.start(["run"], "t", [], None).id  # this very process
    with pytest.raises(BadInput, match="inside job"):
        cancel(store, number, grace_s=1, keep=False, progress=NullProgress())


def test_a_job_of_another_machine_is_refused(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    number = store.start(["run"], "t", [], None).id
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE jobs SET host='elsewhere'")
    with pytest.raises(BadInput, match="runs on elsewhere"):
        cancel(store, number, grace_s=1, keep=False, progress=NullProgress())
