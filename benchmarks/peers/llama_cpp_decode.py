"""Decoding by llama.cpp: `python llama_cpp_decode.py JOB.json`, in an environment that has llama-cpp-python.

The job: `model` (a GGUF file), `threads`, `prompt` (token ids), `tokens` (how many to decode greedily), `context`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import llama_cpp


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    model = llama_cpp.Llama(
        job["model"], n_ctx=job["context"], n_threads=job["threads"], n_threads_batch=job["threads"], verbose=False
    )
    begun_s = time.perf_counter()
    model.eval(job["prompt"])
    prefill_s = time.perf_counter() - begun_s
    steps, cpu = [], time.process_time()
    for _ in range(job["tokens"]):
        begun_s = time.perf_counter()
        model.eval([model.sample(temp=0.0)])
        steps.append(time.perf_counter() - begun_s)
    cpu = time.process_time() - cpu
    print(json.dumps({"tool": f"llama.cpp ({llama_cpp.__version__})", "steps_s": steps, "prefill_s": prefill_s,
                      "cpu_s": cpu}))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
