"""gptqmodel 7.6: GPTQ into the gptq format (version 1), AWQ into gemm. Runs in the environment `gptqmodel`."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any


def config_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The job as arguments of gptqmodel.QuantizeConfig."""
    arguments: dict[str, Any] = {
        "bits": job["bits"],
        "group_size": job["group_size"],
        "sym": job["sym"],
        "lm_head": job["lm_head"],
        "device": job["device"],
        "offload_to_disk": False,
    }
    if job["method"] == "awq":
        return {**arguments, "method": "awq", "format": "gemm", "desc_act": False}
    arguments |= {"method": "gptq", "format": "gptq", "desc_act": job["desc_act"]}
    if job["damp"] is not None:
        arguments["damp_percent"] = job["damp"]
    return arguments


def quantize_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """What GPTQModel.quantize is told besides the samples: its kernel for AWQ has to be named on a CPU."""
    return {"batch_size": 1, **({"backend": "awq_torch"} if job["method"] == "awq" else {})}


def run(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Quantise job["model"] into job["output"]."""
    # One worker on two cores waits for itself and never ends.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, job["threads"] or os.cpu_count() or 2)))
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rows = json.loads(Path(job["tokens"]).read_text())
    samples = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in rows]
    report.note(f"gptqmodel {version('gptqmodel')} reads the model")
    model = GPTQModel.load(job["model"], QuantizeConfig(**config_arguments(job)))
    with report.task("quantise", job["layers"], "layer") as task:
        seen: set[int] = set()

        def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
            if layer_idx not in seen:
                seen.add(layer_idx)
                task.advance()

        model.layer_callback = layer_complete
        options = quantize_arguments(job)
        if "backend" in options:
            options["backend"] = BACKEND(options["backend"])
        model.quantize(samples, **options)
    report.note("gptqmodel writes")
    model.save(job["output"])
    (Path(job["output"]) / "quant_log.csv").unlink(missing_ok=True)  # edgetool.json says more of each module
    made: dict[str, Any] = report.made_by("gptqmodel")
    return made
