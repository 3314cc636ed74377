"""The questions are asked: each task of each side, what was answered before from the ledger of its target."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool.config import Config
from edgetool.errors import Stopped
from edgetool.evaluation import sequential
from edgetool.evaluation.ledgers import Ledgers
from edgetool.evaluation.plan import ORIGINAL, QUANTIZED, Plan, Side, target_id
from edgetool.evaluation.questions import stride_of
from edgetool.evaluation.records import Divergence, PerplexityScores, TaskScores
from edgetool.evaluation.results import Measured, MeasuredPerplexity
from edgetool.evaluation.targets import InProcess
from edgetool.evaluation.tasks import EvalTask
from edgetool.progress import Progress
from edgetool.serving.memory import text_config

DISTRIBUTIONS_NAME = "distributions"


@dataclass
class Found:
    """What has been measured so far: scores by side and task, and what belongs to both sides."""

    scores: dict[str, dict[str, TaskScores]] = field(default_factory=lambda: {ORIGINAL: {}, QUANTIZED: {}})
    perplexity: dict[str, PerplexityScores] = field(default_factory=dict)
    divergence: Divergence | None = None
    early: dict[str, sequential.Stopped] = field(default_factory=dict)

    def measured(self, plan: Plan) -> tuple[dict[str, Measured], MeasuredPerplexity | None]:
        """For `results.document`."""
        names = [task.name for task in plan.tasks if task.name in self.scores[QUANTIZED]]
        tasks = {
            name: Measured(self.scores[QUANTIZED][name], self.scores[ORIGINAL].get(name), self.early.get(name))
            for name in names
        }
        if QUANTIZED not in self.perplexity:
            return tasks, None
        perplexity = MeasuredPerplexity(self.perplexity[QUANTIZED], self.perplexity.get(ORIGINAL), self.divergence)
        return tasks, perplexity


class Measuring:
    """One run over a plan. Answers of checkpoints are kept in edgetool's cache, those of endpoints in `directory`."""

    def __init__(self, config: Config, plan: Plan, directory: Path, progress: Progress, stop: threading.Event) -> None:
        self._config = config
        self._settings = config.eval
        self._plan = plan
        self._directory = directory
        self._progress = progress
        self._stop = stop
        self._ledgers = Ledgers(config.common.cache_dir, directory, progress, self._heed_stop)
        self.found = Found()

    def run(self) -> Found:
        """Everything. Raises any EdgetoolError; what was answered until then stays answered."""
        with contextlib.ExitStack() as held:
            held.callback(self._ledgers.close)
            for side in self._plan.sides:
                held.callback(side.target.release)
            early = [task for task in self._plan.tasks if self._may_stop_early(task)]
            if early:
                self._ledgers.hold(self._plan.sides)
            for task in early:
                self._until_decided(task)
            for side in self._plan.sides:
                for task in self._plan.tasks:
                    if task not in early:
                        self._heed_stop()
                        self._one(side, task)
                side.target.release()
                self._ledgers.close()
        return self.found

    def _one(self, side: Side, task: EvalTask) -> None:
        self._make_room(side)
        if task.kind == "perplexity":
            self._perplexity(side)
        else:
            self.found.scores[side.name][task.name] = self._scores(side, task)

    def _scores(self, side: Side, task: EvalTask, only: list[Any] | None = None) -> TaskScores:
        settings, target = self._settings, side.target
        how: dict[str, Any] = {
            "limit": settings.limit,
            "only": only,
            "chat_template": settings.chat_template,
            "stop": self._stop,
            "log": self._log(side, task),
        }
        if task.framework == "evalplus":
            from edgetool.evaluation import code_tasks

            assert self._plan.sandbox is not None
            problems = self._plan.questions.code[task.name]
            where = (target, self._plan.sandbox, self._ledgers.of(side), self._progress)
            return code_tasks.measure(problems, *where, concurrency=settings.concurrency, **how)
        asked = (target.language_model(), self._ledgers.of(side), self._progress)
        how |= {"title": target.title, "system_prompt": settings.system_prompt}
        if task.kind == "rouge":
            from edgetool.evaluation import rouge

            assert self._plan.questions.rouge is not None
            return rouge.measure(self._plan.questions.rouge, *asked, cache_dir=self._config.common.cache_dir, **how)
        from edgetool.evaluation import harness

        return harness.measure(self._plan.stock[task.name], *asked, **how)

    def _log(self, side: Side, task: EvalTask) -> Path | None:
        if not self._settings.log_samples:
            return None
        folder = self._directory / "samples" / (side.name if len(self._plan.sides) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{task.name}.jsonl"

    def _may_stop_early(self, task: EvalTask) -> bool:
        gate = self._plan.gate
        return (
            self._settings.sequential
            and gate is not None
            and task.kind != "perplexity"
            and bool(gate.clauses_for(task.name))
        )

    def _until_decided(self, task: EvalTask) -> None:
        """Ask in random order until the gate's clauses about `task` are decided, or there are no more questions."""
        import numpy as np

        gate = self._plan.gate
        assert gate is not None
        questions = self._questions(task)
        order = sequential.random_order(len(questions), self._settings.seed)
        for count in sequential.looks(len(questions)):
            asked = [questions[place] for place in order[:count]]
            for side in self._plan.sides:
                self._heed_stop()
                self._make_room(side)
                self.found.scores[side.name][task.name] = self._scores(side, task, asked)
            by_side = {
                name: {sample.id: sample.score for sample in scores[task.name].samples}
                for name, scores in self.found.scores.items()
            }
            one, other = (
                np.array([by_side[name][_id(question)] for question in asked], dtype=np.float64)
                for name in (ORIGINAL, QUANTIZED)
            )
            decided = sequential.look(gate.clauses_for(task.name), task.name, one, other, len(questions))
            if decided is not None:
                self.found.early[task.name] = decided
                self._progress.note(f"{task.name}: the gate is decided after {count} of {len(questions)} questions")
                return

    def _questions(self, task: EvalTask) -> Sequence[Any]:
        """What `only` takes, in upstream's order."""
        limit, found = self._settings.limit, self._plan.questions
        if task.name in self._plan.stock:
            return self._plan.stock[task.name].questions(limit)
        if task.kind == "rouge":
            assert found.rouge is not None
            return [row.id for row in found.rouge.chosen(limit)]
        return [problem.task_id for problem in found.code[task.name].chosen(limit)]

    def _perplexity(self, side: Side) -> None:
        from edgetool.evaluation.perplexity import measure
        from edgetool.evaluation.windows import cut

        settings, target = self._settings, side.target
        text = self._text()
        title = f"{target.title}: perplexity"
        if not isinstance(target, InProcess):
            self.found.perplexity[side.name] = self._perplexity_of_server(side, text, title)
            return
        lm = target.language_model()
        pieces = cut(text, lm.tokenizer, settings.context, stride_of(settings), settings.limit, lm.max_length)
        other = self._plan.side(QUANTIZED if side.name == ORIGINAL else ORIGINAL)
        keep, against = None, None
        if other is not None and isinstance(other.target, InProcess):
            keep, against = self._divergence(side, other, pieces)
        scores, divergence = measure(
            target.loaded, pieces, self._ledgers.of(side), self._progress, title,
            keep=keep, against=against, heed_stop=self._heed_stop,
        )  # fmt: skip
        self.found.perplexity[side.name] = scores
        if against is not None:
            self.found.divergence = divergence
            against.kept.remove()

    def _divergence(self, side: Side, other: Side, pieces: Any) -> tuple[Any, Any]:
        """What the original has to keep, or what the quantised model is compared with."""
        from edgetool.evaluation.divergence import KeptDistributions, chosen_windows
        from edgetool.evaluation.perplexity import Against, divergence_known
        from edgetool.evaluation.windows import cut

        settings, text = self._settings, self._text()
        original = side if side.name == ORIGINAL else other
        assert isinstance(original.target, InProcess)
        tokenizer = other.target.language_model().tokenizer
        if cut(text, tokenizer, settings.context, stride_of(settings), settings.limit).windows != pieces.windows:
            return None, None  # of other tokens there is nothing to compare
        vocabulary = int(text_config(original.target.checkpoint.config).get("vocab_size") or 1)
        chosen = chosen_windows(pieces, vocabulary)
        kept = KeptDistributions(self._directory / DISTRIBUTIONS_NAME, chosen)
        identity = target_id(original.target)
        if side.name == QUANTIZED:
            return None, Against(kept, identity)
        with self._ledgers.glance(other) as answers:
            known = answers is not None and divergence_known(pieces, chosen, identity, answers)
        return (None if known else kept), None

    def _perplexity_of_server(self, side: Side, text: str, title: str) -> PerplexityScores:
        from edgetool.evaluation.perplexity_remote import measure_text, measure_tokens
        from edgetool.evaluation.windows import cut

        settings, ledger = self._settings, self._ledgers.of(side)
        if getattr(side.target, "tokenizer", None) is not None:
            lm = side.target.language_model()
            pieces = cut(text, lm.tokenizer, settings.context, stride_of(settings), settings.limit, lm.max_length)
            return measure_tokens(lm, pieces, ledger, self._progress, title, self._heed_stop)
        client = side.target.client()
        assert client is not None
        return measure_text(
            client.scored, text, hashlib.sha256(text.encode()).hexdigest(), settings.context,
            settings.limit, ledger, self._progress, title,
            concurrency=settings.concurrency, heed_stop=self._heed_stop,
        )  # fmt: skip

    def _text(self) -> str:
        assert self._plan.questions.text is not None
        return self._plan.questions.text.content

    def _make_room(self, side: Side) -> None:
        """Where both models do not fit into memory together, let the other go before this one comes."""
        target = side.target
        if not isinstance(target, InProcess):
            return
        context = self._settings.context if self._plan.questions.text is not None else 0
        for other in self._plan.sides:
            if other is not side and target.needed_bytes(context) > target.free_bytes():
                other.target.release()
        target.check_memory(context)

    def _heed_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped("stopped on request: all answers so far are kept")


def _id(question: Any) -> str:
    return question if isinstance(question, str) else str(question.id)


def manifest_facts(plan: Plan) -> dict[str, Any]:
    """What edgetool.json says of the sides."""
    found: dict[str, Any] = {}
    for side in plan.sides:
        source = side.source
        found[side.name] = {
            **side.target.facts(),
            "spec": source.spec if source else None,
            "provenance": source.provenance if source else None,
        }
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]
