"""An environment with a package `vllm` that does nothing but listen: for GPUs that are only recorded.

It says what vLLM says while it starts, writes down how it was started, and answers as openai_server.py does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

_SERVER = """
import argparse, asyncio, json, os, sys
import uvicorn
from tests.fakes.openai_server import Stranger
parser = argparse.ArgumentParser()
for name in ("--uds", "--host", "--port", "--served-model-name"):
    parser.add_argument(name)
options, _ = parser.parse_known_args()
with open(os.environ["FAKE_VLLM_STARTS"], "a") as file:
    file.write(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\\n")
for line in ("Resolved architecture: X", "Initializing a V1 LLM engine", "Starting to load model m",
             "Loading safetensors checkpoint shards: 100% Completed", "Loading weights took 0.1 seconds",
             "KV cache size: 1 tokens", "init engine (profile) took 0.1 s", "Application startup complete."):
    print("INFO", line, flush=True)
app = Stranger(key=os.environ["VLLM_API_KEY"], models=(options.served_model_name,), answer=(
    "Paris , on the river Seine , where two million people live ."))
uvicorn.run(app, uds=options.uds, log_level="critical") if options.uds else uvicorn.run(
    app, host=options.host, port=int(options.port), log_level="critical")
"""


def make_fake_vllm(directory: Path, *packages: str) -> Path:
    """An interpreter that has it, and empty packages of the names given besides."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    site = directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    package = site / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").write_text("")
    (package / "api_server.py").write_text(_SERVER)
    for name in packages:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
    root = Path(__file__).parents[2]
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{root}\n")
    return directory / "bin" / "python"


def starts(path: Path) -> list[dict[str, Any]]:
    """Arguments and environment of every start, as the fake wrote them down."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def variables(directory: Path, python: Path, fixture: Path) -> dict[str, str]:
    """What edgetool needs to take it for the vLLM of a machine with recorded GPUs."""
    return {
        "EDGETOOL_ENVS_PYTHON": f"vllm={os.fspath(python)}",
        "EDGETOOL_NVML_FIXTURE": str(fixture),
        "FAKE_VLLM_STARTS": str(directory / "starts.jsonl"),
    }
