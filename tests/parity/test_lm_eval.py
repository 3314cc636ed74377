"""Scores, log-likelihoods and texts are those of upstream's own command line, to the last digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.data import examine
from edgetool.evaluation.harness import measure
from edgetool.evaluation.hf_lm import LazyHFLM
from edgetool.evaluation.loaded import load as load_model
from edgetool.evaluation.records import TaskScores
from edgetool.evaluation.stock_tasks import load
from edgetool.evaluation.tasks import MAIN_TASKS, find_tasks
from edgetool.evaluation.tasks import TASKS as TABLE
from edgetool.progress import NullProgress
from tests.fakes import question_rows as rows
from tests.fakes.tiny_models import make_tiny_model

TASKS = ("arc_easy", "gsm8k_cot")
DATA = Path(os.environ.get("EDGETOOL_DATA_DIR") or Path(__file__).parents[2] / ".." / "shared" / "data")


@dataclass(frozen=True)
class Case:
    """A model, questions, and how both sides are run."""

    model: Path
    data: Path
    dtype: str
    batch_size: int
    limits: dict[str, int]


@dataclass(frozen=True)
class Said:
    """What one side found, by task: figures by upstream's names, and the answers to each question in order."""

    figures: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]


def upstreams_root(data: Path, directory: Path) -> Path:
    """The working directory in which upstream's stock tasks find local data, by hand from the same rows."""
    for hub, config, source, splits in (
        ("allenai/ai2_arc", "ARC-Easy", data / "arc_easy" / "test.jsonl", ("train", "test")),
        ("openai/gsm8k", "main", data / "gsm8k" / "test.jsonl", ("test",)),
    ):
        place = directory / hub
        place.mkdir(parents=True)
        (place / "rows.jsonl").write_bytes(source.read_bytes())
        lines = [f"  - split: {split}\n    path: rows.jsonl" for split in splits]
        (place / "README.md").write_text(
            "\n".join(["---", "configs:", f"- config_name: {config}", "  data_files:", *lines, "---", ""])
        )
    return directory


def by_upstream(case: Case, directory: Path) -> Said:
    root = upstreams_root(case.data, directory / "root")
    said = Said({}, {})
    # one run where the limits are equal: importing and indexing take most of the time
    runs = [list(TASKS)] if len(set(case.limits.values())) == 1 else [[task] for task in TASKS]
    for tasks in runs:
        out = directory / "_".join(tasks)
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"),
            *("--model_args", f"pretrained={case.model},dtype={case.dtype}", "--batch_size", str(case.batch_size)),
            *("--tasks", ",".join(tasks), "--limit", str(case.limits[tasks[0]]), "--output_path", str(out)),
        ]
        environment = {**os.environ, "HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
        assert run.returncode == 0, run.stderr[-3000:]
        (results,) = out.rglob("results_*.json")
        for task in tasks:
            found = json.loads(results.read_text())["results"][task]
            said.figures[task] = {name: value for name, value in found.items() if "," in name}
            (samples,) = out.rglob(f"samples_{task}_*.jsonl")
            said.answers[task] = responses(samples)
    return said


def by_edgetool(case: Case, directory: Path) -> tuple[Said, dict[str, TaskScores]]:
    found, problems = examine(find_tasks(TASKS), case.data)
    assert problems == []
    checkpoint, dtype = Checkpoint.open(case.model), getattr(torch, case.dtype)
    cpu = torch.device("cpu")

    def loaded() -> Any:
        return load_model(checkpoint, cpu, dtype, NullProgress())

    lm = LazyHFLM(checkpoint, loaded, cpu, case.batch_size, None)
    said, scores = Said({}, {}), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Answers.open(directory / "answers.jsonl") as answers:
            for name, data in found.items():
                log = directory / f"{name}.jsonl"
                task = load(data, directory / "cache")
                scores[name] = measure(
                    task, lm, answers, NullProgress(), title="ours", limit=case.limits[name], log=log
                )
                said.figures[name] = dict(scores[name].metrics)
                said.answers[name] = responses(log)
    finally:
        torch.set_num_threads(threads)
    return said, scores


def responses(path: Path) -> list[Any]:
    """What the model said to each question, log-likelihoods as numbers, sorted by prompt."""
    found = []
    for line in map(json.loads, path.read_text().splitlines()):
        prompts = line["arguments"]
        prompt = prompts[0][0] if isinstance(prompts, list) else prompts["gen_args_0"]["arg_0"]
        said = [
            [tuple(str(part) for part in answer) if isinstance(answer, list) else answer for answer in one]
            for one in line["resps"]
        ]
        found.append((prompt, line["filter"], said))
    return sorted(found)


def check(case: Case, tmp_path: Path) -> None:
    theirs, (ours, scores) = by_upstream(case, tmp_path / "theirs"), by_edgetool(case, tmp_path)
    assert ours.answers == theirs.answers
    assert ours.figures == theirs.figures
    for name, limit in case.limits.items():
        assert scores[name].n == limit
        filters = 2 if name == "gsm8k_cot" else 1
        assert len(theirs.answers[name]) == limit * filters
    assert scores["arc_easy"].value == theirs.figures["arc_easy"]["acc,none"]
    assert scores["arc_easy"].stderr == theirs.figures["arc_easy"]["acc_stderr,none"]
    assert scores["gsm8k_cot"].value == theirs.figures["gsm8k_cot"]["exact_match,strict-match"]


def test_a_log_likelihood_and_a_generation_task_of_a_tiny_model(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    model = make_tiny_model(
        tmp_path / "model", "llama", hidden_size=32, layers=1, dtype="float32", max_position_embeddings=8192
    )
    data = rows.write_data(tmp_path / "data")
    check(Case(model, data, "float32", 2, {"arc_easy": 3, "gsm8k_cot": 3}), tmp_path)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data and no EDGETOOL_DATA_DIR")
def test_a_log_likelihood_and_a_generation_task_of_the_demo_model(demo_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    check(Case(demo_model_dir, DATA, "bfloat16", 8, {"arc_easy": 32, "gsm8k_cot": 2}), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data and no EDGETOOL_DATA_DIR")
def test_every_task_but_the_gated_one_runs_on_the_real_data(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    found, problems = examine([TABLE[name] for name in MAIN_TASKS], DATA)
    assert [problem.message.split(":")[0] for problem in problems] == ["gpqa"]
    model = make_tiny_model(
        tmp_path / "model", "llama", hidden_size=32, layers=1, dtype="float32", max_position_embeddings=8192
    )
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=16)
    with Answers.open(tmp_path / "answers.jsonl") as answers:
        assert len(found) == 8
        for name, data in found.items():
            scores = measure(load(data, tmp_path / "cache"), lm, answers, NullProgress(), title="tiny", limit=8)
            assert scores.n == data.questions(8) == (57 * 8 if name == "mmlu" else 8)
            assert len({sample.id for sample in scores.samples}) == scores.n
