"""Values that have to be looked up: tasks, environments, jobs, running servers. Looking makes and changes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from edgetool import config

Found = Iterator[tuple[str, str]]
"""A value, and what it is."""

_LATEST_JOBS = 50


def _models(_path: tuple[str, ...]) -> Found:
    yield "demo", "SmolLM2-135M, to try things with"
    yield "hf:", "a model of the Hugging Face hub, org/name"
    yield "ms:", "a model of ModelScope, org/name"


def _tasks(_path: tuple[str, ...]) -> Found:
    from edgetool.evaluation.tasks import TASKS

    for task in TASKS.values():
        yield task.name, task.about


def _environments(_path: tuple[str, ...]) -> Found:
    from edgetool.backends.environments import RECIPES

    for recipe in RECIPES.values():
        yield recipe.name, recipe.purpose


def _jobs(path: tuple[str, ...]) -> Found:
    """The latest first; to be cancelled only those that run."""
    from edgetool.jobs.store import RUNNING, JobStore

    for job in JobStore(config.load("jobs", {}, complete=False).jobs.directory).jobs(_LATEST_JOBS):
        if path[-1:] != ("cancel",) or job.state == RUNNING:
            yield str(job.id), f"{job.state}: {shlex.join(job.command)}"


def _servers(_path: tuple[str, ...]) -> Found:
    from edgetool.serving.registry import Registry

    directory = config.load("serve_gpu", {}, complete=False).serve_gpu.state_dir
    for record in Registry(directory).records() if directory.is_dir() else ():
        yield record.name, f"{record.state}: {record.model}"


def _urls(_path: tuple[str, ...]) -> Found:
    from edgetool.serving.registry import Registry

    directory = config.load("serve_gpu", {}, complete=False).serve_gpu.state_dir
    for record in Registry(directory).records() if directory.is_dir() else ():
        for server in record.servers:
            yield str(server["url"]), record.name


SOURCES: dict[str, Callable[[tuple[str, ...]], Found]] = {
    "models": _models,
    "tasks": _tasks,
    "environments": _environments,
    "jobs": _jobs,
    "servers": _servers,
    "urls": _urls,
}
"""By the names that config_values.Suggest uses; each takes the names of the command that is being typed."""
