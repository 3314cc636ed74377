"""What a run has done so far: edgetool.json in its directory, rewritten whole after every step."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME, atomic_write, disk_errors
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.runs import tool_versions

RECORD_SCHEMA = "edgetool.run-record/1"
_FACTS = frozenset({"identity", "files", "content", "done"})


@dataclass
class RunRecord:
    """The steps that are finished, by name; those that have begun, with their identity; and gates that did not hold.

    A finished step: identity, files (see identity.Files), content, and done, its result.
    """

    directory: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)
    failed_gates: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """The record of `directory`, an empty one where nothing has run yet.

        Raises BadInput where there is something else, or a record that cannot be read.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise BadInput(
                    f"output {directory} exists and was not written by edgetool run", "choose another --output"
                )
            return cls(directory)
        try:
            document = json.loads(path.read_bytes())
            if document["schema"] != RECORD_SCHEMA:
                raise BadInput(
                    f"output {directory} was written by another command ({document['schema']})",
                    "choose another --output",
                )
            parts = [document[name] for name in ("steps", "begun", "failed_gates")]
            if not all(isinstance(part, dict) for part in parts) or not all(map(_FACTS.issubset, parts[0].values())):
                raise TypeError("it is no record of a run")
            return cls(directory, *parts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} cannot be read: {error}", f"remove {directory}, or choose another --output"
            ) from error

    def begin(self, step: str, identity: str) -> None:
        """A step starts: if it is stopped, one of the same identity can go on."""
        self.steps.pop(step, None)
        self.begun[step] = identity
        self.write()

    def finish(self, step: str, facts: dict[str, Any]) -> None:
        """A step is done."""
        self.begun.pop(step, None)
        self.steps[step] = facts
        self.write()

    def gate_failed(self, attempt: str, facts: dict[str, Any]) -> None:
        """An attempt (everything up to the gate, as a hash) was not good enough: it need not be made again."""
        self.failed_gates[attempt] = facts
        self.write()

    def write(self) -> None:
        """Replace the record; a crash leaves the old one or the new one."""
        document = {
            "schema": RECORD_SCHEMA,
            "steps": self.steps,
            "begun": self.begun,
            "failed_gates": self.failed_gates,
            "tools": tool_versions(),
        }
        # keys keep the order that the commands gave them, so that a report made from the record is the same
        atomic_write(self.directory / MANIFEST_NAME, json.dumps(document, indent=2).encode() + b"\n")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory of a run, and keep other runs out of it.

    Raises ResourceUnavailable while another one is at work there, BadInput where it cannot be made.
    """
    with disk_errors(directory):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise BadInput(f"output {directory} exists and is not a directory", "choose another --output") from error
        except FileNotFoundError as error:
            raise BadInput(f"cannot write {directory}: its parent directory cannot be created") from error
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceUnavailable(
                f"another edgetool run is at work in {directory}", "edgetool jobs shows it; wait, or choose another -o"
            ) from None
        yield
    finally:
        os.close(descriptor)
