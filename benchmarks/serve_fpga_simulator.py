"""The simulated board's tokens/s, exact and fast, beside llama.cpp and beside what the machine's memory allows.

    python benchmarks/serve_fpga_simulator.py IMAGE --gguf MODEL.gguf [--llama-python PYTHON] [--json table.json]

IMAGE is what compile-vcu128 wrote; the GGUF file is the same model in Q4_0 or Q4_1 (`edgetool convert CHECKPOINT --to
gguf`, or the demo model as published). Every row is a process of its own, and rows take turns, so that a machine that
others use slows all of them. llama.cpp comes from llama-cpp-python: without --llama-python an environment with it is
made below --work (three minutes, once). The bound is bytes that a token reads, by the image's plan, over the bandwidth
that reading large arrays reaches here with the same threads; a small model is partly in the cache, and may beat it.
benchmarks/serve_fpga.py prints this table beside the gateway's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

LLAMA = "llama-cpp-python==0.3.36"
PEER = Path(__file__).parent / "peers" / "llama_cpp_decode.py"
PROMPT_TOKENS = 32
BANDWIDTH_BYTES = 1 << 28
TIMEOUT_S = 900.0


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rows by name, medians over the repetitions, and the memory's bound."""
    plan = json.loads((options.image / "manifest.json").read_text())
    vocab, context = plan["embedding"]["shape"][0], plan["kv"]["max_ctx"]
    prompt = [1 + 37 * number % (vocab - 1) for number in range(PROMPT_TOKENS)]
    jobs: dict[str, tuple[list[str], dict[str, Any]]] = {}
    common = {"prompt": prompt, "threads": options.threads, "context": context}
    for numerics, tokens in (("et1", options.tokens // 4), ("fast", options.tokens)):
        job = {**common, "image": str(options.image.resolve()), "numerics": numerics, "tokens": max(1, tokens)}
        jobs[f"edgetool, {numerics}"] = ([sys.executable, __file__, "--child"], job)
    for path in options.gguf:
        job = {**common, "model": str(path.resolve()), "tokens": options.tokens}
        jobs[f"llama.cpp, {path.stem}"] = ([str(llama_python(options, work)), str(PEER)], job)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for turn in range(options.repeat):
        for name, (command, job) in jobs.items():
            found[name].append(child(command, job, work))
            shown = f"{1 / statistics.median(found[name][-1]['steps_s']):.1f} tokens/s"
            print(f"{turn + 1}/{options.repeat} {name}: {shown}", file=sys.stderr, flush=True)
    kv_bytes = plan["memory"]["kv_bytes_per_token"] * (PROMPT_TOKENS + options.tokens // 2)
    read_bytes = plan["memory"]["weight_read_bytes_per_token"] + kv_bytes
    bandwidth = bandwidth_bytes_per_s(options.threads)
    return {
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "bytes_per_token": read_bytes,
        "bandwidth_bytes_per_s": bandwidth,
        "bound_tokens_per_s": bandwidth / read_bytes,
        "rows": [row(name, runs) for name, runs in found.items()],
    }


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a tool's runs: the median step, the fastest step, CPU time of a token, and the prompt's speed."""
    return {
        "row": name,
        "tokens_per_s": 1 / statistics.median(statistics.median(run["steps_s"]) for run in runs),
        "best_tokens_per_s": 1 / min(min(run["steps_s"]) for run in runs),
        "cpu_ms_per_token": 1e3 * statistics.median(run["cpu_s"] / len(run["steps_s"]) for run in runs),
        "prefill_tokens_per_s": PROMPT_TOKENS / statistics.median(run["prefill_s"] for run in runs),
    }


def child(command: list[str], job: dict[str, Any], work: Path) -> dict[str, Any]:
    path = work / "job.json"
    path.write_text(json.dumps(job))
    run = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """One row of edgetool's, in a process of its own."""
    from edgetool.fpga.image import Image
    from edgetool.fpga.simulator.engine import Simulator

    simulator = Simulator(Image.open(Path(job["image"])), job["numerics"], job["threads"])
    with simulator.session() as session:
        begun_s = time.perf_counter()
        logits = session.feed(job["prompt"])
        prefill_s = time.perf_counter() - begun_s
        steps, cpu = [], time.process_time()
        for _ in range(job["tokens"]):
            begun_s = time.perf_counter()
            logits = session.feed([int(logits[0].argmax())])
            steps.append(time.perf_counter() - begun_s)
        cpu = time.process_time() - cpu
    return {"steps_s": steps, "prefill_s": prefill_s, "cpu_s": cpu}


def bandwidth_bytes_per_s(threads: int) -> float:
    """The best of: summing an array, and STREAM's triad a = b + s c; arrays are larger than any cache."""
    import torch

    torch.set_num_threads(threads)
    a, b, c = (torch.ones(BANDWIDTH_BYTES // 4) for _ in range(3))

    def best(action: Any, moved_bytes: int) -> float:
        times = []
        for _ in range(7):
            begun_s = time.perf_counter()
            action()
            times.append(time.perf_counter() - begun_s)
        return moved_bytes / min(times)

    reading = best(lambda: a.sum(), a.nbytes)
    triad = best(lambda: torch.add(b, c, alpha=3.0, out=a), 3 * a.nbytes)
    return max(reading, triad)


def llama_python(options: argparse.Namespace, work: Path) -> Path:
    """A Python that has llama-cpp-python."""
    if options.llama_python is not None:
        return Path(options.llama_python)
    place = work / "llama-venv"
    python = place / "bin" / "python"
    if not python.exists() or subprocess.run([str(python), "-c", "import llama_cpp"], capture_output=True).returncode:
        print(f"building {LLAMA} in {place}", file=sys.stderr, flush=True)
        venv.create(place, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", LLAMA], check=True)
    return python


def show(found: dict[str, Any]) -> None:
    """The table on stdout."""
    print(f"{found['threads']} thread(s), load average {found['load_average']:.1f}")
    print(f"{'':34}{'tokens/s':>10}{'best':>8}{'CPU ms/token':>14}{'prompt tokens/s':>17}")
    for one in found["rows"]:
        figures = f"{one['tokens_per_s']:>10.1f}{one['best_tokens_per_s']:>8.1f}{one['cpu_ms_per_token']:>14.1f}"
        print(f"{one['row']:34}{figures}{one['prefill_tokens_per_s']:>17.0f}")
    bound = f"{found['bytes_per_token'] / 1e6:.1f} MB at {found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    print(f"{'memory bound (' + bound + ')':34}{found['bound_tokens_per_s']:>10.1f}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `measure` needs."""
    parser.add_argument("image", type=Path)
    parser.add_argument(
        "--gguf", type=Path, action="append", default=[], help="the same model for llama.cpp; repeatable"
    )
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="directory for the job and llama.cpp's environment")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(decode(json.loads(Path(sys.argv[2]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(options, work)
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
