"""GPTQ by gptqmodel: `python gptqmodel_gptq.py JOB.json`, in gptqmodel's own environment.

The job is described in benchmarks/README.md (benchmarks/envs/gptqmodel.txt lists the environment). Everything not named
by the job is left at gptqmodel's defaults.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# The default is half the cores; with one worker on two cores the tool waits for itself and never ends.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    os.chdir(job["scratch"])  # it writes ./logs wherever it stands

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(job["threads"])
    rows = json.loads(Path(job["tokens"]).read_text())
    samples = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in rows]

    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=job["sym"], device="cpu")
    model = GPTQModel.load(job["model"], config)
    model.quantize(samples, batch_size=1)
    model.save(job["output"])
    print(json.dumps({"tool": "gptqmodel", "version": version("gptqmodel"), "torch": torch.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
