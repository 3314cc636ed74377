"""Upstream's own task files with their questions loaded, ready to be asked of any number of models."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable
from edgetool.evaluation.data import TaskData, local_dataset
from edgetool.evaluation.data_rows import DATASETS
from edgetool.evaluation.tasks import EvalTask

PYTHON_SEED, NUMPY_SEED = 0, 1234
"""What upstream's command line seeds the global generators with; a task that shuffles choices (GPQA) uses them."""

_OURS = "edgetool_eval"
_OF_THIS_MACHINE = ("dataset_path", "dataset_kwargs")


@dataclass(frozen=True)
class Question:
    """One sample. index: its row among the subtask's, as upstream counts them. id: as in `records.Sample`."""

    subtask: str
    index: int
    id: str


@dataclass(frozen=True)
class StockTask:
    """A task of lm-evaluation-harness. `leaves`: its subtasks by name, upstream's objects. `groups`: likewise."""

    task: EvalTask
    leaves: Mapping[str, Any]
    groups: Mapping[str, Any]
    seed: int

    def questions(self, limit: int | None = None) -> tuple[Question, ...]:
        """The questions in upstream's order, the first `limit` of each subtask."""
        field = DATASETS[self.task.dataset].ids
        found: list[Question] = []
        taken: set[str] = set()
        for name, leaf in self.leaves.items():
            docs = leaf.eval_docs
            count = min(len(docs), limit) if limit else len(docs)
            own = docs[field][:count] if field and field in leaf.features else [None] * count
            for index in range(count):
                plain = f"{name}:{index}"
                named = str(own[index]) if own[index] and str(own[index]) not in taken else plain
                taken.add(named)
                found.append(Question(name, index, named))
        return tuple(found)

    def facts(self, limit: int | None = None) -> dict[str, Any]:
        """What decides the scores beside the model, as JSON values for the profile: `version` and the rows.

        rows_sha256 is of the rows that are asked, with those that examples are taken from where there are any.
        """
        rows = sha256()
        for name, leaf in self.leaves.items():
            docs = leaf.eval_docs
            rows.update(_canonical([name, list(docs.select(range(min(len(docs), limit))) if limit else docs)]))
            if leaf.config.num_fewshot:
                rows.update(_canonical(list(leaf.sampler.df or [])))
        return self.version() | {"questions": len(self.questions(limit)), "rows_sha256": rows.hexdigest()}

    def version(self) -> dict[str, Any]:
        """Upstream's versions and settings; config_sha256 is of the task file as upstream reads it."""
        from importlib.metadata import version

        configs = {name: _config(leaf) for name, leaf in self.leaves.items()}
        groups = {name: [group.version, sorted(group.child_names)] for name, group in self.groups.items()}
        fewshot = sorted({int(leaf.config.num_fewshot) for leaf in self.leaves.values()})
        return {
            "framework": "lm-eval",
            "framework_version": version("lm_eval"),
            "upstream": self.task.upstream,
            "versions": dict(sorted({name: leaf.VERSION for name, leaf in self.leaves.items()}.items())),
            "num_fewshot": fewshot[0] if len(fewshot) == 1 else fewshot,
            "metric": self.task.metric,
            "seed": self.seed,
            "config_sha256": sha256(_canonical([configs, groups])).hexdigest(),
        }


def load(
    data: TaskData,
    cache_dir: Path,
    *,
    num_fewshot: int | None = None,
    seed: int = 1234,
    token: str | None = None,
    offline: bool = False,
) -> StockTask:
    """Load the stock task and its questions: those of `data`, or the hub's where it has none.

    `num_fewshot` replaces the task's number of examples before a question; `seed` draws them (upstream's --seed).
    `token`, `offline`: for the hub, the user's token, and whether only its cache on this machine may be used.
    Raises MissingDependency without lm-eval, BadInput or ResourceUnavailable where the hub does not give questions.
    """
    task = data.task
    with quiet():
        manager_class, directory = _manager(task)
        random.seed(PYTHON_SEED)
        _seed_numpy()
        if data.splits:
            loaded = _load_local(data, cache_dir, manager_class, directory)
        else:
            manager = manager_class(include_defaults=False, include_path=str(directory))
            loaded = _load_from_hub(task, manager, token, offline)
        leaves = dict(loaded["tasks"])
        for leaf in leaves.values():
            if num_fewshot is not None:
                leaf.set_config(key="num_fewshot", value=num_fewshot)
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
    return StockTask(task, leaves, {name: group for name, group in loaded["groups"].items() if name != _OURS}, seed)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no log of upstream's: the progress of a run is shown by the run itself."""
    try:
        from tqdm import std
    except ImportError as error:
        raise _no_lm_eval() from error
    before = std.tqdm.__init__
    log = logging.getLogger("lm_eval")
    level = log.level

    def silent(bar: Any, *args: Any, **options: Any) -> None:
        before(bar, *args, **{**options, "disable": True})

    std.tqdm.__init__ = silent
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        std.tqdm.__init__ = before
        log.setLevel(level)


def _manager(task: EvalTask) -> tuple[Any, Path]:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise _no_lm_eval() from error
    # Only this task's own files are indexed: all of upstream's 14,000 take 12 s.
    return lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent / task.files


def _no_lm_eval() -> MissingDependency:
    return MissingDependency("this task needs the package lm-eval", "pip install 'edgetool[eval]'")


def _seed_numpy() -> None:
    import numpy as np

    np.random.seed(NUMPY_SEED)


def _load_local(data: TaskData, cache_dir: Path, manager_class: Any, directory: Path) -> Any:
    """The stock task, reading from the disk.

    A group of our own names it and says where its dataset lies, which is how upstream lets a group change its members.
    Upstream finds a local dataset by the working directory too, but that belongs to the whole process.
    """
    task = data.task
    arrow = cache_dir / "eval" / "arrow"
    place = local_dataset(data, cache_dir)
    with disk_errors(arrow), tempfile.TemporaryDirectory() as scratch:
        member = {
            "group" if task.is_group else "task": task.upstream,
            "dataset_path": str(place.resolve()),
            "dataset_kwargs": {"cache_dir": str(arrow.resolve())},
        }
        ours = Path(scratch) / "group.yaml"
        ours.write_text(json.dumps({"group": _OURS, "task": [member]}))  # JSON is YAML
        manager = manager_class(include_defaults=False, include_path=[str(directory), scratch])
        return manager.load([_OURS])


def _load_from_hub(task: EvalTask, manager: Any, token: str | None, offline: bool) -> Any:
    hub = DATASETS[task.dataset].hub
    gated = DATASETS[task.dataset].gated
    from datasets.exceptions import DatasetNotFoundError

    try:
        with _hub(token, offline):
            return manager.load([task.upstream])
    except DatasetNotFoundError as error:
        reason = "it is gated, and this user may not read it" if gated else str(error).splitlines()[0]
        raise BadInput(f"{task.name}: {hub} cannot be had: {reason}", gated or "give files with --data-dir") from error
    except _connection_errors() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResourceUnavailable(
            f"{task.name}: {hub} cannot be had from the hub{' cache (offline)' if offline else ''}: {reason}",
            "check the network and HF_ENDPOINT, or give files with --data-dir (docs/eval.md)",
        ) from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the hub's library lets through; it has changed from httpx to httpx2."""
    clients = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return (OSError, ValueError, *(importlib.import_module(name).HTTPError for name in clients))


@contextmanager
def _hub(token: str | None, offline: bool) -> Iterator[None]:
    """The user's token and wish for no network, in the only places where the `datasets` library looks for them."""
    import datasets.config
    import huggingface_hub.constants

    modules = (datasets.config, huggingface_hub.constants)
    before = os.environ.get("HF_TOKEN"), [module.HF_HUB_OFFLINE for module in modules]
    if token is not None:
        os.environ["HF_TOKEN"] = token
    for module in modules:
        module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or offline
    try:
        yield
    finally:
        for module, value in zip(modules, before[1], strict=True):
            module.HF_HUB_OFFLINE = value
        if token is not None:
            os.environ.pop("HF_TOKEN", None)
            if before[0] is not None:
                os.environ["HF_TOKEN"] = before[0]


def _config(leaf: Any) -> dict[str, Any]:
    config = dict(leaf.dump_config())
    for key in _OF_THIS_MACHINE:
        config.pop(key, None)
    config["metadata"] = {key: value for key, value in config.get("metadata", {}).items() if key != "config_source"}
    return config


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_source).encode()


def _source(value: Any) -> str:
    """Functions of task files count by what they do."""
    return inspect.getsource(value) if callable(value) else repr(value)
