"""`edgetool eval` from a resolved configuration to a finished output, a plan, or a comparison of finished runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import MANIFEST_NAME, OutputDirectory, atomic_write, disk_errors, write_manifest
from edgetool.config import Config
from edgetool.errors import BackendFailed, BadInput, EdgetoolError, ResourceUnavailable, Stopped, VerificationFailed
from edgetool.evaluation.compare import RESULTS_NAME, compare, read_results, write_results
from edgetool.evaluation.dry_run import dry_run
from edgetool.evaluation.ledgers import ANSWERS_NAME
from edgetool.evaluation.measuring import DISTRIBUTIONS_NAME, Found, Measuring, manifest_facts
from edgetool.evaluation.plan import Plan, check_usage, make_plan, target_id
from edgetool.evaluation.report import report_page
from edgetool.evaluation.results import document, shown
from edgetool.ledger import RunLedger
from edgetool.progress import Progress
from edgetool.runs import memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

LEDGER_NAME = "run.jsonl"
REPORT_NAME = "report.html"
RECORD_SCHEMA = "edgetool.eval-record/1"
_RESUMABLE = (Stopped, ResourceUnavailable, BackendFailed)
_TOOLS = ("torch", "transformers", "lm_eval", "evalplus", "datasets", "rouge-score", "jieba", "numpy")


def run_eval(config: Config, progress: Progress) -> dict[str, Any]:
    """Do what `config.eval` asks for; returns the result document, or {"plan": ...} for a dry run.

    Raises any EdgetoolError; a gate that does not hold is for `gate_failure`, since the result is shown first.
    """
    settings = config.eval
    if settings.compare is not None:
        return _compared(config)
    check_usage(settings)
    if settings.dry_run:
        return {"plan": dry_run(config, progress)}
    started = time.monotonic()
    assert settings.output is not None
    out = OutputDirectory(settings.output, settings.overwrite, settings.resume)
    if not (out.output / MANIFEST_NAME).is_file():
        out.check()  # before a model is fetched for nothing
    with stop_requests() as stop:
        if settings.threads is not None:
            import torch

            torch.set_num_threads(settings.threads)
        plan = make_plan(config, stop.is_set, progress)
        for note in (*plan.questions.notes, *(plan.sandbox.warnings if plan.sandbox else ())):
            progress.warn(note)
        identity = _identity(config, plan)
        finished = None if settings.overwrite else _finished(out.output, identity)
        if finished is not None:
            progress.note(f"{out.output} has these results already")
            return {**shown(finished), "output": str(settings.output), "reused": True}
        for side in plan.sides:
            if side.source is not None:
                refuse_overlap(out, [side.source.path])
        with out, _kept_where_useful(out):
            with disk_errors(out.partial):
                RunLedger.open(out.partial / LEDGER_NAME, identity)
            found = Measuring(config, plan, out.partial, progress, stop).run()
            _publish(config, plan, out, found, identity, started)
    # as it was written: what is printed now is what a later run reads
    return {**shown(read_results(out.output)), "output": str(settings.output), "reused": False}


def _publish(
    config: Config, plan: Plan, out: OutputDirectory, found: Found, identity: dict[str, Any], started: float
) -> None:
    tasks, perplexity = found.measured(plan)
    facts = {side.name: side.target.facts() for side in plan.sides}
    result = document(
        plan.profile.to_dict(),
        facts["quantized"],
        facts.get("original"),
        tasks,
        perplexity,
        plan.gate,
        round(time.monotonic() - started, 3),
        config.eval.seed,
    )
    directory = out.partial
    with disk_errors(directory):
        write_results(directory / RESULTS_NAME, result)
        atomic_write(directory / REPORT_NAME, report_page(result).encode())
        manifest = {
            "schema": RECORD_SCHEMA,
            "identity": identity,
            "sides": manifest_facts(plan),
            "profile": plan.profile.to_dict(),
            "config": json.loads(config.eval.model_dump_json()),
            "tools": tool_versions(*_TOOLS),
            "seconds": result["seconds"],
            "peak_rss_bytes": memory_peak_bytes(),
            "verified": None if result["gate"] is None else {"gate": result["gate"]},
        }
        write_manifest(directory, manifest)
        for name in (LEDGER_NAME, ANSWERS_NAME):
            (directory / name).unlink(missing_ok=True)
    out.publish()


def _identity(config: Config, plan: Plan) -> dict[str, Any]:
    """What a run must have in common with one that it goes on with, or whose results it takes."""
    settings = config.eval
    return {
        "profile": plan.profile.to_dict(),
        "sides": {side.name: {**side.target.identity, "id": target_id(side.target)} for side in plan.sides},
        "gate": settings.gate,
        "sequential": settings.sequential,
        "log_samples": settings.log_samples,
        "edgetool": __version__,
    }


def _finished(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The results of a finished run of the same in `output`, None where there is none.

    Raises BadInput where another run's are there.
    """
    manifest = output / MANIFEST_NAME
    if not manifest.is_file():
        return None
    try:
        known = json.loads(manifest.read_bytes())["identity"]
        sides, profile = known["sides"], known["profile"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"output {output} exists already", "add --overwrite to replace it, or choose another") from None
    if json.loads(json.dumps(identity)) == known:
        return read_results(output)
    if sides != json.loads(json.dumps(identity["sides"])):
        other = "of other models"
    elif profile != json.loads(json.dumps(identity["profile"])):
        other = "of another profile (other tasks, data or options)"
    else:
        other = "with another gate or other options"
    raise BadInput(
        f"output {output} holds a run {other}", "add --overwrite to replace it, or choose another: answers are kept"
    )


def _compared(config: Config) -> dict[str, Any]:
    settings = config.eval
    assert settings.compare is not None
    found = compare(*settings.compare, settings.gate, settings.seed)
    if settings.output is not None and not settings.dry_run:
        out = OutputDirectory(settings.output, settings.overwrite)
        refuse_overlap(out, list(settings.compare))
        with out, disk_errors(out.partial):
            write_results(out.partial / RESULTS_NAME, found)
            atomic_write(out.partial / REPORT_NAME, report_page(found).encode())
            compared = [str(path) for path in settings.compare]
            record = {"schema": RECORD_SCHEMA, "compared": compared, "tools": tool_versions("numpy")}
            write_manifest(out.partial, record)
            out.publish()
    return {**shown(found), "output": None if settings.output is None else str(settings.output)}


def gate_failure(result: dict[str, Any]) -> VerificationFailed | None:
    """What is to be raised after `result` of `run_eval` was shown: its gate does not hold. None where all is well."""
    gate = result.get("gate")
    if not gate or gate["passed"]:
        return None
    where = f"the results are in {result['output']}" if result.get("output") else None
    return VerificationFailed(f"the gate {gate['expression']!r} does not hold: {gate['reason']}", where, result)


@contextmanager
def _kept_where_useful(out: OutputDirectory) -> Iterator[None]:
    """Remove the partial directory of a run that fails, unless there is something in it to go on with.

    That is what an endpoint has answered, and distributions that wait to be compared; answers of checkpoints are in the
    cache, and are found there by any run. What was asked for and cannot be done leaves nothing.
    """
    fresh = not out.resuming
    try:
        yield
    except BaseException as error:
        hopeless = isinstance(error, EdgetoolError) and not isinstance(error, _RESUMABLE)
        useful = any(_has_content(out.partial / name) for name in (ANSWERS_NAME, DISTRIBUTIONS_NAME))
        if not useful or (fresh and hopeless):
            out.discard()
        raise


def _has_content(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)
