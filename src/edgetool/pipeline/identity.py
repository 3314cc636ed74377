"""What decides a step's output, as a hash; and what its output is: cheap to look at again, provable by hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import MANIFEST_NAME
from edgetool.config import SECTIONS, Config
from edgetool.pipeline.commands import Command
from edgetool.runs import FileHashes

_NOT_IDENTITY = {"output", "resume", "overwrite", "dry_run", "port"}
_ELSEWHERE = {"envs", "scheduler"}
_HASH_THREADS = 4

Files = dict[str, list[Any]]
"""Path below a directory -> [size in bytes, time of change in ns], or with the SHA-256 of its bytes as a third."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_identity(spec: str) -> Any:
    """What tells one model from another without reading it: for files their names, sizes and times of change.

    A hub model is its name: that a branch has moved on the hub is not seen; a commit in `revision` is a fixed model.
    """
    path = Path(spec).expanduser()
    if spec == "demo" or not path.exists():
        return spec
    if path.is_dir():
        return files_below(path)
    stat = path.stat()
    return {path.name: [stat.st_size, stat.st_mtime_ns]}


def step_identity(command: Command, config: Config, inputs: Mapping[str, Any]) -> str:
    """Of a step: the command's resolved settings, what it reads (key -> content), and this version of edgetool."""
    section = SECTIONS[command.section]
    settings = getattr(config, command.section).model_dump(mode="json", by_alias=True)
    for key in {*_NOT_IDENTITY, *inputs}:
        settings.pop(key, None)
    # of the sections that it also reads, what somebody has set; defaults come with the version
    used = tuple(f"{name}." for name in section.uses if name not in _ELSEWHERE)
    others = {}
    for key in config.origins:
        if key.startswith(used):
            name, _, attribute = key.partition(".")
            others[key] = getattr(config, name).model_dump(mode="json", by_alias=True).get(attribute)
    files = {key: model_identity(value) for key, value in settings.items() if _names_a_file(value)}
    return digest([command.name, settings, others, files, dict(inputs), __version__])


def _names_a_file(value: Any) -> bool:
    """Whether a setting's value is read from, as a calibration text is."""
    return isinstance(value, str) and bool(value) and Path(value).expanduser().is_file()


def files_below(directory: Path) -> Files:
    """Size and time of change of every file; nothing is read. Empty where there is no such directory."""
    found: Files = {}
    waiting = [directory]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # gone, or closed to us: whoever reads it will say so
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                stat = entry.stat(follow_symlinks=Path(entry.path).exists())
                found[os.path.relpath(entry.path, directory)] = [stat.st_size, stat.st_mtime_ns]
    return found


def hashed(directory: Path) -> Files:
    """As `files_below`, with the SHA-256 of each file."""
    found = files_below(directory)
    with FileHashes(_HASH_THREADS) as hashes:
        for name in found:
            hashes.add(directory / name)
        return {name: [*facts, hashes.one(directory / name)] for name, facts in found.items()}


def content_of(files: Files) -> str:
    """What the files say, their times and the manifest (which holds how long it took) left out."""
    return digest({name: facts[2] for name, facts in files.items() if name != MANIFEST_NAME})


def is_unchanged(directory: Path, files: Files, verify: bool) -> bool:
    """Whether the directory is as it was recorded; with `verify` every byte is read."""
    if not files:
        return False
    if verify:
        now = {name: facts[2] for name, facts in hashed(directory).items()}
        return now == {name: facts[2] for name, facts in files.items()}
    return files_below(directory) == {name: facts[:2] for name, facts in files.items()}
