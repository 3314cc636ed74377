"""Whether what edgetool prints is what docs/schemas says.

Every document that a command prints in a test, and every line of `--progress json`, is compared: in this process by
`watch`, of child processes where `subprocess.run` has caught their stdout. What does not fit fails the test.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
PROGRESS = "edgetool.progress/1"
_BEGINNING = '{\n  "schema": "edgetool.'

wrong: list[str] = []
"""What did not fit since a test last looked."""


@functools.cache
def schemas() -> dict[str, dict[str, Any]]:
    """Every published schema by the name of its document."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in SCHEMAS.glob("*.json")]
    return {schema["title"]: schema for schema in found}


def outcomes(name: str) -> list[str]:
    """What a document can be: the names of its outcomes."""
    return [one["$ref"].rpartition("/")[2] for one in schemas()[name].get("oneOf", [])]


@functools.cache
def validator(name: str, outcome: str | None = None) -> Any:
    """Of a whole document, or of one of its outcomes."""
    schema = schemas()[name]
    if outcome is not None:
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/{outcome}", "$defs": schema["$defs"]}
    return jsonschema_rs.validator_for(schema)


def faults(document: Mapping[str, Any], name: str | None = None) -> list[str]:
    """What a document, or an event of progress, has that its schema does not allow; against the nearest outcome."""
    name = str(document.get("schema")) if name is None else name
    if name not in schemas():
        return [f"no schema is named {name}"]
    if validator(name).is_valid(document):
        return []
    tried: list[list[str]] = []
    for outcome in outcomes(name) or [None]:
        found = validator(name, outcome).iter_errors(document)
        tried.append([f"{name}, {outcome}: {_place(fault)}: {fault.message}" for fault in found])
    return min(tried, key=len) or [f"{name}: fits more than one outcome"]


def outcome_of(document: Mapping[str, Any], name: str | None = None) -> str:
    """The one outcome that a document is."""
    name = str(document.get("schema")) if name is None else name
    (found,) = [outcome for outcome in outcomes(name) if validator(name, outcome).is_valid(document)]
    return found


def look(text: object) -> None:
    """Note what is wrong with the document that `text` is, if it is one of edgetool's."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    if isinstance(text, str) and text.startswith(_BEGINNING):
        with contextlib.suppress(ValueError):  # cut off, or more than one: for the test itself to judge
            wrong.extend(faults(json.loads(text)))


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Look at everything that is printed, in this process or by a child of `subprocess.run`."""
    from edgetool import console, progress_lines

    printing, line_of, running = console.Output._print, progress_lines.event_line, subprocess.run

    def printed(self: console.Output, document: Mapping[str, Any]) -> None:
        wrong.extend(faults(json.loads(json.dumps(console._strict(document), default=str))))
        printing(self, document)

    def event_line(event: str, **values: Any) -> str:
        line = line_of(event, **values)
        wrong.extend(faults(json.loads(line), PROGRESS))
        return line

    def run(*arguments: Any, **options: Any) -> Any:
        done = running(*arguments, **options)
        look(done.stdout)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.Output, "_print", printed)
        patch.setattr(console, "event_line", event_line)
        patch.setattr(progress_lines, "event_line", event_line)
        patch.setattr(subprocess, "run", run)
        yield


def _place(fault: Any) -> str:
    return ".".join(map(str, fault.instance_path)) or "the document"
