"""EvalPlus's problems: HumanEval+ and MBPP+ found in a data directory, or fetched once, and checked line by line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgetool.artifacts import atomic_write, disk_errors
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.evaluation.data_files import WrongLine, numbered_rows

Dataset = Literal["humaneval", "mbpp"]

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "task_id": str,
    "prompt": str,
    "entry_point": str,
    "canonical_solution": str,
    "base_input": list,
    "plus_input": (list, dict),  # {} where MBPP+ v0.1.0 adds no tests to a problem
    "atol": (int, float),
}
_VERSION = re.compile(r"v\d+(?:\.\d+)+")
_FETCH_LIMIT_S = 60.0


@dataclass(frozen=True)
class _Published:
    """What EvalPlus 0.3.1 reads where nothing else is said."""

    stem: str
    version: str
    problems: int
    variable: str


PUBLISHED: Mapping[str, _Published] = {
    "humaneval": _Published("HumanEvalPlus", "v0.1.10", 164, "HUMANEVAL_OVERRIDE_PATH"),
    "mbpp": _Published("MbppPlus", "v0.2.0", 378, "MBPP_OVERRIDE_PATH"),
}
RELEASES = "https://github.com/evalplus/{0}_release/releases/download/{1}/{2}.jsonl.gz"
"""Where the files are published: small letters, version, name."""


@dataclass(frozen=True)
class CodeProblem:
    """One function to write. row: all of upstream's fields, as JSON text."""

    task_id: str
    prompt: str
    entry_point: str
    row: str


@dataclass(frozen=True)
class CodeData:
    """The problems of one dataset in upstream's order, and where they came from."""

    dataset: Dataset
    path: Path
    version: str
    problems: tuple[CodeProblem, ...]
    notes: tuple[str, ...] = ()

    def chosen(self, limit: int | None = None, only: Sequence[str] | None = None) -> tuple[CodeProblem, ...]:
        """The first `limit` problems, or those whose task_id is in `only`, in upstream's order."""
        if only is not None:
            wanted = set(only)
            return tuple(problem for problem in self.problems if problem.task_id in wanted)
        return self.problems[:limit]

    def sha256(self, limit: int | None = None) -> str:
        """Of the rows that are used: the profile's word for the data."""
        digest = hashlib.sha256()
        for problem in self.chosen(limit):
            digest.update(problem.row.encode() + b"\n")
        return digest.hexdigest()


def find(
    dataset: Dataset, data_dir: Path | None, *, cache_dir: Path, offline: bool = False, releases: str = RELEASES
) -> CodeData:
    """The problems of `dataset`.

    From `data_dir`/<dataset>, a file called HumanEvalPlus... or MbppPlus..., .jsonl or .jsonl.gz; without `data_dir`
    from the file that EvalPlus's own HUMANEVAL_OVERRIDE_PATH or MBPP_OVERRIDE_PATH names, or as published, fetched once
    into `cache_dir`.

    Raises BadInput where there is no such file, or it is damaged or empty, naming the line; ResourceUnavailable where
    it cannot be fetched.
    """
    published = PUBLISHED[dataset]
    if data_dir is not None:
        path = _in_directory(data_dir / dataset, published)
    elif named := os.environ.get(published.variable):
        path = Path(named)
        if not path.is_file():
            raise BadInput(f"{published.variable} names {path}, which is no file", f"unset {published.variable}")
    else:
        path = _fetched(published, cache_dir, offline, releases)
    return _read(dataset, published, path)


def _in_directory(directory: Path, published: _Published) -> Path:
    found = sorted(directory.glob(f"{published.stem}*.jsonl")) + sorted(directory.glob(f"{published.stem}*.jsonl.gz"))
    # EvalPlus publishes smaller sets beside the whole one
    found = [path for path in found if "-Mini" not in path.name and "-NoExtreme" not in path.name]
    if not found:
        address = releases_address(published)
        raise BadInput(
            f"{directory} has no {published.stem}-<version>.jsonl or .jsonl.gz",
            f"put {address} there, or leave --data-dir out",
        )
    preferred = [path for path in found if published.version in path.name]
    return (preferred or found)[-1]


def releases_address(published: _Published, releases: str = RELEASES) -> str:
    """Where a dataset is published."""
    return releases.format(published.stem.lower(), published.version, published.stem)


def _fetched(published: _Published, cache_dir: Path, offline: bool, releases: str) -> Path:
    path = cache_dir / "eval" / "data" / f"{published.stem}-{published.version}.jsonl.gz"
    if path.is_file():
        return path
    address = releases_address(published, releases)
    hint = f"put {address} at {path}, or use --data-dir"
    if offline:
        raise ResourceUnavailable(f"{published.stem} {published.version} is not in the cache, and we are offline", hint)
    import httpx

    try:
        answer = httpx.get(address, follow_redirects=True, timeout=_FETCH_LIMIT_S)
        answer.raise_for_status()
        gzip.decompress(answer.content)
    except (httpx.HTTPError, OSError, EOFError, zlib.error) as error:
        raise ResourceUnavailable(f"{address} cannot be fetched: {error}", hint) from error
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, answer.content)
    return path


def _read(dataset: Dataset, published: _Published, path: Path) -> CodeData:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}", "fetch it again") from error
    problems: dict[str, CodeProblem] = {}
    try:
        for line, row in numbered_rows(path.with_suffix("") if path.suffix == ".gz" else path, data):
            problem = _problem(line, row)
            if problem.task_id in problems:
                raise WrongLine(line, f"has {problem.task_id} a second time")
            problems[problem.task_id] = problem
    except WrongLine as wrong:
        raise BadInput(f"{path}: line {wrong.line} {wrong}", "fetch it again, or take the line out") from wrong
    if not problems:
        raise BadInput(f"{path} is empty", "fetch it again")
    found = _VERSION.search(path.name)
    version = found[0] if found else "unknown"
    notes = []
    if version != published.version or len(problems) != published.problems:
        notes.append(
            f"{dataset}: {path.name} has {len(problems)} problems; EvalPlus 0.3.1 measures {published.stem} "
            f"{published.version} with {published.problems}, so compare with scores on this file only"
        )
    return CodeData(dataset, path, version, tuple(problems.values()), tuple(notes))


def _problem(line: int, row: Mapping[str, Any]) -> CodeProblem:
    for name, kind in _FIELDS.items():
        if name not in row:
            raise WrongLine(line, f"has no field {name}")
        if (
            not isinstance(row[name], kind)
            or isinstance(row[name], bool)
            or (isinstance(row[name], dict) and row[name])
        ):
            raise WrongLine(line, f"has a {type(row[name]).__name__} in field {name}")
    if not re.fullmatch(r"[A-Za-z]+/\d+", row["task_id"]):
        raise WrongLine(line, f"has the task_id {row['task_id']!r}, not one like HumanEval/0")
    return CodeProblem(row["task_id"], row["prompt"], row["entry_point"], json.dumps(row))
