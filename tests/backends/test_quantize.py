"""`edgetool quantize --backend`: other tools, run for real in their environments, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgetool.process.tree import alive, descendants
from tests.fakes.tiny_models import make_tiny_model
from tests.interpreters import interpreter_of

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", hidden_size=128)


def command(model: Path, output: Path, *arguments: str) -> list[str]:
    sizes = ("--group-size", "32", "--calib-samples", "4", "--calib-seqlen", "64", "--device", "cpu")
    return [sys.executable, "-m", "edgetool", "quantize", str(model), "-o", str(output), *sizes, *arguments]


def quantize(model: Path, output: Path, cache: Path, *arguments: str) -> dict[str, Any]:
    """The result document of a run that must end well."""
    words = [*command(model, output, *arguments), "--json", "--progress", "plain", "--cache-dir", str(cache)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return {**document, "stderr": done.stderr}


CASES = [
    ("gptqmodel", [], "gptq", "gptq"),
    ("gptqmodel", ["--desc-act", "--asym", "--bits", "8"], "gptq", "gptq"),
    ("gptqmodel", ["--method", "awq"], "awq", "awq"),
    ("llmcompressor", [], "gptq", "compressed-tensors"),
    ("llmcompressor", ["--format", "gptq", "--asym"], "gptq", "gptq"),
    ("llmcompressor", ["--method", "awq"], "awq", "compressed-tensors"),
    ("auto-round", ["--method", "rtn"], "rtn", "gptq"),
]


@pytest.mark.parametrize(("backend", "arguments", "method", "format_name"), CASES)
def test_a_backend_gives_the_same_kind_of_checkpoint_as_the_engine(
    backend: str, arguments: list[str], method: str, format_name: str, model: Path, tmp_path: Path
) -> None:
    interpreter_of(backend)
    document = quantize(model, tmp_path / "out", tmp_path / "cache", "--backend", backend, *arguments)
    assert (document["schema"], document["ok"]) == ("edgetool.quantize/1", True)
    assert (document["backend"], document["method"], document["format"]) == (backend, method, format_name)
    assert document["quantized_modules"] == 14
    assert re.search(r"quantise: done in", document["stderr"])
    record = json.loads((tmp_path / "out" / "edgetool.json").read_text())
    assert record["backend"]["version"] == record["tools"][backend] == document["backend_version"]
    if method != "awq":
        # 4 bits round a normal distribution to within a sixth of its size, 8 bits to a hundredth
        assert all(report["weight_error"] < 0.2 for report in record["modules"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "edgetool.json"} <= names
    assert not names & {"backend", "converted", "model", "calibration.json", "logs"}
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert list((tmp_path / "cache" / "logs").iterdir()) == []
    inspected = subprocess.run(
        [sys.executable, "-m", "edgetool", "inspect", str(tmp_path / "out"), "--json"], capture_output=True, text=True
    )
    assert inspected.returncode == 0, inspected.stderr


def test_the_same_tokens_calibrate_every_backend(model: Path, tmp_path: Path) -> None:
    interpreter_of("gptqmodel")
    hashes = set()
    for backend in ("native", "gptqmodel"):
        quantize(model, tmp_path / backend, tmp_path / "cache", "--backend", backend)
        record = json.loads((tmp_path / backend / "edgetool.json").read_text())
        hashes.add(record["calibration"]["sha256_of_token_ids"])
    assert len(hashes) == 1


def test_comparing_puts_all_backends_and_what_failed_into_one_table(model: Path, tmp_path: Path) -> None:
    interpreter_of("gptqmodel")
    document = quantize(
        model, tmp_path / "out", tmp_path / "cache", "--compare", "native,gptqmodel,autoawq", "--group-size", "64"
    )
    native, other, failed = document["comparison"]
    assert [native["backend"], other["backend"], failed["backend"]] == ["native", "gptqmodel", "autoawq"]
    for row in (native, other):
        assert 0.5 < row["perplexity_ratio"] < 2 and 0 < row["weight_error"] < 0.3
        assert (Path(row["output"]) / "edgetool.json").is_file()
    assert "no method gptq" in failed["failed"]
    assert document["warnings"] == [f"autoawq: {failed['failed']}"]


def test_a_run_that_is_stopped_leaves_no_process_and_no_output(model: Path, tmp_path: Path) -> None:
    interpreter_of("gptqmodel")
    words = command(model, tmp_path / "out", "--backend", "gptqmodel", "--progress", "plain", "--calib-samples", "32")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "reads the model" in line:
                break
        children = descendants(run.pid)
        assert children
        run.send_signal(signal.SIGTERM)
        assert run.wait(120) == 75
    deadline = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if alive(child)]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
