"""HumanEval+ and MBPP+: a model writes functions, and EvalPlus's tests judge them in a sandbox."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgetool.artifacts import disk_errors
from edgetool.errors import BackendFailed, ResourceUnavailable, Stopped
from edgetool.evaluation.answers import Answers, key_of
from edgetool.evaluation.code_data import CodeData, CodeProblem
from edgetool.evaluation.code_decoders import MAX_NEW_TOKENS, Coder, EndpointCoder, LoadedCoder
from edgetool.evaluation.records import Sample, TaskScores
from edgetool.evaluation.sandbox import Limits, Outcome, Sandbox
from edgetool.evaluation.sandbox_choice import open_sandbox
from edgetool.progress import Progress

if TYPE_CHECKING:
    from edgetool.evaluation.targets import Target

LIMITS = Limits(wall_s=1800.0, cpu_s=1800, memory_bytes=9 << 30)
"""EvalPlus gives each of the two sets of tests a minute at most; the reference solutions of MBPP+ take up to two. It
allows a process 4 GiB, and pages that the judging process shares with the one that it judges count twice."""
_RUNNER = Path(__file__).with_name("code_runner.py")
_LOOK_S = 0.2
SKIPPED = "skipped"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Verdict:
    """What EvalPlus says of an answer.

    base, plus: "pass", "fail" or "timeout", and plus "skipped" where base has failed. why: where judging was ended.
    """

    solution: str
    base: str
    plus: str
    why: str | None = None

    @property
    def passes_base(self) -> bool:
        """Right on the dataset's own tests."""
        return self.base == "pass"

    @property
    def passes_plus(self) -> bool:
        """Right on those and on EvalPlus's."""
        return self.base == self.plus == "pass"


def open_code_sandbox(*, unsafe: bool = False) -> Sandbox:
    """A sandbox in which EvalPlus runs, proven by a trial. Its `warnings` are to be shown.

    Raises BadInput as root where there is no isolation, unless `unsafe`; BackendFailed where nothing works.
    """
    return open_sandbox(_RUNNER, readable=[Path(place) for place in _import_places()], limits=LIMITS, unsafe=unsafe)


def describe(data: CodeData, limit: int | None = None) -> dict[str, Any]:
    """What decides the scores besides the model: for the profile and the record."""
    return {
        "framework": "evalplus",
        "version": version("evalplus"),
        "problems": len(data.chosen(limit)),
        "data_sha256": data.sha256(limit),
        "max_new_tokens": MAX_NEW_TOKENS,
        "sanitized": True,
    }


def measure(
    data: CodeData,
    target: Target,
    sandbox: Sandbox,
    answers: Answers,
    progress: Progress,
    *,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    chat_template: bool = False,
    concurrency: int = 1,
    stop: threading.Event | None = None,
    log: Path | None = None,
) -> TaskScores:
    """Let `target` write the functions of `data` and judge them.

    limit: the first problems only; only: these task ids, in place of `limit`. concurrency: requests to an endpoint at
    once. stop: once set, Stopped is raised after the problem at hand. log: file of JSON lines to write, one a problem.

    Texts and verdicts that `answers` know are not made again; verdicts that a limit gave are not kept, since another
    time it may not be met.
    Raises BadInput where a chat template is asked for and there is none, and what the target raises.
    """
    problems = data.chosen(limit, only)
    work = _Work(target.title, data.dataset, progress, stop or threading.Event(), answers)
    texts = _texts(work, problems, target, chat_template, concurrency)
    verdicts = _verdicts(work, problems, [text.whole for text in texts], sandbox)
    if log is not None:
        _write_log(log, problems, texts, verdicts)
    samples = tuple(
        Sample(problem.task_id, data.dataset, float(verdict.passes_plus), {"base": float(verdict.passes_base)})
        for problem, verdict in zip(problems, verdicts, strict=True)
    )
    n = len(samples)
    plus = sum(sample.score for sample in samples) / n
    base = sum(sample.more["base"] for sample in samples) / n
    return TaskScores(
        task=data.dataset,
        metric="plus",
        n=n,
        value=plus,
        stderr=math.sqrt(plus * (1 - plus) / (n - 1)) if n > 1 else None,
        samples=samples,
        metrics={"base": base, "plus": plus},
        seconds=sum(text.seconds for text in texts) if concurrency == 1 else work.seconds,
        generated_tokens=sum(text.tokens or 0 for text in texts) if all(t.tokens is not None for t in texts) else None,
        version=describe(data, limit),
    )


@dataclass(frozen=True)
class _Text:
    """What a model wrote; `whole`: with the prompt where it completes one. seconds: 0 when it was known."""

    whole: str
    tokens: int | None
    seconds: float


@dataclass
class _Work:
    """What all steps of one task on one target share."""

    title: str
    dataset: str
    progress: Progress
    stop: threading.Event
    answers: Answers
    seconds: float = 0.0

    def each(
        self, name: str, items: Sequence[_Item], before: int, threads: int, act: Callable[[_Item], _Result]
    ) -> Iterator[tuple[_Item, _Result]]:
        """`act` on each item in `threads` threads (one: in this one), with progress; Stopped when that is asked for."""
        with self.progress.task(f"{self.title}: {name}", before + len(items), "problem", before=before) as bar:
            if threads == 1:
                for item in items:
                    self._heed_stop(name)
                    yield item, act(item)
                    bar.advance()
                return
            with ThreadPoolExecutor(threads, "code") as pool:
                waiting: dict[Future[_Result], _Item] = {}
                rest = iter(items)
                try:
                    while True:
                        if not self.stop.is_set():  # else those under way are waited for, and kept
                            for item in itertools.islice(rest, threads - len(waiting)):
                                waiting[pool.submit(act, item)] = item
                        if not waiting:
                            self._heed_stop(name)
                            return
                        done, _ = wait(waiting, _LOOK_S, FIRST_COMPLETED)
                        for future in done:
                            yield waiting.pop(future), future.result()
                            bar.advance()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)

    def _heed_stop(self, name: str) -> None:
        if self.stop.is_set():
            raise Stopped(f"stopped on request in {self.title}: {name}: all answers so far are kept")


def _texts(work: _Work, problems: Sequence[CodeProblem], target: Target, chat: bool, concurrency: int) -> list[_Text]:
    prompts = {problem.task_id: problem.prompt.strip() + "\n" for problem in problems}  # as evalplus.codegen does
    client = target.client()
    kind = "server" if client is not None else "model"

    def key(problem: CodeProblem) -> str:
        asked = {"dataset": work.dataset, "chat": chat, "tokens": MAX_NEW_TOKENS, "of": kind}
        return key_of("evalplus text", version("evalplus"), asked, prompts[problem.task_id])

    found: dict[str, _Text] = {}
    for problem in problems:
        known = work.answers.get(key(problem))
        if known is not None:
            found[problem.task_id] = _Text(known["text"], known["tokens"], 0.0)
    missing = [problem for problem in problems if problem.task_id not in found]
    if missing:
        coder: Coder
        if client is not None:
            coder, threads = EndpointCoder(client, work.dataset, chat), concurrency
        else:
            loaded = target.loaded()
            assert loaded is not None
            coder, threads = LoadedCoder(loaded, work.dataset, chat, target.title), 1

        def write(problem: CodeProblem) -> _Text:
            began = time.monotonic()
            prompt = prompts[problem.task_id]
            text = coder.write(prompt)
            seconds = time.monotonic() - began
            return _Text(prompt + text if coder.completes else text, coder.count(text), seconds)

        began = time.monotonic()
        try:
            with coder.ready():
                for problem, text in work.each(work.dataset, missing, len(found), threads, write):
                    work.answers.put(key(problem), {"text": text.whole, "tokens": text.tokens})
                    found[problem.task_id] = text
        finally:
            work.answers.flush()
            work.seconds = time.monotonic() - began
    return [found[problem.task_id] for problem in problems]


def _verdicts(work: _Work, problems: Sequence[CodeProblem], texts: Sequence[str], sandbox: Sandbox) -> list[Verdict]:
    pairs = list(zip(problems, texts, strict=True))

    def key(pair: tuple[CodeProblem, str]) -> str:
        return key_of("evalplus verdict", version("evalplus"), work.dataset, pair[0].row, pair[1])

    found: dict[str, Verdict] = {}
    for pair in pairs:
        known = work.answers.get(key(pair))
        if known is not None:
            found[pair[0].task_id] = Verdict(**known)
    missing = [pair for pair in pairs if pair[0].task_id not in found]
    threads = max(1, (os.cpu_count() or 2) // 2)  # EvalPlus's own number: tests of its size are timed

    def act(pair: tuple[CodeProblem, str]) -> Verdict:
        return judge(sandbox, work.dataset, *pair, stopped=work.stop.is_set)

    try:
        for pair, verdict in work.each(f"tests of {work.dataset}", missing, len(found), threads, act):
            found[pair[0].task_id] = verdict
            if verdict.why is None and "timeout" not in (verdict.base, verdict.plus):
                kept = {"solution": verdict.solution, "base": verdict.base, "plus": verdict.plus}
                work.answers.put(key(pair), kept)
    finally:
        work.answers.flush()
    if work.stop.is_set() and any(verdict.why == "stopped" for verdict in found.values()):
        raise Stopped(f"stopped on request in {work.title}: {work.dataset}, tests: all answers so far are kept")
    return [found[problem.task_id] for problem in problems]


def judge(
    sandbox: Sandbox,
    dataset: str,
    problem: CodeProblem,
    text: str,
    *,
    limits: Limits | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Verdict:
    """EvalPlus's verdict on one text, sanitised. Code that ends the judging process itself has failed.

    Raises BackendFailed where the problem's own reference solution could not be run, ResourceUnavailable where others
    take the machine's memory.
    """
    job = {"dataset": dataset, "row": problem.row, "text": text, "path": _import_places()}
    outcome = sandbox.run(_RUNNER, stdin=json.dumps(job).encode(), limits=limits, stopped=stopped)
    said: dict[str, Any] = {}
    for line in outcome.output.split(b"\n")[:-1]:
        said |= json.loads(line)
    if outcome.returncode == 0 and outcome.ended_by is None and "verdict" in said:
        return Verdict(**said["verdict"])
    if outcome.ended_by == "stopped":
        return Verdict(text, "fail", SKIPPED, "stopped")
    if outcome.ended_by == "machine":
        raise ResourceUnavailable(
            f"the machine ran out of memory while an answer to {problem.task_id} was tested",
            "end other programs, then run the same command again: all answers so far are kept",
        )
    answer_seen = b'"answer"' in outcome.output
    if said.get("stage") != "answer" and (outcome.ended_by is not None or not answer_seen):
        raise BackendFailed(
            f"{dataset}: the reference solution of {problem.task_id} could not be run: {_how(outcome)}",
            "a smaller --limit leaves it out; EvalPlus needs about 4 GiB of memory",
        )
    return Verdict(text, "timeout" if outcome.ended_by == "time" else "fail", SKIPPED, _how(outcome))


def _how(outcome: Outcome) -> str:
    last = outcome.errors.strip().rpartition("\n")[2]
    return f"it ended with {outcome.ended_by or outcome.returncode}" + (f" ({last})" if last else "")


def _import_places() -> list[str]:
    """Directories from which evalplus and what it needs are imported here."""
    from importlib.util import find_spec

    found = [find_spec(name) for name in ("evalplus", "numpy", "psutil", "tree_sitter_python")]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin))


def _write_log(
    path: Path, problems: Sequence[CodeProblem], texts: Sequence[_Text], verdicts: Sequence[Verdict]
) -> None:
    with disk_errors(path), path.open("w") as stream:
        for problem, text, verdict in zip(problems, texts, verdicts, strict=True):
            line = {
                "id": problem.task_id,
                "plus": verdict.passes_plus,
                "base": verdict.passes_base,
                "plus_status": verdict.plus,
                "base_status": verdict.base,
                "why": verdict.why,
                "prompt": problem.prompt,
                "text": text.whole,
                "solution": verdict.solution,
            }
            stream.write(json.dumps(line) + "\n")
