"""What a run has finished, on disk, so that a killed run loses one step (a layer, a shard) at most."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from edgetool.errors import BadInput


@dataclass
class RunLedger:
    """A file of JSON lines: first what the run is (`identity`), then one record for each finished step.

    A line is flushed to the disk before the run goes on, and after the files that it speaks of. A last line torn by a
    crash counts as not written.
    """

    path: Path
    identity: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> Self:
        """Start a ledger, or take up the one that is there.

        Raises BadInput if it belongs to a run with other inputs or options, naming the first that differs.
        """
        ledger = cls(path, identity)
        lines = _complete_lines(path)
        if not lines:
            path.unlink(missing_ok=True)
            ledger._append({"identity": identity})
            return ledger
        refuse_difference(path.parent, lines[0].get("identity"), identity)
        ledger.records = lines[1:]
        # Cut a torn line off, so that the next record starts on a line of its own.
        keep = sum(len(json.dumps(line, sort_keys=True).encode()) + 1 for line in lines)
        os.truncate(path, keep)
        return ledger

    def settle(self, key: str, value: Any) -> None:
        """Record what the run has found out and must find again when it is taken up; BadInput where it does not."""
        for record in self.records:
            if key in record:
                refuse_difference(self.path.parent, {key: record[key]}, {key: value})
                return
        self.append({key: value})

    def having(self, key: str) -> list[dict[str, Any]]:
        """The records with `key`, in order."""
        return [record for record in self.records if key in record]

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; when this returns it survives a crash."""
        self._append(record)
        self.records.append(record)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        lines.append(record)
    return lines


def count_records(path: Path, key: str) -> int:
    """Number of records with `key` in the ledger at `path`, 0 where there is none."""
    return sum(key in record for record in _complete_lines(path))


def refuse_difference(directory: Path, known: Any, now: dict[str, Any]) -> None:
    """Raise BadInput if `now` says otherwise than what the unfinished run in `directory` is known to be."""
    found = _difference("", known, now)
    if found is not None:
        name, before, after = found
        raise BadInput(
            f"the unfinished run in {directory} has another {name}: {before!r}, now {after!r}",
            "give the same options as before with --resume, or --overwrite to start again",
        )


def _difference(prefix: str, known: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first thing that differs."""
    if not isinstance(known, dict) or not isinstance(now, dict):
        return None if known == now else (prefix, known, now)
    for key in [*now, *(key for key in known if key not in now)]:
        found = _difference(f"{prefix}.{key}" if prefix else key, known.get(key), now.get(key))
        if found is not None:
            return found
    return None
