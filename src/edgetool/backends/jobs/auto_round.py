"""auto-round 0.16: rounding learned by signed gradients, into the gptq format. Runs in the environment `auto-round`."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROWS_AT_ONCE = 8


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The job as arguments of auto_round.AutoRound; rtn is its rounding without a step of learning."""
    return {
        "bits": job["bits"],
        "group_size": job["group_size"],
        "sym": job["sym"],
        "seed": job["seed"],
        "device_map": job["device"],
        "batch_size": ROWS_AT_ONCE,
        **({"iters": 0} if job["method"] == "rtn" else {}),
        **({"layer_config": {"lm_head": {"bits": job["bits"]}}} if job["lm_head"] else {}),
    }


def run(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Quantise job["model"] into job["output"]."""
    import torch
    from auto_round import AutoRound
    from auto_round.compressors import orchestrator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    report.note(f"auto-round {version('auto-round')} reads the model")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["compute_dtype"]))
    rows = torch.tensor(json.loads(Path(job["tokens"]).read_text()))
    dataset = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, ROWS_AT_ONCE)]
    with report.task("quantise", job["layers"], "layer") as task:

        class Reporting(orchestrator.tqdm):  # type: ignore[misc]  # its bar over layers is the only sign of life that it gives
            def update(self, n: float = 1) -> Any:
                task.advance(n)
                return super().update(n)

        orchestrator.tqdm = Reporting
        rounding = AutoRound(
            model, tokenizer=tokenizer, dataset=dataset, nsamples=len(rows), seqlen=rows.shape[1], **arguments(job)
        )
        made_in = Path(job["output"] + "-made")
        rounding.quantize_and_save(str(made_in), format="auto_gptq")
    # it writes into a directory below the one it is given, with a name of its own choice
    next(made_in.rglob("config.json")).parent.rename(job["output"])
    shutil.rmtree(made_in, ignore_errors=True)
    tokenizer.save_pretrained(job["output"])
    made: dict[str, Any] = report.made_by("auto-round")
    return made
