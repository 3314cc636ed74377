"""The job store: what many processes write into it, and what is believed of it."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgetool.errors import BadInput, EdgetoolError, ResourceUnavailable
from edgetool.jobs.store import JobStore, state_of


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs")


def start(store: JobStore, token: str = "t", above: tuple[str, ...] = (), output: str | None = None) -> int:
    return store.start(["quantize", "demo"], token, above, output).id


def test_a_job_runs_until_it_says_how_it_ended(store: JobStore) -> None:
    number = start(store, output="/somewhere/out")
    running = store.get(number)
    assert (running.state, running.exit_code, running.pid) == ("running", None, os.getpid())
    assert (running.command, running.output) == (("quantize", "demo"), "/somewhere/out")
    store.finish(number, "failed", 4, "what was wrong")
    ended = store.get(number)
    assert (ended.state, ended.exit_code, ended.message) == ("failed", 4, "what was wrong")
    assert ended.seconds() is not None and ended.ended_unix_s is not None


def test_the_first_word_on_the_end_of_a_job_stands(store: JobStore) -> None:
    number = start(store)
    store.finish(number, "done", 0)
    store.finish(number, "stopped", 137, "cancelled")
    assert (store.get(number).state, store.get(number).exit_code) == ("done", 0)


def test_a_killed_job_is_lost(store: JobStore) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom edgetool.jobs.store import JobStore\n"
        "JobStore(Path(sys.argv[1])).start(['convert'], 't', [], None)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(store.directory)], timeout=60)
    assert ended.returncode == -9
    (job,) = store.jobs()
    assert (job.state, job.exit_code, job.seconds()) == ("lost", None, None)


@pytest.mark.parametrize(("column", "value"), [("start_ticks", 1), ("boot", "another")])
def test_another_process_of_the_same_number_is_not_the_job(store: JobStore, column: str, value: object) -> None:
    number = start(store)
    assert store.get(number).state == "running"
    with sqlite3.connect(store.path) as db:
        db.execute(f"UPDATE jobs SET {column}=?", (value,))
    assert store.get(number).state == "lost"


def test_nothing_is_said_of_processes_of_another_machine(store: JobStore) -> None:
    number = start(store)
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE jobs SET host='elsewhere', pid=1, boot='another'")
    assert store.get(number).state == "running"
    assert store.get(number).elsewhere


def test_jobs_are_listed_newest_first_and_numbers_are_not_used_again(store: JobStore) -> None:
    first, second = start(store), start(store)
    assert [job.id for job in store.jobs()] == [second, first]
    assert [job.id for job in store.jobs(1)] == [second]
    store.finish(second, "done", 0)
    assert store.remove(time.time() + 1) == 1
    assert start(store) > second


def test_a_job_knows_what_started_it_by_the_tokens_of_its_tree(store: JobStore) -> None:
    top = start(store, "top")
    middle = start(store, "middle", ("unknown", "top"))
    bottom = start(store, "bottom", ("unknown", "top", "middle"))
    other = start(store, "other", ("unknown",))
    assert [store.get(number).parent for number in (top, middle, bottom, other)] == [None, top, middle, None]
    assert [job.id for job in store.below(top)] == [middle, bottom]
    assert store.below(bottom) == []


def test_forgetting_leaves_running_and_younger_jobs_and_takes_logs(store: JobStore) -> None:
    old, young, running = start(store), start(store), start(store)
    for number in (old, young, running):
        store.log_of(number).write_text("said")
    for number in (old, young):
        store.finish(number, "done", 0)
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE jobs SET ended_unix_s = ended_unix_s - 1000 WHERE id=?", (old,))
        db.execute("UPDATE jobs SET started_unix_s = started_unix_s - 1000 WHERE id=?", (running,))
    assert store.remove(time.time() - 500) == 1
    assert {job.id for job in store.jobs()} == {young, running}
    assert [store.log_of(number).exists() for number in (old, young, running)] == [False, True, True]


def test_many_writers_at_once_lose_nothing(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: start(store), range(40)))
        list(pool.map(lambda number: store.finish(number, "done", 0), numbers))
    assert len(set(numbers)) == 40
    assert [job.state for job in store.jobs()] == ["done"] * 40


def test_store_and_directory_are_for_their_owner_alone(store: JobStore) -> None:
    start(store)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_reading_makes_nothing(store: JobStore) -> None:
    assert store.jobs() == []
    assert not store.directory.exists()
    with pytest.raises(BadInput, match="there is no job 3"):
        store.get(3)


def test_a_damaged_store_is_one_clear_error(store: JobStore) -> None:
    store.directory.mkdir()
    store.path.write_bytes(b"this is no database, and long enough to be looked at" * 100)
    with pytest.raises(BadInput, match="is damaged") as caught:
        store.jobs()
    assert caught.value.hint and "mv " in caught.value.hint


def test_the_store_of_a_newer_version_is_left_alone(store: JobStore) -> None:
    start(store)
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(BadInput, match="newer edgetool"):
        store.jobs()


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgetoolError, match="cannot be written") as caught:
        start(JobStore(tmp_path / "file" / "jobs"))
    assert isinstance(caught.value, ResourceUnavailable)


def test_a_writer_who_never_ends_is_waited_for_and_then_named(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    number = start(store)
    monkeypatch.setattr("edgetool.jobs.store._BUSY_S", 0.05)
    blocker = sqlite3.connect(store.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(ResourceUnavailable, match="locked"):
        store.finish(number, "done", 0)
    assert store.get(number).state == "running"  # readers do not wait
    blocker.execute("ROLLBACK")
    blocker.close()


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (75, "stopped"), (130, "stopped"), (143, "stopped"), (1, "failed"), (4, "failed"), (8, "failed")],
)
def test_exit_codes_are_states(code: int, state: str) -> None:
    assert state_of(code) == state
