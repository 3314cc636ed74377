"""Whether the questions are there: read and checked for all tasks before anything runs, and handed to upstream.

A data directory holds a folder a task with upstream's rows as JSON lines (docs/eval.md). They are written once more, in
the very fields that the stock task reads, as a local dataset of the `datasets` library. Its README says which file is
which split, so the stock task files work on it as they do on the hub's copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput, MissingDependency
from edgetool.evaluation.data_files import WrongLine, numbered_rows
from edgetool.evaluation.data_rows import DATASETS, Dataset, WrongRow
from edgetool.evaluation.tasks import EvalTask

_SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Problem:
    """Why a task cannot run, in one sentence that names it, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True)
class Split:
    """Rows of one part of a dataset in upstream's form: JSON lines, `rows` of them, read from `file`."""

    file: Path
    rows: int
    lines: bytes = field(repr=False)


@dataclass(frozen=True)
class TaskData:
    """The questions of one task. Without `splits` (by part and split) the hub has them, and upstream fetches them."""

    task: EvalTask
    splits: Mapping[tuple[str, str], Split] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """For plans and records: "hub", or the files' folder."""
        if not self.splits:
            return f"hub: {DATASETS[self.task.dataset].hub}"
        return os.path.commonpath([str(split.file.parent) for split in self.splits.values()])

    def questions(self, limit: int | None = None) -> int | None:
        """How many are asked, `limit` of each subtask at most; None where only the hub knows."""
        if not self.splits:
            return None
        measured = DATASETS[self.task.dataset].questions
        counts = [self.splits[config, measured].rows for config in self.task.configs]
        return sum(min(count, limit) if limit else count for count in counts)


def examine(
    tasks: Iterable[EvalTask],
    data_dir: Path | None,
    *,
    num_fewshot: int | None = None,
    token: str | None = None,
    offline: bool = False,
) -> tuple[dict[str, TaskData], list[Problem]]:
    """Data by name of task, and what is wrong with it, for all those of `tasks` that name a dataset. Writes nothing.

    With `data_dir` nothing else is read: no task falls back on the hub in silence. Without, the hub is asked whether it
    gives what is gated (`token`: the user's, None for the one that he logged in with).
    """
    found: dict[str, TaskData] = {}
    problems: list[Problem] = []
    for task in tasks:
        if not task.dataset:
            continue
        try:
            found[task.name] = (
                _from_hub(task, token, offline) if data_dir is None else _from_files(task, data_dir, num_fewshot)
            )
        except _Missing as missing:
            problems.extend(missing.problems)
        except OSError as error:
            message = f"{task.name}: {error.filename or data_dir} cannot be read: {error.strerror}"
            problems.append(Problem(message, "check its permissions"))
    return found, problems


def refuse(problems: Sequence[Problem]) -> None:
    """Raise BadInput with all `problems` at once; do nothing where there are none."""
    if not problems:
        return
    shown = [problem.message for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(f"and {len(problems) - _SHOWN_PROBLEMS} more")
    hints = list(dict.fromkeys(problem.hint for problem in problems))
    details = {"problems": [{"message": problem.message, "hint": problem.hint} for problem in problems]}
    raise BadInput("; ".join(shown), "; ".join(hints[:2]), details)


def local_dataset(data: TaskData, cache_dir: Path) -> Path:
    """Directory for `datasets.load_dataset`, made under `cache_dir` unless the same rows are there already.

    The files are parquet: read from JSON, texts that all look like dates would become dates.
    """
    digest = hashlib.sha256(_readme(data).encode())
    for split in data.splits.values():
        digest.update(hashlib.sha256(split.lines).digest())
    place = cache_dir / "eval" / "data" / f"{data.task.dataset}-{digest.hexdigest()[:24]}"
    if _is_whole(place, data):
        return place
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("this task needs the package pyarrow", "pip install 'edgetool[eval]'") from error
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            for names, split in data.splits.items():
                table = pyarrow.Table.from_pylist([json.loads(line) for line in split.lines.splitlines()])
                pyarrow.parquet.write_table(table, new / _file_name(*names))
            (new / "README.md").write_text(_readme(data))
            new.chmod(0o755)
            if place.exists():
                shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
        except OSError:
            if not _is_whole(place, data):  # otherwise another run was quicker, with the same rows
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return place


def _is_whole(place: Path, data: TaskData) -> bool:
    """Whether no file is missing or torn by a crash: a parquet file ends with its own sign."""
    try:
        return all((place / _file_name(*names)).read_bytes().endswith(b"PAR1") for names in data.splits) and (
            place / "README.md"
        ).read_text() == _readme(data)
    except (OSError, UnicodeDecodeError):
        return False


class _Missing(Exception):
    def __init__(self, *problems: Problem) -> None:
        super().__init__(*(problem.message for problem in problems))
        self.problems = problems


def _from_hub(task: EvalTask, token: str | None, offline: bool) -> TaskData:
    dataset = DATASETS[task.dataset]
    if not dataset.gated or offline:
        return TaskData(task)  # whether it can be had shows when it is loaded, which is before anything runs
    try:
        from huggingface_hub import HfApi, errors
    except ImportError:
        return TaskData(task)
    try:
        HfApi(token=token).auth_check(dataset.hub, repo_type="dataset")
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        message = f"{task.name}: {dataset.hub} is gated, and this user may not read it"
        raise _Missing(Problem(message, dataset.gated)) from None
    except Exception:  # whatever else went wrong, the dataset may lie in the cache
        return TaskData(task)
    return TaskData(task)


def _from_files(task: EvalTask, data_dir: Path, num_fewshot: int | None) -> TaskData:
    dataset = DATASETS[task.dataset]
    folder = data_dir / dataset.folder
    if not folder.is_dir():
        raise _Missing(_no_folder(task, dataset, data_dir, folder))
    splits: dict[tuple[str, str], Split] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for config in task.configs:
        for split in dict.fromkeys((dataset.questions, dataset.examples)):
            if not split:
                continue
            needed = split == dataset.questions or dataset.examples_needed
            try:
                path = _find(folder, config, split, task)
                if path is None and needed:
                    wanted = folder / _wanted(config, split, task)
                    raise _Missing(Problem(f"{task.name}: there is no {wanted}", _put(task, folder)))
                if path is not None:
                    splits[config, split] = _read(path, dataset, task)
                    if split == dataset.questions and path.stem not in (split, config):
                        notes.append(
                            f"{task.name}: {path.name} is a part of {split}, {splits[config, split].rows} rows"
                        )
            except _Missing as missing:
                problems.extend(missing.problems)
    if not problems and num_fewshot:
        problems.extend(_too_few_examples(task, dataset, splits, num_fewshot, folder))
    if problems:
        raise _Missing(*problems)
    return TaskData(task, splits, tuple(notes))


def _no_folder(task: EvalTask, dataset: Dataset, data_dir: Path, folder: Path) -> Problem:
    if not data_dir.is_dir():
        return Problem(f"{task.name}: there is no data directory {data_dir}", "check --data-dir and EDGETOOL_DATA_DIR")
    if dataset.gated:
        return Problem(
            f"{task.name}: its data is gated (its authors ask not to republish it), and there is no {folder}",
            f"{dataset.gated}; then leave --data-dir out, or put {task.configs[0]}.csv of it into {folder}",
        )
    return Problem(f"{task.name}: there is no {folder}", _put(task, folder))


def _put(task: EvalTask, folder: Path) -> str:
    dataset = DATASETS[task.dataset]
    wanted = _wanted(task.configs[0], dataset.questions, task)
    return f"put {wanted} of {dataset.hub} into {folder}, or leave --data-dir out to use the hub"


def _wanted(config: str, split: str, task: EvalTask) -> str:
    if task.dataset == "mmlu":
        return f"{split}/{config}.jsonl"
    return f"{config}.csv" if task.dataset == "gpqa" else f"{split}.jsonl"


def _find(folder: Path, config: str, split: str, task: EvalTask) -> Path | None:
    """The file of a split; also one that says that it is a part of it, such as test_first27.jsonl."""
    exact = folder / _wanted(config, split, task)
    places = [exact, exact.with_suffix(".jsonl")]
    for place in places:
        if place.is_file():
            return place
    parts = sorted(exact.parent.glob(f"{exact.stem}_*.jsonl")) if task.dataset != "mmlu" else []
    if len(parts) > 1:
        names = ", ".join(part.name for part in parts)
        raise _Missing(
            Problem(f"{task.name}: {folder} has several parts of {split}: {names}", "leave one of them there")
        )
    return parts[0] if parts else None


def _too_few_examples(
    task: EvalTask, dataset: Dataset, splits: Mapping[tuple[str, str], Split], wanted: int, folder: Path
) -> Iterator[Problem]:
    if task.upstream.endswith("zeroshot"):  # upstream would go on without examples, and say so in its log only
        hint = "leave --num-fewshot out" + (", or use gpqa_main_n_shot" if task.dataset == "gpqa" else "")
        yield Problem(f"{task.name}: it is asked without examples, --num-fewshot asks for {wanted}", hint)
        return
    if not dataset.examples:  # the task has them itself
        if wanted > task.fewshot:
            yield Problem(
                f"{task.name}: it has {task.fewshot} examples, --num-fewshot asks for {wanted}", "ask for fewer"
            )
        return
    for config in task.configs:
        found = splits.get((config, dataset.examples))
        if found is None:
            place = folder / _wanted(config, dataset.examples, task)
            yield Problem(
                f"{task.name}: --num-fewshot takes its examples from {place}, which is not there",
                f"put it there, or leave --num-fewshot out ({dataset.questions} is never taken for examples)",
            )
        elif found.rows < wanted + (dataset.questions != "test"):  # upstream may draw the question itself, and drops it
            yield Problem(
                f"{task.name}: --num-fewshot asks for {wanted} examples, {found.file} has {found.rows}", "ask for fewer"
            )


def _read(path: Path, dataset: Dataset, task: EvalTask) -> Split:
    """All rows of a file, checked; the first that is wrong is named with its line."""
    lines: list[str] = []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Missing(
            Problem(f"{task.name}: {path} cannot be read: {error.strerror}", "check its permissions")
        ) from error
    try:
        for number, row in numbered_rows(path, data):
            try:
                # ensure_ascii=False: a lone surrogate is no text that a tokenizer takes, and shows here
                lines.append(json.dumps(dataset.read(row), ensure_ascii=False))
                lines[-1].encode()
            except WrongRow as wrong:
                raise WrongLine(number, str(wrong)) from wrong
            except UnicodeEncodeError as wrong:
                raise WrongLine(number, "has half of a surrogate pair, which is no text") from wrong
    except WrongLine as wrong:
        message = f"{task.name}: {path} line {wrong.line} {wrong}"
        raise _Missing(Problem(message, f"each line has to be a row of {dataset.hub} as JSON")) from wrong
    if not lines:
        raise _Missing(Problem(f"{task.name}: {path} is empty", f"it has to have rows of {dataset.hub}"))
    return Split(path, len(lines), ("\n".join(lines) + "\n").encode())


def _file_name(config: str, split: str) -> str:
    return f"{config}.{split}.parquet"


def _readme(data: TaskData) -> str:
    """The README that tells `datasets` which file is which split of which part.

    Stock tasks open their split of examples even where they take none from it. Where it is not there the questions
    stand in for it; `examine` has then refused --num-fewshot.
    """
    dataset = DATASETS[data.task.dataset]
    configs = []
    for config in data.task.configs:
        files = {split: _file_name(config, split) for part, split in data.splits if part == config}
        if dataset.examples:
            files.setdefault(dataset.examples, files[dataset.questions])
        listed = [{"split": split, "path": path} for split, path in sorted(files.items())]
        configs.append({"config_name": config, "data_files": listed})
    return f"---\n{json.dumps({'configs': configs})}\n---\n"  # JSON is YAML
