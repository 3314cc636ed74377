"""`edgetool quantize` from a resolved configuration to a published checkpoint."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import MANIFEST_NAME, OutputDirectory, disk_errors, write_manifest
from edgetool.checkpoints.checkpoint import Checkpoint, read_json_object
from edgetool.checkpoints.formats import FORMATS
from edgetool.checkpoints.sources import ResolvedSource, resolve_configured
from edgetool.config import CommonConfig, QuantizeConfig
from edgetool.errors import Stopped
from edgetool.progress import Progress
from edgetool.quantizers.guards import (
    input_hashes,
    memory_named,
    need_torch,
    nothing_worthless_kept,
    refuse_other_run,
    refuse_quantized,
)
from edgetool.quantizers.prepare import RECORD_SCHEMA, Prepared, calibration_asked, calibration_of
from edgetool.quantizers.recipe import Recipe
from edgetool.runs import memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

LEDGER_NAME = "ledger.jsonl"
_TOKENS_NAME = "calibration.json"
_WORST_SHOWN = 5


def run_quantize(config: QuantizeConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Quantise `config.model` into `config.output`. Returns the result document, or {"plan": ...} for a dry run.

    Raises any EdgetoolError; nothing appears at the output's place unless everything was written and verified.
    """
    started = time.monotonic()
    need_torch()
    out = OutputDirectory(config.output, config.overwrite, config.resume)
    out.check()  # before a model is fetched for nothing
    source = resolve_configured(config.model, common, config.revision, progress)
    checkpoint = Checkpoint.open(source.path)
    refuse_overlap(out, [source.path, Path(config.model)])
    refuse_quantized(checkpoint)
    prepared = Prepared.of(config, checkpoint)
    if config.dry_run:
        return {"plan": prepared.plan}
    with out, nothing_worthless_kept(out, out.partial / LEDGER_NAME):
        finished = out.partial / MANIFEST_NAME
        if finished.is_file():  # killed between the last write and the renaming
            manifest = read_json_object(finished)
            refuse_other_run(out.partial, manifest, config, checkpoint)
        else:
            with stop_requests() as stop, memory_named("quantising the model"):
                manifest = _Run(config, common, source, checkpoint, prepared, out, stop, progress, started).manifest()
            with disk_errors(out.partial):
                write_manifest(out.partial, manifest)
        (out.partial / LEDGER_NAME).unlink(missing_ok=True)
        (out.partial / _TOKENS_NAME).unlink(missing_ok=True)
        out.publish()
    result = dict(manifest["result"])
    result["output"] = str(config.output)
    return result


@dataclass(frozen=True)
class _Run:
    """One run in its partial directory, up to a verified checkpoint and its manifest."""

    config: QuantizeConfig
    common: CommonConfig
    source: ResolvedSource
    checkpoint: Checkpoint
    prepared: Prepared
    out: OutputDirectory
    stop: threading.Event
    progress: Progress
    started: float

    def manifest(self) -> dict[str, Any]:
        """Do everything; the returned document goes into edgetool.json."""
        import torch

        from edgetool.models.devices import fast_dtype
        from edgetool.models.streamed import StreamedModel
        from edgetool.quantizers import assemble, audit, engine
        from edgetool.quantizers.ledger import Ledger
        from edgetool.quantizers.storage import check_weights

        config, prepared, directory = self.config, self.prepared, self.out.partial
        if config.threads:  # else what torch takes: OMP_NUM_THREADS, or one for each core
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        compute_dtype = fast_dtype(prepared.device)
        model = StreamedModel(self.checkpoint, prepared.device, compute_dtype)
        self.progress.note("hashing the source")
        hashes = input_hashes(self.checkpoint)
        identity = {
            "source": hashes,
            "recipe": prepared.recipe.to_dict(),
            "format": config.format,
            "quantize_lm_head": config.quantize_lm_head,
            "calibration": None if prepared.recipe.method == "rtn" else calibration_asked(config),
            "compute": [prepared.device.type, str(compute_dtype), torch.get_num_threads(), torch.__version__],
            "max_shard_size_bytes": config.max_shard_size_bytes,
            "edgetool": __version__,
        }
        with disk_errors(directory):
            ledger = Ledger.open(directory / LEDGER_NAME, identity)
        if not ledger.layers:
            check_weights(self.checkpoint.tensors, prepared.dtype, set(model.map.quantizable()), self.progress)
        try:
            calibration = self._calibration(model)
        except engine.Abandoned:
            raise Stopped("stopped on request before the first layer") from None
        with disk_errors(directory):
            if calibration is not None:
                ledger.settle("calibration_sha256", calibration.sha256)
            job = engine.Job(
                model=model,
                recipe=prepared.recipe,
                format=FORMATS[config.format],
                spec=prepared.spec,
                dtype=prepared.dtype,
                token_ids=None if calibration is None else calibration.token_ids,
                directory=directory,
                quantize_lm_head=config.quantize_lm_head,
                stop_requested=self.stop.is_set,
            )
            if not ledger.assembled:
                try:
                    engine.run(job, ledger, self.progress)
                except engine.Abandoned:
                    raise Stopped(
                        f"stopped on request after {len(ledger.layers)} of {model.map.n_layers} layers, all kept"
                    ) from None
                self._heed_stop("all layers are quantised and kept")
                assemble.assemble(job, config.max_shard_size_bytes, self.progress)
                ledger.append({"assembled": True})
            assemble.remove_working_files(directory)
        self._heed_stop("everything is written and kept, and not yet verified")
        output = Checkpoint.open(directory)
        reports = [report for record in ledger.layers for report in record["modules"]]
        changed = _names_that_may_change(model, output, prepared.recipe)
        verified = audit.audit(
            output,
            self.checkpoint,
            prepared.spec,
            config.format,
            {report["module"]: report["values_crc32"] for report in reports},
            changed,
            prepared.dtype,
            self.progress,
        )
        smoke = audit.smoke(StreamedModel(output, prepared.device, compute_dtype), model, self.progress)
        return self._document(model, output, calibration, hashes, reports, verified, smoke)

    def _heed_stop(self, so_far: str) -> None:
        if self.stop.is_set():
            raise Stopped(f"stopped on request: {so_far}")

    def _calibration(self, model: Any) -> Any:
        if self.prepared.recipe.method == "rtn":
            return None
        kept = self.out.partial / _TOKENS_NAME
        return calibration_of(
            self.config, self.common, self.prepared.tokenizer, lambda: model, kept, self.progress, self.stop.is_set
        )

    def _document(
        self,
        model: Any,
        output: Checkpoint,
        calibration: Any,
        hashes: dict[str, str],
        reports: list[dict[str, Any]],
        verified: dict[str, Any],
        smoke: dict[str, Any],
    ) -> dict[str, Any]:
        from edgetool.quantizers.audit import gpu_peak_bytes

        config, prepared = self.config, self.prepared
        warnings = [
            f"{report['module']}: Cholesky failed at every damping, rounded to nearest instead"
            for report in reports
            if prepared.recipe.method == "gptq" and report["method"] == "rtn"
        ]
        if uncounted := model.map.uncounted(self.checkpoint.tensors):
            warnings.append(
                f"config.json counts {model.map.n_layers} layers: the tensors of layer {uncounted[0]} and "
                f"{len(uncounted) - 1} more were copied as they are"
            )
        if smoke["degenerate"]:
            warnings.append(f"original and quantised model both generate no language: {smoke['degenerate']}")
        worst = sorted(reports, key=lambda report: -report["relative_error"])[:_WORST_SHOWN]
        output_bytes = sum(path.stat().st_size for path in output.weight_files)
        source_bytes = sum(path.stat().st_size for path in self.checkpoint.weight_files)
        peak = memory_peak_bytes()
        seconds = round(time.monotonic() - self.started, 3)
        result = {
            "output": str(config.output),
            "model": config.model,
            "backend": "native",
            "method": config.method,
            "format": config.format,
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": prepared.recipe.desc_act,
            "quantized_modules": len(reports),
            "seconds": seconds,
            "peak_rss_bytes": peak,
            "source_bytes": source_bytes,
            "output_bytes": output_bytes,
            "worst_modules": [{key: w[key] for key in ("module", "relative_error")} for w in worst],
            "smoke": {"prompt": smoke["prompt"], "text": smoke["text"]},
            "warnings": warnings,
        }
        gpu = gpu_peak_bytes(prepared.device)
        if gpu is not None:
            result["peak_gpu_bytes"] = gpu
        return {
            "schema": RECORD_SCHEMA,
            "result": result,
            "source": {"spec": self.source.spec, "provenance": self.source.provenance, "sha256": hashes},
            "calibration": None
            if calibration is None
            else {
                "source": calibration.source,
                "samples": len(calibration.token_ids),
                "seqlen": calibration.token_ids.shape[1],
                "sha256_of_token_ids": calibration.sha256,
            },
            "recipe": prepared.recipe.to_dict(),
            "config": json.loads(config.model_dump_json()),
            "compute": {"device": str(prepared.device), "dtype": str(model.compute_dtype).removeprefix("torch.")},
            "seed": config.seed,
            "tools": tool_versions("torch", "transformers", "tokenizers", "numpy"),
            "modules": reports,
            "verified": verified,
            "files": output.sha256(),
        }


def _names_that_may_change(model: Any, output: Checkpoint, recipe: Recipe) -> set[str]:
    """16-bit tensors that may differ from the source: what AWQ scales, what bias correction shifts."""
    within = {name for name in output.tensors if name.startswith(f"{model.map.prefix}layers.")}
    if recipe.awq_scaling:
        return within
    return {name for name in within if name.endswith(".bias")} if recipe.bias_correction else set()
