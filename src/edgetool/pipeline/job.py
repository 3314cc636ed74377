"""`edgetool run` from a resolved configuration to a directory with every step's output and one report."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgetool.artifacts import atomic_write, disk_errors
from edgetool.config import Config
from edgetool.errors import EdgetoolError, Stopped, UsageError
from edgetool.pipeline import serving
from edgetool.pipeline.recipe import Recipe, preset, read_recipe
from edgetool.pipeline.record import RunRecord, locked
from edgetool.pipeline.runner import finish, mark_of, plans_of, run_steps
from edgetool.pipeline.work import RUNNING, Planned, Work
from edgetool.progress import Progress
from edgetool.runs import stop_requests

REPORT_NAME = "report.html"

Announce = Callable[[dict[str, Any]], None]


def recipe_of(config: Config) -> Recipe:
    """The recipe that is asked for, with the model and the output that were given in place of its own.

    Raises UsageError where there is none, ConfigError for one that cannot be run.
    """
    settings = config.run
    if not settings.target:
        raise UsageError(
            "run needs a RECIPE, or a MODEL and --preset", "edgetool run demo --preset smoke -o runs/smoke"
        )
    is_recipe = settings.target.lower().endswith(".toml")
    if settings.preset is not None and is_recipe:
        raise UsageError(f"{settings.target} is a recipe, and --preset names another", "leave one of them out")
    if settings.preset is not None:
        recipe = replace(preset(settings.preset, settings.changes), model=settings.target)
    elif is_recipe:
        recipe = read_recipe(Path(settings.target).expanduser(), settings.changes)
    else:
        raise UsageError(
            f"{settings.target!r} is no recipe (a .toml file), and a model needs --preset",
            f"edgetool run {shlex.quote(settings.target)} --preset smoke -o runs/smoke",
        )
    output = str(settings.output) if settings.output is not None else recipe.output
    return replace(recipe, model=settings.model or recipe.model, output=output)


def directory_of(recipe: Recipe) -> Path:
    """The directory of the run; raises UsageError where none is named."""
    if not recipe.output:
        raise UsageError("run needs --output", f"add -o DIR, or output to [run] of {recipe.name}")
    return Path(os.path.normpath(Path(recipe.output).expanduser().absolute()))


def model_of(recipe: Recipe) -> str:
    """The model to start from; raises UsageError where none is named."""
    if not recipe.model:
        raise UsageError(f"{recipe.name} names no model", "add --model MODEL, or model to its [run]")
    return recipe.model


def run_recipe(config: Config, config_file: Path | None, progress: Progress, announce: Announce) -> None:
    """Run the recipe and `announce` its result; with --serve stay as long as the server of its last step.

    Raises any EdgetoolError, with the steps so far in its details.
    """
    started = time.monotonic()
    recipe = recipe_of(config)
    model, directory = model_of(recipe), directory_of(recipe)
    if config.run.serve and not recipe.steps[-1].command.serves:
        raise UsageError(f"the last step of {recipe.name} serves nothing", "leave --serve out")
    RunRecord.read(directory)  # refuses what is not ours before anything is made there
    names = [step.name for step in recipe.steps]
    with locked(directory), stop_requests() as stop, progress.steps(names) as view:
        work = Work(recipe, model, config_file, config, RunRecord.read(directory), view, progress, stop)
        try:
            plans = plans_of(work)
            run_steps(work, plans)
            if config.run.serve:
                _serve(work, plans[work.attempts[-1].rung][-1], started, announce)
            else:
                announce(document(work, _report(work), started))
        except EdgetoolError as error:
            report = None
            if work.results and not isinstance(error, Stopped):
                with contextlib.suppress(EdgetoolError):  # why the run failed is what counts
                    report = _report(work)
            error.details = {**document(work, report, started), **error.details}
            if isinstance(error, Stopped):
                error.hint = again(config, config_file)
            raise


def _serve(work: Work, plan: Planned, started: float, announce: Announce) -> None:
    work.view.state(plan.step.name, RUNNING)
    mark = mark_of(work, plan)
    work.record.begin(plan.step.name, mark)
    with serving.server(work, plan) as server:
        finish(work, plan, mark, server.ended())
        announce({**document(work, _report(work), started), "server": server.public()})
        server.stay(work)


def document(work: Work, report: Path | None, started: float) -> dict[str, Any]:
    """What `edgetool.run/1` says."""
    return {
        "output": str(work.directory),
        "recipe": work.recipe.name,
        "model": work.model,
        "steps": [_step(work, step.name) for step in work.recipe.steps],
        "rung": next((attempt.rung for attempt in work.attempts if attempt.passed), None),
        "attempts": [asdict(attempt) for attempt in work.attempts],
        "report": None if report is None else str(report),
        "seconds": round(time.monotonic() - started, 3),
    }


def _step(work: Work, name: str) -> Mapping[str, Any]:
    result = work.results.get(name)
    return {"name": name, "state": "waiting"} if result is None else result.to_dict()


def _report(work: Work) -> Path:
    from edgetool.pipeline.report import report_page

    path = work.directory / REPORT_NAME
    page = report_page(work).encode()
    with disk_errors(path):
        if not path.is_file() or path.read_bytes() != page:
            atomic_write(path, page)
    return path


def again(config: Config, config_file: Path | None) -> str:
    """The command line that goes on with this run."""
    settings = config.run
    words = ["edgetool", "run", settings.target]
    given = {"--preset": settings.preset, "--model": settings.model, "-o": settings.output, "--config": config_file}
    for option, value in given.items():
        words += [] if value is None else [option, str(value)]
    for change in settings.changes:
        words += ["--set", change]
    return shlex.join([*words, *(["--serve"] if settings.serve else [])])
