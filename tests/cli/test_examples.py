"""The scripts of examples/, run as they are: on tiny models, in directories of their own, with real commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh"))
INVENTORY = Path(__file__).parent.parent / "fakes" / "nvml_eight_gpus.json"
SMALL = {
    "EDGETOOL_QUANTIZE_CALIB_SAMPLES": "4",
    "EDGETOOL_QUANTIZE_CALIB_SEQLEN": "32",
    "EDGETOOL_EVAL_CONTEXT": "32",
    "EDGETOOL_EVAL_TEXT": "text.txt",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def example(tmp_path: Path) -> Run:
    """`example("sweep.sh", "model", GATE="...")` in an empty directory, with only this edgetool on the path."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "edgetool").write_text(f'#!/bin/sh\nexec {sys.executable} -m edgetool "$@"\n')
    (programs / "edgetool").chmod(0o755)
    work = tmp_path / "a directory"
    work.mkdir()
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)

    def run(script: str, *arguments: object, seconds: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(EXAMPLES / script), *map(str, arguments)],
            cwd=work,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **SMALL, **env},
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    return run


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "a directory"


def finished(result: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """What it printed, after it has ended as it should."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def test_every_script_is_run_by_a_test_and_listed() -> None:
    tests, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    for script in SCRIPTS:
        assert f'example("{script}"' in tests
        assert f"[{script}]({script})" in listed
    assert set(re.findall(r"\]\(([^)/]+\.(?:sh|toml|yaml))\)", listed)) == {
        path.name for path in EXAMPLES.iterdir() if path.name != "README.md"
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_failure_and_name_no_machine(script: str) -> None:
    path = EXAMPLES / script
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    assert not re.search(r"/(home|tmp|work|root|mnt|data)/", text)


@pytest.mark.skipif(not shutil.which("shellcheck", path=str(Path(sys.executable).parent)), reason="no shellcheck")
def test_scripts_are_clean() -> None:
    completion = EXAMPLES.parent / "src" / "edgetool" / "completion" / "scripts" / "edgetool.bash"
    scripts = [*EXAMPLES.glob("*.sh"), *(EXAMPLES.parent / "tools").glob("*.sh"), completion]
    shellcheck = str(Path(sys.executable).parent / "shellcheck")
    result = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, timeout=60)
    assert result.stdout == ""


@pytest.mark.slow
def test_a_release_becomes_current_only_where_the_gate_holds(
    example: Run, tiny: Callable[..., Path], work: Path
) -> None:
    model = tiny("llama", tied=False)
    assert "released " in finished(example("release.sh", model, "out"))
    current = (work / "out" / "current").resolve()
    assert json.loads((current / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )
    assert not (current.parent / "quantised").exists()

    refused = example("release.sh", model, "out", GATE="ratio<=0.5")
    finished(refused, 8)
    assert "the gate 'ratio<=0.5' does not hold" in refused.stderr
    assert (work / "out" / "current").resolve() == current


def test_a_regression_is_told_from_a_night_that_was_not_measured(
    example: Run, tiny: Callable[..., Path], work: Path
) -> None:
    model = tiny("llama", tied=False)
    # a model beside itself, whose ratio is 1: no step of quantising is needed
    assert "at most 0.5 asked" in finished(example("nightly-gate.sh", model, model, "nights", GATE="ratio<=0.5"), 8)
    broken = example("nightly-gate.sh", "no-such-model", model, "nights")
    finished(broken, 1)
    assert "not measured (exit 4): no-such-model" in broken.stderr
    (night,) = map(json.loads, (work / "nights" / "history.jsonl").read_text().splitlines())
    assert night["passed"] is False and "ratio 1.0000" in night["reason"]


@pytest.mark.slow
def test_a_night_without_arguments_makes_its_model_first(example: Run, demo_model_dir: Path, work: Path) -> None:
    # demo is looked up in the cache; its text is real, so that the gate means something
    assert "perplexity: ratio 1." in finished(
        example(
            "nightly-gate.sh",
            seconds=1800,
            EDGETOOL_CACHE_DIR=str(demo_model_dir.parent.parent),
            EDGETOOL_EVAL_TEXT="",
            EDGETOOL_EVAL_CONTEXT="512",
            EDGETOOL_EVAL_LIMIT="2",
            EDGETOOL_QUANTIZE_CALIB_SAMPLES="8",
            EDGETOOL_QUANTIZE_CALIB_SEQLEN="128",
            GATE="ratio<=1.5",
        )
    )
    assert (work / "nightly" / "quantised" / "edgetool.json").is_file()
    assert json.loads((work / "nightly" / "history.jsonl").read_text())["passed"] is True


@pytest.mark.slow
def test_a_sweep_finds_the_best_and_does_nothing_twice(example: Run, tiny: Callable[..., Path], work: Path) -> None:
    model = tiny("llama", tied=False)
    printed = finished(example("sweep.sh", model, "out", 64, 32))
    ratios = {
        size: json.loads((work / "out" / f"group-{size}.json").read_text())["tasks"]["perplexity"]["ratio"]
        for size in (64, 32)
    }
    best = min(ratios, key=lambda size: ratios[size])
    assert printed == f"out/group-{best}\n"
    assert (work / "out" / "best").resolve().name == f"group-{best}"

    again = example("sweep.sh", model, "out", 64, 32)
    assert finished(again) == printed
    assert again.stderr.count("perplexity") == 2, "two lines of figures, and no word of a command"


@pytest.mark.slow
def test_a_board_image_is_made_proven_and_asked(example: Run, tiny: Callable[..., Path], work: Path) -> None:
    model = tiny("llama", tied=False, hidden_size=128, head_dim=32)
    answer = finished(example("board.sh", model, "out", QUESTION="Hello?"))
    assert len(answer.strip()) > 0 and "output" not in answer
    document = json.loads((work / "out" / "server.json").read_text())
    assert document["ok"] is True
    port = int(document["url"].rpartition(":")[2].partition("/")[0])
    with pytest.raises(OSError, match="refused"):
        __import__("socket").create_connection(("127.0.0.1", port), timeout=5)

    damaged = work / "out" / "image" / "hbm" / "pc07.bin"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert example("board.sh", model, "out").returncode == 4


@pytest.mark.slow
def test_a_release_is_served_and_the_next_one_takes_its_place(
    example: Run, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    state = {"EDGETOOL_SERVE_GPU_STATE_DIR": str(tmp_path / "servers"), "EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
    options = {"SERVE": "yes", "ENGINE": "transformers", "EDGETOOL_SERVE_GPU_DEVICE": "cpu", **state}

    def pid() -> int:
        listed = [sys.executable, "-m", "edgetool", "serve-gpu", "--list", "--json"]
        found = subprocess.run(listed, env={**os.environ, **state}, capture_output=True, timeout=60)
        (server,) = json.loads(found.stdout)["servers"]
        assert server["name"] == "release"
        return int(server["pid"])

    model = tiny("llama", tied=False)
    try:
        finished(example("release.sh", model, "out", **options))
        first = pid()
        finished(example("release.sh", model, "out", **options))
        assert pid() != first
    finally:
        stop = [sys.executable, "-m", "edgetool", "serve-gpu", "--stop", "release"]
        subprocess.run(stop, env={**os.environ, **state}, capture_output=True, timeout=120)


def test_slots_go_on_until_the_work_is_done(example: Run, work: Path) -> None:
    """A stand-in for the command, since what a slot ends with has to be exact; the real one is in the next test."""
    command = work / "command"
    command.write_text(
        '#!/bin/bash\necho "$*" >>calls\ncase $(wc -l <calls) in 1) exit 75;; 2) kill -9 $$;; 3) exit "$LAST";; esac\n'
    )
    command.chmod(0o755)
    result = example("in-slots.sh", 60, "./command", "quantize", LAST="0")
    finished(result)
    assert (work / "calls").read_text().splitlines() == ["quantize", "quantize --resume", "quantize --resume"]
    assert "slot 1 ended with exit 75" in result.stderr and "slot 2 ended with exit 137" in result.stderr

    (work / "calls").unlink()
    finished(example("in-slots.sh", 60, "./command", LAST="8"), 8)
    (work / "calls").unlink()
    assert "not finished after 2 slots" in example("in-slots.sh", 60, "./command", SLOTS="2").stderr


@pytest.mark.slow
def test_quantising_in_slots_gives_the_bytes_of_one_long_run(
    example: Run, tiny: Callable[..., Path], work: Path
) -> None:
    model = tiny("llama", tied=False, layers=6)
    command = ["quantize", model, "--group-size", "64", "--threads", "1"]
    # slots of a second or two end at every stage of the run, some before anything is kept
    result = example("in-slots.sh", "2", "edgetool", *command, "-o", "cut", SLOTS="1", seconds=1800)
    assert result.returncode == 75
    finished(example("in-slots.sh", "20", "edgetool", *command, "-o", "cut", seconds=1800))
    finished(example("in-slots.sh", "1000", "edgetool", *command, "-o", "whole", seconds=1800))
    for path in (work / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (work / "cut" / path.name).read_bytes()


def test_a_program_of_ones_own_runs_under_a_lease(example: Run, tmp_path: Path) -> None:
    leases = {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks"), "EDGETOOL_NVML_FIXTURE": str(INVENTORY)}
    assert re.fullmatch(r"GPUs: GPU-\S+; port: \d+\n", finished(example("under-lease.sh", **leases)))
    assert re.fullmatch(r"GPUs: none; port: \d+\n", finished(example("under-lease.sh", GPUS="0", **leases)))
    two = example("under-lease.sh", "printenv", "CUDA_VISIBLE_DEVICES", GPUS="2", **leases)
    assert finished(two).count("GPU-") == 2
    assert example("under-lease.sh", "sh", "-c", "exit 9", **leases).returncode == 9
    assert example("under-lease.sh", "true", GPUS="100", WAIT="0", **leases).returncode == 6
