"""Finished runs: written, read again, and compared with each other, question by question."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.artifacts import atomic_write
from edgetool.errors import BadInput
from edgetool.evaluation.gate import PERPLEXITY, parse_gate
from edgetool.evaluation.records import PerplexityScores, Sample, TaskScores, WindowLoss
from edgetool.evaluation.results import SCHEMA, Measured, MeasuredPerplexity, document

RESULTS_NAME = "results.json"


def write_results(path: Path, found: Mapping[str, Any]) -> None:
    """Write a `results.document`: readable, and each list of the outcomes on one line."""
    head = {"schema": SCHEMA, "ok": True, **{key: value for key, value in found.items() if key != "outcomes"}}
    lines = []
    for task, outcome in found["outcomes"].items():
        parts = ",\n".join(f"      {json.dumps(name)}: {_compact(values)}" for name, values in outcome.items())
        lines.append(f"    {json.dumps(task)}: {{\n{parts}\n    }}")
    outcomes = "{\n" + ",\n".join(lines) + "\n  }"
    text = json.dumps(head, indent=2, allow_nan=False, default=str)
    atomic_write(path, f'{text.rstrip().removesuffix("}").rstrip()},\n  "outcomes": {outcomes}\n}}\n'.encode())


def read_results(path: Path) -> dict[str, Any]:
    """A finished run's document; `path` is its results.json or its directory. Raises BadInput where it is none."""
    file = path / RESULTS_NAME if path.is_dir() else path
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise BadInput(
            f"{file}: {error.strerror}", "give the results.json of a finished run, or its directory"
        ) from error
    except ValueError as error:
        raise BadInput(f"{file}: not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise BadInput(f"{file}: its schema is {schema!r}, not {SCHEMA!r}", "give the results.json of edgetool eval")
    for key in ("profile", "model", "tasks", "outcomes"):
        if not isinstance(found.get(key), dict):
            raise BadInput(
                f"{file}: {key} is missing", "give the results.json that the run wrote: what --json prints has less"
            )
    return found


def compare(first: Path, second: Path, gate: str | None, seed: int) -> dict[str, Any]:
    """The models of two finished runs beside each other; the first run's is the original.

    Raises BadInput where the runs did not ask the same in the same way.
    """
    one, other = read_results(first), read_results(second)
    difference = first_difference(one["profile"], other["profile"])
    if difference is not None:
        name, before, after = difference
        raise BadInput(
            f"the two runs did not ask in the same way: {name} is {_brief(before)} in {first} and {_brief(after)} in "
            f"{second}",
            "measure both again with the same options, or in one run with --against",
        )
    parsed = parse_gate(gate) if gate is not None else None
    originals, quantized = _scores(one, first), _scores(other, second)
    if set(originals) != set(quantized):
        odd = sorted(set(originals) ^ set(quantized))[0]
        raise BadInput(f"{second if odd in originals else first} has no task {odd}, and the other run has")
    if parsed is not None:
        parsed.check(originals)
    tasks: dict[str, Measured] = {}
    perplexity = None
    for name, before in originals.items():
        after = quantized[name]
        if isinstance(before, PerplexityScores) and isinstance(after, PerplexityScores):
            perplexity = MeasuredPerplexity(after, before)
        elif isinstance(before, TaskScores) and isinstance(after, TaskScores):
            tasks[name] = Measured(after, before)
    found = document(other["profile"], other["model"], one["model"], tasks, perplexity, parsed, 0.0, seed)
    return {**found, "compared": [str(first), str(second)]}


def first_difference(one: Any, other: Any, place: str = "profile") -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first, as ("profile.tasks.mmlu", value, other value); the hash counts last."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted(set(one) | set(other), key=lambda key: (key == "hash", key)):
            found = first_difference(one.get(key), other.get(key), f"{place}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            found = first_difference(left, right, f"{place}[{index}]")
            if found is not None:
                return found
        return None
    return None if one == other else (place, one, other)


def _scores(found: Mapping[str, Any], path: Path) -> dict[str, TaskScores | PerplexityScores]:
    """The records of a run's MODEL, as far as a comparison needs them."""
    records: dict[str, TaskScores | PerplexityScores] = {}
    for name, entry in found["tasks"].items():
        try:
            outcome = found["outcomes"][name]
            side = entry["sides"]["model"]
            records[name] = (
                _perplexity(entry, side, outcome) if name == PERPLEXITY else _task(name, entry, side, outcome)
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise BadInput(f"{path}: {name} is damaged ({type(error).__name__}: {error})") from error
    return records


def _task(name: str, entry: Mapping[str, Any], side: Mapping[str, Any], outcome: Mapping[str, Any]) -> TaskScores:
    rows = zip(outcome["ids"], outcome["groups"], outcome["quantized"], strict=True)
    samples = tuple(Sample(str(id_), str(group), float(score)) for id_, group, score in rows)
    if abs(float(side["value"]) * len(samples) - math.fsum(sample.score for sample in samples)) > 1e-6 * len(samples):
        raise ValueError("its score is not that of its outcomes")
    return TaskScores(
        task=name,
        metric=str(entry["metric"]),
        n=len(samples),
        value=float(side["value"]),
        stderr=side["stderr"],
        samples=samples,
        metrics=dict(side["metrics"]),
        seconds=float(side["seconds"]),
        generated_tokens=None if side["generated_tokens"] is None else int(side["generated_tokens"]),
        version=dict(side["version"]),
    )


def _perplexity(entry: Mapping[str, Any], side: Mapping[str, Any], outcome: Mapping[str, Any]) -> PerplexityScores:
    rows = zip(outcome["quantized"], outcome["tokens"], strict=True)
    return PerplexityScores(
        windows=tuple(WindowLoss(math.inf if nll is None else float(nll), int(tokens)) for nll, tokens in rows),
        words=_positive(side["words"]),
        text_bytes=_positive(side["text_bytes"]),
        context=int(entry["context"]),
        stride=int(entry["stride"]),
        prefix=str(entry["prefix"]),
        text_sha256=str(entry["text_sha256"]),
        seconds=float(side["seconds"]),
        unit="characters" if entry["unit"] == "characters" else "tokens",
    )


def _positive(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"{value} in place of a number of at least 1")
    return int(value)


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _compact(values: Any) -> str:
    return json.dumps(values, allow_nan=False, separators=(",", ":"))
