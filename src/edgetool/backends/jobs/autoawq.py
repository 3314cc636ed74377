"""autoawq 0.2.9 (archived): AWQ into gemm, on CUDA only. Runs in the environment `autoawq`.

On a CPU it corrupts weights without a word: its saved copy of the state dict is the weights themselves.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def quant_config(job: dict[str, Any]) -> dict[str, Any]:
    """The job as autoawq's quant_config."""
    return {"w_bit": job["bits"], "q_group_size": job["group_size"], "zero_point": not job["sym"], "version": "GEMM"}


def run(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Quantise job["model"] into job["output"]."""
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    if not torch.cuda.is_available():
        report.refuse(
            "ResourceUnavailable", "autoawq corrupts weights without CUDA, and its torch finds no CUDA device"
        )
    torch.manual_seed(job["seed"])
    rows = json.loads(Path(job["tokens"]).read_text())
    report.note(f"autoawq {version('autoawq')} reads the model")
    model = AutoAWQForCausalLM.from_pretrained(job["model"], device_map="auto", safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    with report.task("quantise", 1, "model") as task:  # it has no hook for layers; the log shows them
        model.quantize(
            tokenizer,
            quant_config=quant_config(job),
            calib_data=rows,
            max_calib_samples=len(rows),
            max_calib_seq_len=max(map(len, rows)),
        )
        task.advance()
    model.save_quantized(job["output"], safetensors=True)
    tokenizer.save_pretrained(job["output"])
    made: dict[str, Any] = report.made_by("autoawq")
    return made
