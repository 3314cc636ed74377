"""llm-compressor 0.14: GPTQ, AWQ and rounding into compressed-tensors. Runs in the environment `llmcompressor`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any


def scheme(job: dict[str, Any]) -> dict[str, Any]:
    """The job as a scheme. Scales are rounded to 16 bits before codes are chosen, so every format can hold them."""
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["sym"],
        "strategy": "channel" if job["group_size"] == -1 else "group",
        **({} if job["group_size"] == -1 else {"group_size": job["group_size"]}),
        "scale_dtype": f"torch.{job['scale_dtype']}",
    }
    ignore = [] if job["lm_head"] else ["lm_head"]
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ignore}


def damping(job: dict[str, Any]) -> dict[str, Any]:
    """GPTQModifier's arguments besides the scheme. Its static order permutes while it works, and stores none."""
    return {"actorder": "static", **({} if job["damp"] is None else {"dampening_frac": job["damp"]})}


def run(job: dict[str, Any], report: Any) -> dict[str, Any]:
    """Quantise job["model"] into job["output"]."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.core import LifecycleCallbacks
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    report.note(f"llm-compressor {version('llmcompressor')} reads the model")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["compute_dtype"]))
    if job["device"] != "cpu":
        model.to(job["device"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = json.loads(Path(job["tokens"]).read_text())
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]})
    if job["method"] == "awq":
        if job["device"] == "cpu":
            # It pins host memory whatever the device, which torch refuses where there is no accelerator.
            IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
        recipe = [AWQModifier(), QuantizationModifier(**scheme(job))]
    elif job["method"] == "gptq":
        recipe = [GPTQModifier(**scheme(job), **damping(job))]
    else:
        recipe = [QuantizationModifier(**scheme(job))]
    with report.task("quantise", job["layers"] + 1, "part") as task:
        ended = LifecycleCallbacks.sequential_epoch_end

        def counted(*arguments: Any, **named: Any) -> Any:
            task.advance()
            return ended(*arguments, **named)

        LifecycleCallbacks.sequential_epoch_end = counted
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=max(map(len, rows)),
            shuffle_calibration_samples=False,
        )
    report.note("llm-compressor writes")
    # what is not quantised goes back to the model's own 16 bits; scales have theirs already
    model.to(getattr(torch, job["stored_dtype"]))
    model.save_pretrained(job["output"], save_compressed=True)
    tokenizer.save_pretrained(job["output"])
    made: dict[str, Any] = report.made_by("llmcompressor")
    return made
