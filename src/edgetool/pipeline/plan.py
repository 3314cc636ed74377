"""`--dry-run`: every step with its command line, what it would do, and what it needs; nothing is written."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.config import Config
from edgetool.pipeline.child import Said, failure_of, run_step
from edgetool.pipeline.command_line import inserted
from edgetool.pipeline.job import directory_of, model_of, recipe_of
from edgetool.pipeline.recipe import MODEL
from edgetool.pipeline.record import RunRecord
from edgetool.pipeline.runner import check_ahead, mark_of, plans_of, rung_to_run, unchanged
from edgetool.pipeline.work import Planned, Work
from edgetool.progress import NullProgress, Progress


def dry_run(config: Config, config_file: Path | None, progress: Progress) -> dict[str, Any]:
    """The plan of all steps on the rung that a run would begin with, those that failed before being passed over.

    A step whose input is there is asked for its own plan; of others what follows is said.

    Raises any EdgetoolError that a step's plan ends with; VerificationFailed where every rung has failed before.
    """
    recipe = recipe_of(config)
    record = RunRecord.read(directory_of(recipe))
    stop = threading.Event()
    with NullProgress().steps([]) as view:
        work = Work(recipe, model_of(recipe), config_file, config, record, view, progress, stop)
    plans = plans_of(work)
    rung = rung_to_run(work, plans)
    ready: dict[str, bool] = {MODEL: True}
    sizes: dict[str, int | None] = {MODEL: None}
    rows = []
    for plan in plans[rung]:
        row = _row(work, plan, ready, sizes)
        if row["state"] != "unchanged":
            check_ahead([plan])
        ready[plan.step.name] = row["state"] == "unchanged"
        sizes[plan.step.name] = row["output_bytes"]
        rows.append(row)
    return {
        "recipe": recipe.name,
        "model": work.model,
        "output": str(work.directory),
        "ladder": [dict(changes) for changes in recipe.ladder[rung:]],
        "disk_bytes": sum(row["disk_bytes"] or 0 for row in rows),
        "memory_bytes": max((row["memory_bytes"] or 0 for row in rows), default=0),
        "steps": rows,
    }


def _row(work: Work, plan: Planned, ready: Mapping[str, bool], sizes: Mapping[str, int | None]) -> dict[str, Any]:
    step = plan.step
    row: dict[str, Any] = {
        "name": step.name,
        "state": "to run",
        "memory_bytes": None,
        "disk_bytes": None,
        "output_bytes": None,
        "input_bytes": sizes[step.references[step.command.source]],
        "command": list(plan.shown),
        "plan": None,
    }
    missing = [name for name in dict.fromkeys(step.references.values()) if not ready[name]]
    if missing:
        return {**row, "state": f"after {', '.join(missing)}"}
    known = unchanged(work, step, mark_of(work, plan))
    if known is not None:
        written = sum(int(facts[0]) for facts in work.record.steps[step.name]["files"].values())
        return {**row, "state": "unchanged", "output_bytes": written}
    found = _own_plan(work, plan)
    return {**row, **_figures(found), "plan": found}


def _own_plan(work: Work, plan: Planned) -> dict[str, Any]:
    """What the command's own --dry-run says."""
    there = (
        work.output_of(plan.step).exists() or work.output_of(plan.step).with_name(f"{plan.step.name}.partial").exists()
    )
    options = ["--dry-run", *(["--overwrite"] if there and not plan.step.command.serves else [])]
    said = Said(plan.step, work.view, work.progress)
    with tempfile.TemporaryDirectory(prefix="edgetool-plan-") as scratch:
        log = Path(scratch) / "log"
        ended = run_step(inserted(plan.words, options), said, log, {}, work.stop)
    if ended.exit_code != 0:
        raise failure_of(plan.step, ended.exit_code, ended.document)
    found: dict[str, Any] = ended.document.get("plan", ended.document)
    return found


def _figures(plan: Mapping[str, Any]) -> dict[str, int | None]:
    """Memory and disk of a command's plan. Only quantize needs more disk than its output takes."""
    memory, disk = plan.get("memory"), plan.get("disk")
    sides = [side.get("needed_bytes") for side in plan.get("sides", [])]
    needed = memory.get("needed_bytes") if isinstance(memory, Mapping) else None
    if needed is None:
        needed = max((size for size in sides if size is not None), default=None)
    if isinstance(disk, Mapping):
        return {"memory_bytes": needed, "disk_bytes": disk["needed_bytes"], "output_bytes": disk.get("output_bytes")}
    written = plan.get("output_bytes")
    return {"memory_bytes": needed, "disk_bytes": written, "output_bytes": written}
