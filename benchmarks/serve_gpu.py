"""`edgetool serve-gpu` beside a plain vLLM started by hand, in one run: seconds to ready, and what the front costs.

    python benchmarks/serve_gpu.py CHECKPOINT [--vllm-python PYTHON] [--starts 3] [--json table.json]

Both get the same checkpoint, dtype, context and cache. Starts take turns (by hand, edgetool, edgetool, by hand ...),
so that a machine that gets slower meets both. edgetool says that it is ready when it has also asked for one answer; by
hand the same answer is asked for after /health, and the sums are compared. Then both run at once and `edgetool bench`
measures them in turns, so the difference is the front and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

LIMIT_S = 600.0
KEY = "benchmark"


class ByHand:
    """`python -m vllm.entrypoints.openai.api_server ...` as its documentation says."""

    def __init__(self, python: Path, checkpoint: Path, max_model_len: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint),
            "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16",
            "--enforce-eager", "--max-model-len", str(max_model_len),
        ]  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGETOOL_", "PYTHON"))}
        environment = {**kept, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": KEY}
        self.begun_s = time.monotonic()
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ready(self) -> dict[str, float]:
        while not _healthy(self.url):
            assert self.process.poll() is None, "vLLM ended while starting"
            assert time.monotonic() - self.begun_s < LIMIT_S
            time.sleep(0.1)
        return {"healthy_s": time.monotonic() - self.begun_s}

    def stop(self) -> float:
        begun_s = time.monotonic()
        self.process.terminate()
        self.process.wait(60)
        _kill_group(self.process.pid)
        return time.monotonic() - begun_s


class ByEdgetool:
    """`edgetool serve-gpu`, with the same settings."""

    def __init__(self, python: Path, checkpoint: Path, max_model_len: int, log: Path) -> None:
        scratch = log.parent
        self.output = log.with_suffix(".json")
        environment = {
            **os.environ,
            "EDGETOOL_API_KEY": KEY,
            "EDGETOOL_ENVS_PYTHON": f"vllm-cpu={python}",
            "EDGETOOL_LOCK_DIR": str(scratch / "locks"),
            "XDG_STATE_HOME": str(scratch / "state"),
        }
        command = [
            sys.executable, "-m", "edgetool", "serve-gpu", str(checkpoint), "--served-model-name", "m",
            "--device", "cpu", "--max-model-len", str(max_model_len), "--json",
        ]  # fmt: skip
        self.log = scratch / "state" / "edgetool" / "servers" / "logs" / "m.log"
        self.log.unlink(missing_ok=True)
        self.begun_s = time.monotonic()
        with log.open("wb") as sink, self.output.open("wb") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=sink)
        self.url = ""

    def ready(self) -> dict[str, float]:
        """before_s: until vLLM was started; after_s: from its "startup complete" to the document (one answer)."""
        started_s = answering_s = 0.0
        while not self.output.read_text().endswith("}\n"):
            assert self.process.poll() is None, "edgetool ended while starting"
            assert time.monotonic() - self.begun_s < LIMIT_S
            if self.log.exists():  # it is made when vLLM is started
                started_s = started_s or time.monotonic()
                if not answering_s and "startup complete" in self.log.read_text(errors="replace"):
                    answering_s = time.monotonic()
            time.sleep(0.02)
        now_s = time.monotonic()
        self.document: dict[str, Any] = json.loads(self.output.read_text())
        self.url = self.document["url"]
        before_s, after_s = started_s - self.begun_s, now_s - (answering_s or now_s)
        return {"ready_s": now_s - self.begun_s, "before_s": before_s, "after_s": after_s}

    def stop(self) -> float:
        begun_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - begun_s


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def first_answer(url: str) -> float:
    """Seconds of the completion that edgetool waits for before it says ready."""
    begun_s = time.monotonic()
    body = {"model": "m", "prompt": "The capital of France is", "max_tokens": 32, "temperature": 1.0, "seed": 0}
    httpx.post(
        f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=300, trust_env=False
    ).raise_for_status()
    return time.monotonic() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vllm-python", type=Path, required=True, help="interpreter that has vLLM's CPU build")
    parser.add_argument("--starts", type=int, default=3, help="starts of each")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--requests", default="32")
    parser.add_argument("--output-tokens", default="64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    kinds: dict[str, type[ByHand] | type[ByEdgetool]] = {"by hand": ByHand, "edgetool": ByEdgetool}
    starts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.starts):
            names = list(kinds) if number % 2 == 0 else list(reversed(kinds))
            for name in names:
                log = Path(scratch) / f"{name.replace(' ', '-')}-{number}.log"
                server = kinds[name](options.vllm_python, options.checkpoint, options.max_model_len, log)
                try:
                    times = server.ready()
                    if name == "by hand":
                        times["first_answer_s"] = first_answer(server.url)
                        times["ready_s"] = times["healthy_s"] + times["first_answer_s"]
                finally:
                    times["stopped_s"] = server.stop()
                starts.append({"server": name, **times})
                print(json.dumps(starts[-1]), file=sys.stderr)
        compared = _compare(options, Path(scratch))
    columns = {
        "to /health, s": "healthy_s",
        "to first answer, s": "ready_s",
        "before vLLM, s": "before_s",
        "after vLLM, s": "after_s",
        "first answer, s": "first_answer_s",
        "to stopped, s": "stopped_s",
    }
    print(f"{'':12} " + " ".join(f"{title:>19}" for title in columns))
    for name in kinds:
        rows = [row for row in starts if row["server"] == name]
        print(f"{name:12} " + " ".join(f"{_median(rows, key):>19}" for key in columns.values()))
    print(compared["table"])
    if options.json:
        options.json.write_text(json.dumps({"starts": starts, "bench": compared["document"]}, indent=2))


def _median(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{statistics.median(values):.1f}" if values else "-"


def _compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both at once, asked in turns."""
    hand = ByHand(options.vllm_python, options.checkpoint, options.max_model_len, scratch / "hand.log")
    try:
        hand.ready()
        ours = ByEdgetool(options.vllm_python, options.checkpoint, options.max_model_len, scratch / "ours.log")
        try:
            ours.ready()
            command = [
                sys.executable, "-m", "edgetool", "bench", hand.url, "--against", ours.url, "--concurrency",
                options.concurrency, "--requests", options.requests, "--rounds", "8", "--prompt-tokens", "64",
                "--output-tokens", options.output_tokens, "--quiet",
            ]  # fmt: skip
            environment = {**os.environ, "EDGETOOL_API_KEY": KEY}
            front = _front(ours.process.pid)
            before = front.cpu_times()
            done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
            after = front.cpu_times()
            document = json.loads(done.stdout)
        finally:
            ours.stop()
    finally:
        hand.stop()
    lines = [f"{'':12} {'at once':>8} {'tokens/s':>10} {'TTFT p50, ms':>14} {'TPOT p50, ms':>14}"]
    for found in document["results"]:
        name = "by hand" if found["endpoint"] == hand.url else "edgetool"
        ttft, tpot = (1000 * found[key]["p50"] for key in ("ttft_s", "tpot_s"))
        lines.append(
            f"{name:12} {found['concurrency']:>8} {found['output_tokens_per_s']:>10.1f} {ttft:>14.1f} {tpot:>14.2f}"
        )
    for found in document["comparison"]:
        ratio = found["output_tokens_per_s"]
        lines.append(
            f"edgetool / by hand, {found['concurrency']} at once: tokens/s x {ratio['ratio']:.3f}"
            f" ({ratio['lowest']:.3f} to {ratio['highest']:.3f} over {found['rounds']} rounds)"
        )
    passed = sum(f["requests"] * f["output_tokens_mean"] for f in document["results"] if f["endpoint"] != hand.url)
    cpu_s = after.user + after.system - before.user - before.system
    lines.append(f"CPU time of the front: {1e6 * cpu_s / passed:.0f} microseconds for each streamed token")
    return {"table": "\n".join(lines), "document": document}


def _front(supervisor_pid: int) -> psutil.Process:
    below = psutil.Process(supervisor_pid).children(recursive=True)
    return next(process for process in below if "edgetool.serving.front" in process.cmdline())


if __name__ == "__main__":
    main()
