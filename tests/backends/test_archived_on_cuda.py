"""auto-gptq and autoawq, run for real; both need CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.tiny_models import make_tiny_model
from tests.interpreters import interpreter_of


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "method"), [("auto-gptq", "gptq"), ("autoawq", "awq")])
def test_the_archived_tools_quantise_on_cuda(backend: str, method: str, tmp_path: Path) -> None:
    interpreter_of(backend)
    model = make_tiny_model(tmp_path / "tiny", "llama", hidden_size=128)
    words = ["quantize", str(model), "-o", str(tmp_path / "out"), "--backend", backend, "--method", method]
    sizes = ["--group-size", "32", "--calib-samples", "8", "--calib-seqlen", "64", "--device", "cuda", "--json"]
    done = subprocess.run([sys.executable, "-m", "edgetool", *words, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == backend
