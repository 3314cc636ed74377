"""The job store: every long command of this user, in one SQLite file that shells, CI runs and pages read at once.

A job that says it is running is believed only while its process lives (number, start time, boot); one that was killed
is `lost`. No secret is ever in it: command lines are masked before they come here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.process.tree import ProcessId, alive, identify

RUNNING, DONE, FAILED, STOPPED, LOST = "running", "done", "failed", "stopped", "lost"

_VERSION = 1
_BUSY_S = 5.0
_STOPPED_CODES = (75, 130, 143)
_COLUMNS = (
    "id",
    "command",
    "directory",
    "state",
    "host",
    "boot",
    "pid",
    "start_ticks",
    "token",
    "parent",
    "exit_code",
    "message",
    "started_unix_s",
    "ended_unix_s",
    "output",
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    command TEXT NOT NULL,
    directory TEXT NOT NULL,
    state TEXT NOT NULL,
    host TEXT NOT NULL,
    boot TEXT NOT NULL,
    pid INTEGER NOT NULL,
    start_ticks INTEGER NOT NULL,
    token TEXT NOT NULL,
    parent INTEGER,
    exit_code INTEGER,
    message TEXT,
    started_unix_s REAL NOT NULL,
    ended_unix_s REAL,
    output TEXT
)
"""


@dataclass(frozen=True)
class Job:
    """One run of one command.

    command: its arguments, secrets masked. token: carried by everything it has started (process.tree.TREE_VARIABLE).
    parent: the job that started it. output: the directory it writes, None where it writes none. exit_code and
    ended_unix_s are None while it runs, and where it was killed. message: why it failed.
    """

    id: int
    command: tuple[str, ...]
    directory: str
    state: str
    host: str
    boot: str
    pid: int
    start_ticks: int
    token: str
    parent: int | None
    exit_code: int | None
    message: str | None
    started_unix_s: float
    ended_unix_s: float | None
    output: str | None
    log: str

    @property
    def process(self) -> ProcessId:
        """Its main process."""
        return ProcessId(self.pid, self.start_ticks)

    @property
    def elsewhere(self) -> bool:
        """Whether it belongs to another machine, which shares the directory: nothing is known of its processes."""
        return self.host != socket.gethostname()

    def seconds(self) -> float | None:
        """How long it has run; None where nobody saw its end."""
        if self.ended_unix_s is not None:
            return self.ended_unix_s - self.started_unix_s
        return time.time() - self.started_unix_s if self.state == RUNNING else None


def state_of(exit_code: int) -> str:
    """What an exit code (docs/exit-codes.md) says of a job."""
    if exit_code == 0:
        return DONE
    return STOPPED if exit_code in _STOPPED_CODES else FAILED


class JobStore:
    """The store in `directory`, which is made, with its logs, when the first job comes. Safe for many processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "jobs.sqlite"

    def log_of(self, number: int) -> Path:
        """Where the progress of a job is written."""
        return self.directory / "logs" / f"{number}.log"

    def start(self, command: Sequence[str], token: str, above: Sequence[str], output: str | None) -> Job:
        """Record that this process has begun a job. above: tokens of the trees it is in, outermost first.

        Raises:
            BadInput, ResourceUnavailable: the store cannot be written.
        """
        process = identify(os.getpid())
        assert process is not None
        values = {
            "command": json.dumps(list(command)),
            "directory": str(Path.cwd()),
            "state": RUNNING,
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": process.pid,
            "start_ticks": process.start_ticks,
            "token": token,
            "started_unix_s": time.time(),
            "output": output,
        }
        self._make()
        with self._open(write=True) as db:
            row = db.execute(
                f"SELECT max(id) FROM jobs WHERE token IN ({','.join('?' * len(above))})",  # noqa: S608 (only marks)
                tuple(above),
            ).fetchone()
            names = [*values, "parent"]
            cursor = db.execute(
                f"INSERT INTO jobs ({','.join(names)}) VALUES ({','.join('?' * len(names))})",  # noqa: S608
                (*values.values(), row[0]),
            )
            assert cursor.lastrowid is not None
            number = cursor.lastrowid
        return self.get(number)

    def finish(self, number: int, state: str, exit_code: int | None, message: str | None = None) -> None:
        """Record the end of a job that still counts as running; another word on it is not overwritten."""
        with self._open(write=True) as db:
            db.execute(
                "UPDATE jobs SET state=?, exit_code=?, message=?, ended_unix_s=? WHERE id=? AND state=?",
                (state, exit_code, message, time.time(), number, RUNNING),
            )

    def get(self, number: int) -> Job:
        """One job; raises BadInput where there is none of that number."""
        found = self._select("WHERE id=?", (number,))
        if not found:
            raise BadInput(f"there is no job {number} in {self.directory}", "edgetool jobs lists them")
        return found[0]

    def jobs(self, limit: int | None = None) -> list[Job]:
        """The latest jobs, newest first."""
        return self._select("ORDER BY id DESC LIMIT ?", (-1 if limit is None else limit,))

    def below(self, number: int) -> list[Job]:
        """The jobs that a job has started, those that these have started, and so on."""
        tree = "WITH RECURSIVE t(n) AS (SELECT ? UNION SELECT id FROM jobs, t WHERE parent=n) SELECT n FROM t"
        return self._select(f"WHERE id IN ({tree}) AND id<>? ORDER BY id", (number, number))

    def remove(self, ended_before_unix_s: float) -> int:
        """Forget jobs that ended before then (lost ones: that began), and their logs; returns how many."""
        old = [
            job.id
            for job in self._select("WHERE coalesce(ended_unix_s, started_unix_s) < ?", (ended_before_unix_s,))
            if job.state != RUNNING
        ]
        if old:
            with self._open(write=True) as db:
                db.executemany("DELETE FROM jobs WHERE id=?", [(number,) for number in old])
            for number in old:
                self.log_of(number).unlink(missing_ok=True)
        return len(old)

    def _select(self, condition: str, values: tuple[Any, ...]) -> list[Job]:
        if not self.path.is_file():
            return []
        query = f"SELECT {','.join(_COLUMNS)} FROM jobs {condition}"  # noqa: S608 (no text of a user's)
        with self._open() as db:
            rows = db.execute(query, values).fetchall()
        return [self._judged(self._job(row)) for row in rows]

    def _judged(self, job: Job) -> Job:
        """`job`, or that it is lost. A job says how it ended before its process ends, so it may have done so now."""
        if job.state != RUNNING or job.elsewhere or (job.boot == _boot() and alive(job.process)):
            return job
        query = f"SELECT {','.join(_COLUMNS)} FROM jobs WHERE id=?"  # noqa: S608
        with self._open() as db:
            row = db.execute(query, (job.id,)).fetchone()
        again = job if row is None else self._job(row)
        return replace(again, state=LOST) if again.state == RUNNING else again

    def _job(self, row: tuple[Any, ...]) -> Job:
        values = dict(zip(_COLUMNS, row, strict=True))
        values["command"] = tuple(json.loads(values["command"]))
        return Job(**values, log=str(self.log_of(values["id"])))

    def _make(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.directory / "logs").mkdir(exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ResourceUnavailable(f"the job store {self.path} cannot be written: {error.strerror}") from error

    @contextlib.contextmanager
    def _open(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction. Readers never wait for writers (WAL), writers wait for each other for a while."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > _VERSION:
                    raise BadInput(
                        f"the job store {self.path} was written by a newer edgetool (version {version} of its tables)",
                        "use that edgetool, or set EDGETOOL_JOBS_DIRECTORY to another directory",
                    )
                if write and version == 0:
                    db.execute(_SCHEMA)
                    db.execute(f"PRAGMA user_version={_VERSION}")
                yield db
                db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise ResourceUnavailable(f"the job store {self.path} cannot be used now: {error}") from error
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"the job store {self.path} is damaged: {error}", f"move it away: mv {self.path} {self.path}.damaged"
            ) from error


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
