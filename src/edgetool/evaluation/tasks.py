"""What can be measured: one table from the names that users type to upstream's tasks, metrics and data.

Standard library only: `--dry-run` and error messages need no framework.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edgetool.errors import ConfigError

Framework = Literal["lm-eval", "evalplus", "edgetool"]
Kind = Literal["loglikelihood", "generation", "code", "perplexity", "rouge"]

_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions"""
MMLU_SUBJECTS: tuple[str, ...] = tuple(_SUBJECTS.split())


@dataclass(frozen=True)
class EvalTask:
    """One thing to measure.

    name: what users type. metric: the main metric as upstream calls it, with its filter where upstream has several.
    dataset: which of data.DATASETS it reads, and `configs` which parts of it; empty for tasks with data of their own.
    upstream: lm-eval's task or group, and `files` the directory of its task files in lm_eval/tasks.
    fewshot: examples before each question where nothing else is asked; None where they are part of the task.
    """

    name: str
    framework: Framework
    kind: Kind
    metric: str
    about: str
    dataset: str = ""
    configs: tuple[str, ...] = ()
    upstream: str = ""
    files: str = ""
    fewshot: int = 0

    @property
    def is_group(self) -> bool:
        """Whether it is measured subtask by subtask, with a limit that holds for each."""
        return len(self.configs) > 1


def _choices(name: str, metric: str, files: str, dataset: str, config: str, about: str) -> EvalTask:
    return EvalTask(name, "lm-eval", "loglikelihood", metric, about, dataset, (config,), name, files)


def _maths(name: str, dataset: str, about: str) -> EvalTask:
    metric = "exact_match,strict-match"  # the first of upstream's two ways to find the answer, and the published one
    return EvalTask(name, "lm-eval", "generation", metric, about, dataset, ("main",), name, dataset, fewshot=8)


def _gpqa() -> Iterable[EvalTask]:
    for part in ("main", "diamond", "extended"):
        for variant in ("zeroshot", "n_shot"):
            about = f"GPQA {part}, choices weighed by likelihood"
            yield _choices(f"gpqa_{part}_{variant}", "acc", f"gpqa/{variant}", "gpqa", f"gpqa_{part}", about)
        name, config = f"gpqa_{part}_cot_zeroshot", (f"gpqa_{part}",)
        about = f"GPQA {part}, reasoning first"
        metric = "exact_match,flexible-extract"  # nothing in this prompt asks for the form that strict-match wants
        yield EvalTask(name, "lm-eval", "generation", metric, about, "gpqa", config, name, "gpqa/cot_zeroshot")


_MAIN = (
    _choices("arc_easy", "acc", "arc", "arc_easy", "ARC-Easy", "grade-school science"),
    _choices("arc_challenge", "acc_norm", "arc", "arc_challenge", "ARC-Challenge", "grade-school science, harder"),
    _maths("gsm8k_cot", "gsm8k", "grade-school mathematics, 8 worked examples"),
    _maths("gsm8k_platinum_cot", "gsm8k_platinum", "gsm8k_cot with its wrong answers corrected"),
    _choices("hellaswag", "acc_norm", "hellaswag", "hellaswag", "default", "which sentence comes next"),
    EvalTask(
        "mmlu", "lm-eval", "loglikelihood", "acc", "57 subjects of school and university", "mmlu", MMLU_SUBJECTS,
        "mmlu", "mmlu/default",
    ),
    # The tag that upstream calls gpqa is 15 variants of the same questions. This one has the set that the paper calls
    # main (twice as many questions as diamond, so narrower intervals) and needs neither a chat model nor generation.
    EvalTask(
        "gpqa", "lm-eval", "loglikelihood", "acc", "graduate science (gpqa_main_zeroshot)", "gpqa", ("gpqa_main",),
        "gpqa_main_zeroshot", "gpqa/zeroshot",
    ),
    _choices("boolq", "acc", "super_glue/boolq", "boolq", "boolq", "yes or no, answered from a passage"),
    _choices("openbookqa", "acc_norm", "openbookqa", "openbookqa", "main", "elementary science facts"),
    EvalTask("humaneval", "evalplus", "code", "plus", "Python functions, EvalPlus's tests"),
    EvalTask("mbpp", "evalplus", "code", "plus", "short Python programs, EvalPlus's tests"),
    EvalTask("perplexity", "edgetool", "perplexity", "perplexity", "how well a text is predicted"),
    EvalTask("rouge", "edgetool", "rouge", "rougeL", "ROUGE-L against references of your own"),
)  # fmt: skip

_PARTS = (
    *_gpqa(),
    *(
        _choices(f"mmlu_{subject}", "acc", "mmlu/default", "mmlu", subject, f"MMLU, {subject.replace('_', ' ')} only")
        for subject in MMLU_SUBJECTS
    ),
)

MAIN_TASKS: tuple[str, ...] = tuple(task.name for task in _MAIN)
"""The names that help and documentation list; TASKS has parts and variants of them too."""

TASKS: dict[str, EvalTask] = {task.name: task for task in (*_MAIN, *_PARTS)}


def find_tasks(names: Iterable[str]) -> tuple[EvalTask, ...]:
    """The tasks of these names, each once, in order. Dashes and capitals are forgiven.

    Raises ConfigError for the first name that is no task, with the nearest that is one.
    """
    found: dict[str, EvalTask] = {}
    for name in names:
        plain = name.strip().lower().replace("-", "_")
        if plain not in TASKS:
            nearest = _nearest(plain)
            raise ConfigError(
                f"no task is called {name!r}; there are {', '.join(MAIN_TASKS)}, gpqa_<set>_<way> and mmlu_<subject>",
                f"did you mean {nearest}?" if nearest else "docs/eval.md says what each of them measures",
            )
        found[plain] = TASKS[plain]
    if not found:
        raise ConfigError("no task is named", f"--tasks arc_easy,perplexity (there are {', '.join(MAIN_TASKS)})")
    return tuple(found.values())


def _nearest(name: str) -> str | None:
    # gsm8k is nearer to gsm8k_cot than any measure of edits says
    begun = [task for task in TASKS if len(name) > 2 and task.startswith(name)]
    close = difflib.get_close_matches(name, MAIN_TASKS, 1) or difflib.get_close_matches(name, TASKS, 1)
    return next(iter([*begun, *close]), None)
