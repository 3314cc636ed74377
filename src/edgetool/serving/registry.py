"""The servers of this user that run on this machine: one JSON file each, for `serve-gpu --list` and `--stop`.

A record is believed only while the process that wrote it lives (number and start time); what a killed one left behind
is removed by whoever looks next. No key is ever in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetool.artifacts import atomic_write
from edgetool.errors import BadInput, ConfigError, ResourceUnavailable
from edgetool.process.tree import ProcessId, alive, identify
from edgetool.serving import shared_memory

_SUFFIX = ".json"
_LONGEST_DIRECTORY_BYTES = 40  # vLLM makes sockets with names of 36 bytes two levels below


@dataclass(frozen=True)
class Record:
    """One `edgetool serve-gpu`.

    pid, start_ticks: its process. state: starting or ready. servers: as in its JSON result, without the key.
    scratch: a directory of its own for sockets and temporary files. start_unix_s: when it was asked for.
    shared_memory: names of segments that its processes use.
    """

    name: str
    pid: int
    start_ticks: int
    model: str
    engine: str
    device: str
    state: str
    start_unix_s: float
    scratch: str
    log: str
    servers: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    shared_memory: tuple[str, ...] = field(default_factory=tuple)

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start_ticks)


class Registry:
    """The records in `directory`, which is made when it is missing, for its owner only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def claim(self, wanted: str, *, exact: bool, model: str, engine: str, device: str) -> Record:
        """A record for this process under the name `wanted`, or `wanted-2`, ... where it is taken and not `exact`.

        Raises ResourceUnavailable when the exact name is taken.
        """
        own = identify(os.getpid())
        assert own is not None
        with self._locked():
            taken = {record.name: record for record in self._living()}
            if exact and wanted in taken:
                raise ResourceUnavailable(
                    f"a server named {wanted!r} runs already (process {taken[wanted].pid})",
                    f"edgetool serve-gpu --stop {wanted}",
                )
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}-{number}"
            scratch = tempfile.mkdtemp(prefix="edgetool-", dir=_short_directory())
            record = Record(
                name, *own, model, engine, device, "starting", time.time(), scratch, str(self.log_of(name))
            )  # fmt: skip
            self._write(record)
        return record

    def log_of(self, name: str) -> Path:
        """Where the engine of a server writes."""
        return self.directory / "logs" / f"{name}.log"

    def ready(self, record: Record, servers: list[dict[str, Any]], shared_memory: list[str]) -> Record:
        """Write down that a server answers, and what shared memory it uses."""
        record = replace(record, state="ready", servers=tuple(servers), shared_memory=tuple(shared_memory))
        with self._locked():
            self._write(record)
        return record

    def drop(self, record: Record) -> None:
        """Remove a record and what belongs to it; logs stay."""
        with self._locked():
            self._remove(record)

    def records(self) -> list[Record]:
        """The servers that live, oldest first."""
        with self._locked():
            return self._living()

    def stop(self, name: str, timeout_s: float) -> dict[str, Any]:
        """Ask the server `name` to end and wait until it has.

        Raises:
            BadInput: there is none of that name.
            ResourceUnavailable: it has not ended after `timeout_s`.
        """
        found = {record.name: record for record in self.records()}
        if name not in found:
            names = ", ".join(found) or "none runs"
            raise BadInput(f"no server is named {name!r}", f"servers that run: {names}")
        record = found[name]
        begun = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        while alive(record.process):
            if time.monotonic() - begun > timeout_s:
                raise ResourceUnavailable(
                    f"{name} (process {record.pid}) has not ended after {timeout_s:.0f} s", f"kill -9 {record.pid}"
                )
            time.sleep(0.05)
        self.drop(record)
        return {"stopped": name, "pid": record.pid, "seconds": time.monotonic() - begun}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use the directory {self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _living(self) -> list[Record]:
        living = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            record = _read(path)
            if record is None:
                continue
            if alive(record.process):
                living.append(record)
            else:
                self._remove(record)
        return sorted(living, key=lambda record: record.start_unix_s)

    def _write(self, record: Record) -> None:
        atomic_write(self.directory / f"{record.name}{_SUFFIX}", json.dumps(asdict(record), indent=2).encode())

    def _remove(self, record: Record) -> None:
        path = self.directory / f"{record.name}{_SUFFIX}"
        now = _read(path)
        if now is not None and now.process == record.process:  # the name may have a new owner by now
            path.unlink(missing_ok=True)
            shared_memory.remove(now.shared_memory)
        scratch = Path(record.scratch)
        if scratch.name.startswith("edgetool-"):  # what is removed comes from a file
            shutil.rmtree(scratch, ignore_errors=True)


def _short_directory() -> str:
    """Where temporary files go, unless that is too long for sockets in it: their paths may have 107 bytes."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST_DIRECTORY_BYTES else "/tmp"  # noqa: S108


def _read(path: Path) -> Record | None:
    """The record in a file; None where there is none, or not one of ours."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(document[name]) for name in ("servers", "shared_memory")}
        return Record(**{**document, **lists})
    except (OSError, ValueError, TypeError, KeyError):
        return None
