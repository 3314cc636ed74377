"""vLLM's OpenAI server on the CPU, as a child process that is never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

MODEL_NAME = "under-test"
START_LIMIT_S = 420.0
STOP_LIMIT_S = 20.0
MAX_MODEL_LEN = 1024


class VllmServer:
    """A running server; `url` is its base, `log` what it printed."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def chat(self, question: str, max_tokens: int = 48) -> str:
        """The greedy answer to one user message."""
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        return str(self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """Natural log-probability of each token but the first, given those before it."""
        body = {"model": MODEL_NAME, "prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        entries = self._post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        assert len(entries) == len(token_ids) and entries[0] is None
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(token_ids[1:], entries[1:], strict=True)]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(self.url + path, json=body, timeout=300.0, trust_env=False)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}\n{self.tail()}"
        document: dict[str, Any] = answer.json()
        return document

    def tail(self, lines: int = 40) -> str:
        """The end of the server's log, for failures."""
        return "\n".join(self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-lines:])


@contextmanager
def serving(python: Path, checkpoint: Path, log: Path) -> Iterator[VllmServer]:
    """Serve `checkpoint` on a free port of this machine; at the end the whole process tree is gone."""
    port = _free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(checkpoint), "--served-model-name", MODEL_NAME,
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "4",
    ]  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("EDGETOOL_", "PYTHON", "PYTEST_"))}
    environment = {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = VllmServer(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        left = _stop(process)
    assert not left, f"vLLM processes survived: {left}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: VllmServer) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        code = server.process.poll()
        assert code is None, f"vLLM ended with {code} while starting:\n{server.tail()}"
        try:
            if httpx.get(server.url + "/health", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"vLLM was not ready after {START_LIMIT_S:.0f} s:\n{server.tail()}")


def _stop(process: subprocess.Popen[bytes]) -> list[int]:
    """End the server and everything it started; returns what refused to die.

    The engine and its workers outlive an API process that is killed, so the tree is noted first, then the group is
    asked, then killed, and each noted process is looked for.
    """
    tree = _tree(process.pid)
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        tree |= _tree(process.pid)
    _signal_group(process.pid, signal.SIGKILL)
    for member in tree:
        if member.is_running():
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait(STOP_LIMIT_S)
    _, alive = psutil.wait_procs(list(tree), timeout=STOP_LIMIT_S)
    return [member.pid for member in alive]


def _tree(pid: int) -> set[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return {root, *root.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
