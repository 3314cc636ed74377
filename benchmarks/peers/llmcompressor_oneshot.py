"""GPTQ or AWQ by llmcompressor: `python llmcompressor_oneshot.py JOB.json`, in llmcompressor's own environment.

The job is described in benchmarks/README.md (benchmarks/envs/llmcompressor.txt lists the environment). Everything not
named by the job is left at llmcompressor's defaults.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    os.chdir(job["scratch"])

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    rows = json.loads(Path(job["tokens"]).read_text())
    # Not the checkpoint's float16, which CPUs multiply several times slower than either of these.
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]})

    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": job["sym"],
        "strategy": "group",
        "group_size": job["group_size"],
    }
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if job["method"] == "awq":
        # It pins host memory whatever the device, which torch refuses where there is no accelerator.
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    else:
        recipe = [GPTQModifier(**scheme)]
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows)),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True)
    tokenizer.save_pretrained(job["output"])
    print(json.dumps({"tool": "llmcompressor", "version": version("llmcompressor"), "torch": torch.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
