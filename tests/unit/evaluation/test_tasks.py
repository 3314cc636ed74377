"""The table of tasks says of upstream what upstream's own files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetool.errors import ConfigError
from edgetool.evaluation.data_rows import DATASETS
from edgetool.evaluation.tasks import MAIN_TASKS, MMLU_SUBJECTS, TASKS, EvalTask, find_tasks

HARNESS = [task for task in TASKS.values() if task.framework == "lm-eval"]


def stock_config(task: EvalTask, name: str) -> dict[str, Any]:
    """A task file as upstream's own index reads it, with what it includes."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    directory = Path(lm_eval.tasks.__file__).parent / task.files
    entry = TaskManager(include_defaults=False, include_path=str(directory)).task_index[name]
    assert entry.cfg is not None
    return entry.cfg


def leaves(task: EvalTask) -> list[str]:
    return [f"mmlu_{subject}" for subject in task.configs] if task.is_group else [task.upstream]


@pytest.mark.parametrize("task", HARNESS, ids=lambda task: task.name)
def test_dataset_splits_kind_and_metric_are_those_of_the_stock_task_file(task: EvalTask) -> None:
    dataset = DATASETS[task.dataset]
    for name, config in list(zip(leaves(task), task.configs, strict=True))[:3]:
        stock = stock_config(task, name)
        assert stock["dataset_path"] == dataset.hub
        assert (stock.get("dataset_name") or "default") == config
        assert (stock.get("test_split") or stock.get("validation_split")) == dataset.questions
        if not (stock.get("fewshot_config") or {}).get("samples"):
            assert (stock.get("fewshot_split") or stock.get("training_split")) == dataset.examples
        assert stock["output_type"] == {"loglikelihood": "multiple_choice", "generation": "generate_until"}[task.kind]
        assert (stock.get("num_fewshot") or 0) == task.fewshot
        metric, _, kind = task.metric.partition(",")
        assert metric in {entry["metric"] for entry in stock["metric_list"]}
        if kind:
            assert kind in {entry["name"] for entry in stock["filter_list"]}


def test_mmlu_has_the_subjects_of_upstreams_group() -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    directory = Path(lm_eval.tasks.__file__).parent / TASKS["mmlu"].files
    index = TaskManager(include_defaults=False, include_path=str(directory)).task_index
    subjects = {entry.cfg["dataset_name"] for entry in index.values() if entry.cfg and "dataset_name" in entry.cfg}
    assert set(MMLU_SUBJECTS) == subjects
    assert len(MMLU_SUBJECTS) == 57
    assert all(TASKS[f"mmlu_{subject}"].upstream in index for subject in MMLU_SUBJECTS)


def test_names_are_found_in_order_and_once_with_dashes_and_capitals_forgiven() -> None:
    found = find_tasks(["MMLU", "arc-easy", "perplexity", "arc_easy", " gpqa_diamond_zeroshot"])
    assert [task.name for task in found] == ["mmlu", "arc_easy", "perplexity", "gpqa_diamond_zeroshot"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("arc_esy", "arc_easy"),
        ("gsm8k", "gsm8k_cot"),
        ("human-eval", "humaneval"),
        ("hellswag", "hellaswag"),
        ("mmlu_anatom", "mmlu_anatomy"),
        ("gpqa_main", "gpqa_main_zeroshot"),
        ("perplexty", "perplexity"),
    ],
)
def test_an_unknown_task_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no task is called '{typed}'") as refused:
        find_tasks(["arc_easy", typed])
    assert refused.value.hint == f"did you mean {meant}?"
    assert all(name in refused.value.message for name in MAIN_TASKS)


def test_nothing_like_a_task_and_no_task_at_all_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="no task is called 'zzzz'"):
        find_tasks(["zzzz"])
    with pytest.raises(ConfigError, match="no task is named"):
        find_tasks([])
