"""Runs of the engine on tiny models, without the command around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.progress import NullProgress
from edgetool.quantizers import assemble, engine
from edgetool.quantizers.audit import audit
from edgetool.quantizers.ledger import Ledger
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.storage import model_dtype
from tests.unit.models.reference import streamed


@dataclass
class Run:
    """A quantised checkpoint in `directory`, and what the engine says it wrote."""

    source: Path
    directory: Path
    job: engine.Job
    ledger: Ledger

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report for record in self.ledger.layers for report in record["modules"]]

    def audit(self, directory: Path | None = None, changed: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        expected = {report["module"]: report["values_crc32"] for report in self.reports}
        output, source = Checkpoint.open(directory or self.directory), Checkpoint.open(self.source)
        job = self.job
        return audit(output, source, job.spec, job.format.name, expected, changed, job.dtype, NullProgress())


def job_of(
    source: Path,
    directory: Path,
    recipe: Recipe,
    *,
    format_name: str = "gptq",
    token_ids: Tensor | None = None,
    lm_head: bool = False,
    stop_requested: Any = lambda: False,
) -> engine.Job:
    model = streamed(source)
    directory.mkdir(exist_ok=True)
    return engine.Job(
        model=model,
        recipe=recipe,
        format=FORMATS[format_name],
        spec=Spec(recipe.bits, recipe.group_size, recipe.sym, recipe.desc_act),
        dtype=model_dtype(model.checkpoint.config, model.checkpoint.tensors),
        token_ids=token_ids,
        directory=directory,
        quantize_lm_head=lm_head,
        stop_requested=stop_requested,
    )


def finished_run(source: Path, directory: Path, recipe: Recipe, *, max_shard_bytes: int = 10**9, **options: Any) -> Run:
    """Quantise all of `source` into `directory`, up to the assembled checkpoint."""
    job = job_of(source, directory, recipe, **options)
    ledger = Ledger.open(directory / "ledger.jsonl", {})
    engine.run(job, ledger, NullProgress())
    assemble.assemble(job, max_shard_bytes, NullProgress())
    return Run(source, directory, job, ledger)
