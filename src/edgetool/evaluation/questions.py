"""The questions of all tasks of a run: found and checked together, so that one message names everything missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgetool.config import Config, EvalConfig
from edgetool.errors import BadInput
from edgetool.evaluation.code_data import CodeData, Dataset
from edgetool.evaluation.code_data import find as find_code
from edgetool.evaluation.code_tasks import describe as describe_code
from edgetool.evaluation.data import Problem, TaskData, examine, refuse
from edgetool.evaluation.rouge import RougeData
from edgetool.evaluation.rouge import describe as describe_rouge
from edgetool.evaluation.rouge import find as find_rouge
from edgetool.evaluation.tasks import EvalTask
from edgetool.evaluation.windows import read_text

if TYPE_CHECKING:
    from edgetool.evaluation.stock_tasks import StockTask
    from edgetool.progress import Progress

Found = TypeVar("Found")

_OWN_TEXT = Path(__file__).parent.parent / "data" / "held_out.txt"
_USUAL_TEXT = Path("text") / "wikitext-2-raw.test.txt"


@dataclass(frozen=True)
class Text:
    """The text of the task perplexity. `name` is that of its file."""

    name: str
    content: str = field(repr=False)

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8, 64 hex digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Questions:
    """lm-evaluation-harness' rows and EvalPlus' problems by name of task; text and references where they are wanted."""

    data: dict[str, TaskData] = field(default_factory=dict)
    code: dict[str, CodeData] = field(default_factory=dict)
    text: Text | None = None
    rouge: RougeData | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said about them."""
        rows = [note for one in self.data.values() for note in one.notes]
        return (*rows, *(note for other in self.code.values() for note in other.notes))

    def count(self, task: EvalTask, limit: int | None) -> int | None:
        """How many questions a task has; None where that is not known before it runs."""
        if task.name in self.data:
            return self.data[task.name].questions(limit)
        own = self.rouge if task.kind == "rouge" else self.code.get(task.name)
        return None if own is None else len(own.chosen(limit))

    def source(self, task: EvalTask, settings: EvalConfig) -> str | None:
        """Where they come from, for plans and records."""
        if task.name in self.data:
            return self.data[task.name].source
        if task.name in self.code:
            return str(self.code[task.name].path)
        if task.kind == "rouge" and self.rouge is not None:
            return str(self.rouge.path)
        if task.kind == "perplexity" and self.text is not None:
            return f"{self.text.name}, windows of {settings.context} tokens every {stride_of(settings)}"
        return None

    def facts(self, task: EvalTask, settings: EvalConfig, stock: dict[str, StockTask]) -> dict[str, Any]:
        """What decides the scores of a task besides the model, for the profile."""
        if task.name in stock:
            return stock[task.name].facts(settings.limit)
        if task.name in self.code:
            return describe_code(self.code[task.name], settings.limit)
        if task.kind == "rouge":
            assert self.rouge is not None
            return describe_rouge(self.rouge, settings.limit)
        assert self.text is not None
        return {
            "framework": "edgetool",
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "context": settings.context,
            "stride": stride_of(settings),
        }


def find_questions(config: Config, tasks: tuple[EvalTask, ...]) -> Questions:
    """The questions of all tasks. Raises BadInput that names all that is missing or wrong."""
    settings, common = config.eval, config.common
    data, problems = examine(
        tasks,
        settings.data_dir,
        num_fewshot=settings.num_fewshot,
        token=common.token(),
        offline=common.offline,
    )

    def attempt(name: str, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except BadInput as error:
            problems.append(Problem(f"{name}: {error.message}", error.hint or "see docs/eval.md"))
            return None

    code: dict[str, CodeData] = {}
    text: Text | None = None
    rouge: RougeData | None = None
    for task in tasks:
        if task.kind == "code":
            dataset: Dataset = "humaneval" if task.name == "humaneval" else "mbpp"
            found = attempt(task.name, lambda name=dataset: _code(name, config))  # type: ignore[misc]
            code |= {task.name: found} if found is not None else {}
        elif task.kind == "perplexity":
            text = attempt(task.name, lambda: _text(settings))
        elif task.kind == "rouge":
            rouge = attempt(task.name, lambda: find_rouge(settings.rouge_data, settings.data_dir))
    refuse(problems)
    return Questions(data, code, text, rouge)


def load_stock(config: Config, questions: Questions, progress: Progress) -> dict[str, StockTask]:
    """lm-evaluation-harness' tasks with their questions, by name."""
    if not questions.data:
        return {}
    from edgetool.evaluation.stock_tasks import load

    settings, common = config.eval, config.common
    found = {}
    with progress.task("load tasks", len(questions.data), "task") as bar:
        for name, one in questions.data.items():
            found[name] = load(
                one,
                common.cache_dir,
                num_fewshot=settings.num_fewshot,
                seed=settings.seed,
                token=common.token(),
                offline=common.offline,
            )
            bar.advance(note=name)
    return found


def stride_of(settings: EvalConfig) -> int:
    """Tokens between two windows of perplexity."""
    return settings.stride or max(1, settings.context // 2)


def _code(dataset: Dataset, config: Config) -> CodeData:
    return find_code(dataset, config.eval.data_dir, cache_dir=config.common.cache_dir, offline=config.common.offline)


def _text(settings: EvalConfig) -> Text:
    path = settings.text
    if path is None:
        usual = None if settings.data_dir is None else settings.data_dir / _USUAL_TEXT
        path = usual if usual is not None and usual.is_file() else _OWN_TEXT
    return Text(path.name, read_text(path))
