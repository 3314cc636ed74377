"""auto-gptq 0.7.1 (archived): GPTQ into the gptq format, on CUDA only. Runs in the environment `auto-gptq`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def config_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The job as arguments of auto_gptq.BaseQuantizeConfig."""
    arguments = {key: job[key] for key in ("bits", "group_size", "sym", "desc_act")}
    # without desc_act its groups would be taken in the order of the columns all the same
    arguments |= {"static_groups": False, "true_sequential": True}
    return arguments if job["damp"] is None else {**arguments, "damp_percent": job["damp"]}


def run(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Quantise job["model"] into job["output"]."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from transformers import AutoTokenizer

    if not torch.cuda.is_available():
        report.refuse("ResourceUnavailable", "auto-gptq quantises on CUDA only, and its torch finds no CUDA device")
    torch.manual_seed(job["seed"])
    rows = json.loads(Path(job["tokens"]).read_text())
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    report.note(f"auto-gptq {version('auto-gptq')} reads the model")
    model = AutoGPTQForCausalLM.from_pretrained(
        job["model"], BaseQuantizeConfig(**config_arguments(job)), torch_dtype=torch.float16
    )
    with report.task("quantise", 1, "model") as task:  # it has no hook for layers; the log shows them
        model.quantize(examples, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
        task.advance()
    model.save_quantized(job["output"], use_safetensors=True)
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["output"])
    made: dict[str, Any] = report.made_by("auto-gptq")
    return made
