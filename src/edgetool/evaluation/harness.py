"""One task of lm-evaluation-harness asked of one model, by upstream's own code from the prompt to the score."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.records import Sample, TaskScores
from edgetool.evaluation.remembering import Remembering
from edgetool.evaluation.stock_tasks import Question, StockTask, quiet
from edgetool.progress import Progress

_BOOTSTRAPS = 100_000
"""Upstream's default, for the standard errors that have no formula."""


def measure(
    stock: StockTask,
    lm: Any,
    answers: Answers,
    progress: Progress,
    *,
    title: str,
    limit: int | None = None,
    only: Sequence[Question] | None = None,
    chat_template: bool = False,
    system_prompt: str | None = None,
    stop: threading.Event | None = None,
    log: Path | None = None,
) -> TaskScores:
    """Ask `lm` (an `LM` of lm-evaluation-harness) the questions of `stock` and score what it says.

    title: of the model, for progress. limit: the first questions of each subtask. only: these questions, in place
    of `limit`; which examples are drawn at random for a prompt depends on which are asked.
    stop: once set, Stopped is raised after the batch at hand. log: file of JSON lines to write, one for each sample and
    each of upstream's filters, with prompt and answer.

    Raises BadInput where a chat template is asked for and the model has none, or where it can take fewer tokens than
    the task generates.
    """
    from lm_eval import evaluate

    check_template(lm, title, chat_template)
    _check_length(lm, title, stock)
    asked = Remembering(lm, answers, progress, f"{title}: {stock.task.name}", stop)
    questions = {(question.subtask, question.index): question for question in only or stock.questions(limit)}
    leaves, samples = dict(stock.leaves), None
    if only is not None:
        samples = _by_subtask(only)
        leaves = {name: leaf for name, leaf in leaves.items() if name in samples}
    for leaf in leaves.values():
        leaf.set_fewshot_seed(seed=stock.seed)
    with quiet(), _warnings_shown(progress):
        found = evaluate(
            lm=asked,
            task_dict={"tasks": leaves, "groups": dict(stock.groups), "group_map": {}},
            limit=limit if samples is None else None,
            samples=samples,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
            system_instruction=system_prompt,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    if asked.not_numbers:
        progress.warn(
            f"{title}: {asked.not_numbers} answers of {stock.task.name} are NaN: a broken model, a score of chance"
        )
    if log is not None:
        _write_log(found["samples"], questions, log)
    return _scores(stock, found, questions, asked, lm)


def check_template(lm: Any, title: str, wanted: bool) -> None:
    """Raise BadInput where a chat template is `wanted` and the model is known to have none."""
    tokenizer = getattr(lm, "tokenizer", None)
    if wanted and tokenizer is not None and getattr(tokenizer, "chat_template", "unknown") is None:
        raise BadInput(f"{title} has no chat template, and one is asked for", "leave --chat-template out")


def _check_length(lm: Any, title: str, stock: StockTask) -> None:
    longest = getattr(lm, "max_length", None)
    if stock.task.kind != "generation" or not isinstance(longest, int):
        return
    for leaf in stock.leaves.values():
        asked = (leaf.config.generation_kwargs or {}).get("max_gen_toks")
        wanted = asked or getattr(lm, "max_gen_toks", None) or 0
        if wanted >= longest:
            raise BadInput(
                f"{stock.task.name} generates up to {wanted} tokens, and {title} takes {longest} with the question",
                "raise --max-length, or leave this task out",
            )


def _by_subtask(questions: Sequence[Question]) -> dict[str, list[int]]:
    # Upstream asks them in the order of the rows whatever the list's order is, but numbers them by the list.
    chosen: defaultdict[str, set[int]] = defaultdict(set)
    for question in questions:
        chosen[question.subtask].add(question.index)
    return {subtask: sorted(indices) for subtask, indices in chosen.items()}


def _scores(
    stock: StockTask, found: Any, questions: dict[tuple[str, int], Question], asked: Remembering, lm: Any
) -> TaskScores:
    task = stock.task
    name, _, kind = task.metric.partition(",")
    key, deviation = f"{name},{kind or 'none'}", f"{name}_stderr,{kind or 'none'}"
    samples = tuple(_samples(found["samples"], questions, name, kind or "none"))
    results = found["results"]
    top = results[task.upstream]
    metrics = {label: float(value) for label, value in top.items() if "," in label and _is_number(value)}
    for group in stock.groups:
        if group != task.upstream and group in results:
            metrics |= {f"{group} {key}": float(results[group][key])} if key in results[group] else {}
    stderr = top.get(deviation)
    return TaskScores(
        task=task.name,
        metric=task.metric,
        n=len(samples),
        value=float(top[key]),
        stderr=float(stderr) if _is_number(stderr) else None,
        samples=samples,
        metrics=metrics,
        groups={leaf: float(results[leaf][key]) for leaf in stock.leaves if leaf in results} if task.is_group else {},
        seconds=asked.seconds,
        generated_tokens=count_tokens(lm, asked.generated) if task.kind == "generation" else None,
        version=stock.version(),
    )


def _samples(logged: Any, questions: dict[tuple[str, int], Question], name: str, kind: str) -> Iterator[Sample]:
    for subtask, examples in logged.items():
        more: defaultdict[int, dict[str, float]] = defaultdict(dict)
        score: dict[int, float] = {}
        for example in examples:
            index = example["doc_id"]
            for metric in example["metrics"]:
                value = example[metric]
                if (metric, example["filter"]) == (name, kind):
                    score[index] = float(value)
                elif _is_number(value):
                    label = metric if example["filter"] == "none" else f"{metric},{example['filter']}"
                    more[index][label] = float(value)
        for index, value in score.items():
            yield Sample(questions[subtask, index].id, subtask, value, more[index])


def _is_number(value: object) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def count_tokens(lm: Any, texts: Sequence[str]) -> int | None:
    """Tokens of `texts` by the model's tokenizer; None where that is not known."""
    tokenizer = getattr(lm, "tokenizer", None)
    if not callable(tokenizer):
        return None
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _write_log(logged: Any, questions: dict[tuple[str, int], Question], path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    with disk_errors(path), path.open("w") as stream:
        for subtask, examples in logged.items():
            for example in examples:
                line = {
                    "id": questions[subtask, example["doc_id"]].id,
                    "group": subtask,
                    "filter": example["filter"],
                    **{metric: example[metric] for metric in example["metrics"]},
                    "target": example["target"],
                    "arguments": example["arguments"],
                    "resps": example["resps"],
                    "filtered_resps": example["filtered_resps"],
                    "doc": example["doc"],
                }
                stream.write(json.dumps(line, default=handle_non_serializable) + "\n")


class _Warnings(logging.Handler):
    """Hands what upstream's models warn of to the run's progress, each kind once."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        kind = re.sub(r"\d+", "#", record.getMessage())[:60]  # the same warning with other lengths
        if kind not in self._said:
            self._said.add(kind)
            self._progress.warn(f"lm-eval: {' '.join(record.getMessage().split())[:300]}")


@contextmanager
def _warnings_shown(progress: Progress) -> Iterator[None]:
    log = logging.getLogger("lm_eval.models")
    handler, level, propagate = _Warnings(progress), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
