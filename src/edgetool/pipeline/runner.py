"""The steps of a recipe in order: each skipped, gone on with or run; and all again on the next rung if a gate fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetool import __version__
from edgetool.errors import EdgetoolError, Stopped, VerificationFailed
from edgetool.pipeline import identity, serving
from edgetool.pipeline.child import Ended, Said, failure_of, run_step
from edgetool.pipeline.command_line import inserted, path_text
from edgetool.pipeline.recipe import MODEL, Step
from edgetool.pipeline.work import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    UNCHANGED,
    WAITING,
    Attempt,
    Planned,
    StepResult,
    Work,
    planned,
)

_GATE_FAILED = 8


class GateFailed(Exception):
    """The model of this attempt is not good enough: the result of the step that found it."""

    def __init__(self, result: StepResult) -> None:
        super().__init__(result.name)
        self.result = result


def plans_of(work: Work) -> list[list[Planned]]:
    """The steps of every rung. Raises ConfigError for any of them, before anything runs."""
    return [[planned(work, step) for step in work.recipe.on_rung(changes)] for changes in work.recipe.rungs()]


def run_steps(work: Work, plans: Sequence[Sequence[Planned]]) -> None:
    """Run the recipe, climbing its ladder while a gate fails. What became of it is in `work`.

    Raises:
        VerificationFailed: the gate holds on no rung.
        EdgetoolError: a step failed, with its own class and exit code; Stopped where it was stopped.
    """
    rungs = work.recipe.rungs()
    for number, (changes, attempt) in enumerate(zip(rungs, plans, strict=True)):
        mark = _attempt_mark(work, attempt)
        try:
            known = _known_failure(work, mark)
            if known is not None:  # nothing has changed since, so it is not made again
                raise GateFailed(known)
            for position, plan in enumerate(attempt):
                if not work.stays(plan.step):
                    _run_one(work, plan, attempt[position + 1 :])
        except GateFailed as gate:
            work.settle(gate.result)
            work.record.gate_failed(mark, gate.result.to_dict())
            reason = _reason(gate.result)
            work.attempts.append(Attempt(number, changes, False, reason))
            if number + 1 == len(rungs):
                raise _no_rung_left(len(rungs), gate.result) from None
            work.progress.warn(f"{gate.result.name}: {reason}; next rung: {_words(rungs[number + 1])}")
            for step in work.recipe.steps:
                work.results.pop(step.name, None)
                work.view.state(step.name, WAITING)
        else:
            gated = any(plan.step.gated for plan in attempt)
            work.attempts.append(Attempt(number, changes, True, "the gate holds" if gated else None))
            return


def rung_to_run(work: Work, plans: Sequence[Sequence[Planned]]) -> int:
    """The first rung that has not failed before. Raises VerificationFailed where all have."""
    for number, attempt in enumerate(plans):
        failed = _known_failure(work, _attempt_mark(work, attempt))
        if failed is None:
            return number
    assert failed is not None
    raise _no_rung_left(len(plans), failed)


def _known_failure(work: Work, mark: str) -> StepResult | None:
    known = work.record.failed_gates.get(mark)
    return None if known is None else StepResult.from_dict(known)


def finish(work: Work, plan: Planned, mark: str, ended: Ended) -> StepResult:
    """Record a step that has done its work."""
    step = plan.step
    place = None if step.command.serves else path_text(work.output_of(step))
    files: identity.Files = {}
    if not step.command.serves:
        work.view.state(step.name, RUNNING, "hashing what it has written")
        files = identity.hashed(work.output_of(step))
    result = StepResult(step.name, plan.shown, DONE, ended.seconds, 0, place, ended.document, ended.warnings)
    facts = {"identity": mark, "files": files, "content": identity.content_of(files), "done": result.to_dict()}
    work.record.finish(step.name, facts)
    work.settle(result)
    return result


def mark_of(work: Work, plan: Planned) -> str:
    """The hash of everything that decides what a step writes."""
    inputs = {
        key: identity.model_identity(work.model) if name == MODEL else work.record.steps[name]["content"]
        for key, name in plan.step.references.items()
    }
    return identity.step_identity(plan.step.command, plan.config, inputs)


def unchanged(work: Work, step: Step, mark: str) -> StepResult | None:
    """The step's last result where it would do the same again and its output is as it was; else None."""
    known = work.record.steps.get(step.name)
    if known is None or known["identity"] != mark:
        return None
    if not step.command.serves:
        output, verify = work.output_of(step), work.settings.run.verify
        if not identity.is_unchanged(output, known["files"], verify):
            return None
    return StepResult.from_dict({**known["done"], "state": UNCHANGED})


def check_ahead(plans: Iterable[Planned]) -> None:
    """Ask of steps that are to run what can be known before they have an input, so that nothing runs in vain.

    Raises:
        EdgetoolError: tasks or a gate that cannot be, or a package that they need.
    """
    for plan in plans:
        if plan.step.command.name == "eval":
            from edgetool.evaluation.plan import check_usage  # a run in which nothing is to be done needs none of it

            try:
                check_usage(plan.config.eval)
            except EdgetoolError as error:
                raise failure_of(plan.step, error.exit_code, {**vars(error), "type": error.type_name}) from error


def _run_one(work: Work, plan: Planned, following: Sequence[Planned]) -> None:
    step = plan.step
    if work.stop.is_set():
        raise Stopped(f"stopped on request before step {step.name}")
    mark = mark_of(work, plan)
    known = unchanged(work, step, mark)
    if known is not None:
        work.settle(known)
        return
    check_ahead([plan, *following])
    output = work.output_of(step)
    resume = work.record.begun.get(step.name) == mark and output.with_name(output.name + ".partial").is_dir()
    work.record.begin(step.name, mark)
    work.view.state(step.name, RUNNING, "going on" if resume else "")
    place = None if step.command.serves else path_text(output)
    try:
        ended = serving.check(work, plan) if step.command.serves else _run_command(work, plan, resume)
    except EdgetoolError as error:
        said = {"type": error.type_name, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        work.settle(StepResult(step.name, plan.shown, _state(error), None, error.exit_code, place, said))
        raise
    if ended.exit_code == 0:
        finish(work, plan, mark, ended)
        return
    failure = failure_of(step, ended.exit_code, ended.document)
    result = StepResult(
        step.name,
        plan.shown,
        _state(failure),
        ended.seconds,
        ended.exit_code,
        place,
        ended.document,
        ended.warnings,
    )
    if ended.exit_code == _GATE_FAILED and step.gated and ended.document.get("gate"):
        raise GateFailed(result)
    work.settle(result)
    if not isinstance(failure, Stopped):
        failure.hint = "; ".join(filter(None, [failure.hint, f"log: {path_text(work.log_of(step))}"]))
    raise failure


def _state(error: EdgetoolError) -> str:
    return STOPPED if isinstance(error, Stopped) else FAILED


def _run_command(work: Work, plan: Planned, resume: bool) -> Ended:
    output = work.output_of(plan.step)
    there = output.exists() or (not resume and output.with_name(output.name + ".partial").exists())
    words = inserted(plan.words, [*(["--resume"] if resume else []), *(["--overwrite"] if there else [])])
    return run_step(words, Said(plan.step, work.view, work.progress), work.log_of(plan.step), {}, work.stop)


def _attempt_mark(work: Work, plans: Sequence[Planned]) -> str:
    """The hash of everything that decides an attempt: the model, and the settings of all steps up to the last gate."""
    last = max((number for number, plan in enumerate(plans) if plan.step.gated), default=-1)
    steps = [identity.step_identity(p.step.command, p.config, p.step.references) for p in plans[: last + 1]]
    return identity.digest([__version__, identity.model_identity(work.model), steps])


def _reason(failed: StepResult) -> str:
    found = failed.result or {}
    return str((found.get("gate") or {}).get("reason") or found.get("message"))


def _no_rung_left(rungs: int, failed: StepResult) -> VerificationFailed:
    said = f"step {failed.name}: the gate does not hold: {_reason(failed)}"
    if rungs > 1:
        said = f"step {failed.name}: the gate holds on none of {rungs} rungs; on the last: {_reason(failed)}"
    return VerificationFailed(said, "change the ladder of the recipe, or its gate")


def _words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items())
