"""`edgetool jobs`: what long commands leave in the store, seen from a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

QUANTIZE = ("quantize", "demo", "-o", "out")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Jobs are recorded, in the directory that this returns."""
    monkeypatch.setenv("EDGETOOL_JOBS_RECORD", "1")
    return tmp_path / "state" / "edgetool" / "jobs"


def jobs(*arguments: str) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, ["jobs", *arguments])


def listed(*arguments: str) -> list[dict[str, Any]]:
    document = json.loads(jobs("--json", *arguments).stdout)
    assert document["schema"] == "edgetool.jobs/1" and document["ok"]
    found: list[dict[str, Any]] = document["jobs"]
    return found


@pytest.mark.parametrize(
    ("job", "state", "code"),
    [
        ("", "done", 0),
        ("BadInput", "failed", 4),
        ("Stopped", "stopped", 75),
        ("interrupt", "stopped", 130),
        ("bug", "failed", 1),
    ],
)
def test_a_command_is_recorded_with_how_it_ended(
    edgetool: Callable[..., Any], recording: Path, job: str, state: str, code: int
) -> None:
    edgetool(*QUANTIZE, job=job)
    (found,) = listed()
    assert (found["state"], found["exit_code"]) == (state, code)
    assert found["command"] == ["edgetool", *QUANTIZE]
    assert found["output"] == str(Path("out").absolute())
    assert "token" not in found


def test_the_log_has_the_command_its_progress_and_its_end(edgetool: Callable[..., Any], recording: Path) -> None:
    edgetool(*QUANTIZE, "--quiet", job="BadInput")
    text = jobs("logs", "1").stdout
    for said in ("edgetool quantize demo -o out", "quantise: done in", "a note", "warning: a warning"):
        assert said in text
    assert text.splitlines()[-1].endswith("ended with exit code 4: what was wrong")
    document = json.loads(jobs("logs", "1", "--json").stdout)
    assert document["schema"] == "edgetool.jobs-logs/1"
    assert document["lines"] == text.splitlines()


def test_the_log_of_a_bug_has_its_traceback(edgetool: Callable[..., Any], recording: Path) -> None:
    edgetool(*QUANTIZE, job="bug")
    assert "ValueError: a bug of ours" in jobs("logs", "1").stdout


@pytest.mark.parametrize("options", [("--dry-run",), ("--show-config",)])
def test_a_plan_is_no_job(edgetool: Callable[..., Any], recording: Path, options: tuple[str, ...]) -> None:
    edgetool(*QUANTIZE, *options)
    assert listed() == []
    assert not recording.exists()


def test_a_wrong_option_is_no_job(edgetool: Callable[..., Any], recording: Path) -> None:
    edgetool(*QUANTIZE, "--bits", "5")
    edgetool(*QUANTIZE, "--nonsense")
    assert listed() == []


def test_keys_never_reach_store_or_log(recording: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgetool.cli import app

    monkeypatch.setenv("EDGETOOL_HUB_TOKEN", "hub-sesame")
    (tmp_path / "none").mkdir()
    arguments = ["serve-gpu", str(tmp_path / "none"), "--engine", "transformers", "--api-key", "key-sesame"]
    CliRunner().invoke(app, [*arguments, "--served-model-name", "hub-sesame"])
    (found,) = listed()
    assert found["command"][-3:] == ["***", "--served-model-name", "***"]
    for path in recording.rglob("*"):
        if path.is_file():
            assert b"sesame" not in path.read_bytes(), path


@pytest.mark.parametrize("hindrance", ["a file in the way", "damage"])
def test_a_store_that_cannot_be_written_costs_one_warning(
    edgetool: Callable[..., Any], recording: Path, hindrance: str
) -> None:
    if hindrance == "damage":
        recording.mkdir(parents=True)
        (recording / "jobs.sqlite").write_bytes(b"no database at all, for certain" * 100)
    else:
        recording.parent.mkdir(parents=True)
        recording.write_text("")
    result = edgetool(*QUANTIZE)
    assert result.exit_code == 0
    assert result.stderr.count("this job is not recorded") == 1


def test_environment_is_as_before_after_a_job(edgetool: Callable[..., Any], recording: Path) -> None:
    edgetool(*QUANTIZE)
    assert "EDGETOOL_TREE" not in os.environ


def test_clean_forgets_what_has_ended(edgetool: Callable[..., Any], recording: Path) -> None:
    edgetool(*QUANTIZE)
    assert json.loads(jobs("clean", "--older-than", "1h", "--json").stdout)["removed"] == 0
    assert json.loads(jobs("clean", "--json").stdout)["removed"] == 1
    assert listed() == []
    assert list((recording / "logs").iterdir()) == []


def test_the_table_says_why_jobs_failed(edgetool: Callable[..., Any], recording: Path) -> None:
    assert "no job is recorded" in jobs().stdout
    edgetool(*QUANTIZE, job="BadInput")
    text = jobs().stdout
    assert "quantize demo -o out" in text and "failed" in text and "1: what was wrong" in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("logs",), 2),
        (("cancel",), 2),
        (("logs", "7"), 4),
        (("cancel", "7"), 4),
        (("cancel", "0"), 3),
        (("cancel", str(2**63)), 3),
        (("cancel", str(2**63 - 1)), 4),
        (("--limit", str(2**63)), 3),
        (("--limit", str(2**63 - 1)), 0),
        (("logs", "x"), 2),
    ],
)
def test_what_does_not_name_a_job_is_refused(recording: Path, arguments: tuple[str, ...], code: int) -> None:
    assert jobs(*arguments).exit_code == code


SLOW = {"group_size": 32, "calib_samples": 64, "calib_seqlen": 512}
"""Settings with which a quantise of a model of many layers takes minutes."""


class Real:
    """A real edgetool, and whatever carries its mark."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "REAL_JOB": str(directory)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgetool", *arguments, "--json"],
            cwd=directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def processes(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("REAL_JOB") == self.environment["REAL_JOB"]
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def slow_model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", layers=60, hidden_size=128)


def cancelled(real: Real, begun: Callable[[], bool], command: str) -> tuple[dict[str, Any], list[int]]:
    """Cancel the job of `command` once it has begun: the document, and processes that are left."""
    try:
        real.wait_for(begun)
        job = next(job for job in listed() if job["command"][1] == command)
        assert job["state"] == "running"
        document = json.loads(jobs("cancel", str(job["id"]), "--json").stdout)
    finally:
        real.process.poll()
        left = real.processes()
        real.process.kill()
        real.process.wait()
    return document, left


def test_cancelling_a_running_quantise_leaves_no_process_and_no_half_output(
    slow_model: Path, recording: Path, tmp_path: Path
) -> None:
    options = [word for key, value in SLOW.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    real = Real(tmp_path, "quantize", str(slow_model), "-o", "out", *options)
    partial = tmp_path / "out.partial"
    document, left = cancelled(real, (partial / "ledger.jsonl").is_file, "quantize")
    assert left == []
    assert document["schema"] == "edgetool.jobs-cancel/1" and document["ok"]
    assert document["processes_left"] == 0
    assert document["removed"] == [str(partial)]
    assert document["state"] == "stopped"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))] == []


def test_cancelling_a_run_ends_its_step_and_removes_what_that_was_writing(
    slow_model: Path, recording: Path, tmp_path: Path
) -> None:
    settings = "".join(f"{key} = {value}\n" for key, value in SLOW.items())
    (tmp_path / "r.toml").write_text(f'[run]\noutput = "out"\n[steps.quantize]\ncommand = "quantize"\n{settings}')
    real = Real(tmp_path, "run", "r.toml", "--model", str(slow_model))
    partial = tmp_path / "out" / "quantize.partial"
    document, left = cancelled(real, (partial / "ledger.jsonl").is_file, "run")
    assert left == []
    assert document["removed"] == [str(partial)] and not partial.exists()
    step, run = listed()
    assert (step["parent"], step["command"][1], run["command"][1]) == (run["id"], "quantize", "run")
    assert (step["state"], run["state"]) == ("stopped", "stopped")


def test_following_a_log_ends_with_the_job(tmp_path: Path, recording: Path) -> None:
    fake = Path(__file__).parent.parent / "fakes" / "fake_job.py"
    sleeper = subprocess.Popen(
        [sys.executable, str(fake), *QUANTIZE], env={**os.environ, "FAKE_JOB": "sleep"}, stderr=subprocess.PIPE
    )
    assert sleeper.stderr is not None
    while b"ready" not in sleeper.stderr.readline():
        assert sleeper.poll() is None
    follower = subprocess.Popen(
        [sys.executable, "-m", "edgetool", "jobs", "logs", "-f", "1"], stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    while "a warning" not in (line := follower.stdout.readline()):
        assert line
    assert follower.poll() is None
    sleeper.terminate()
    rest, _ = follower.communicate(timeout=60)
    sleeper.wait()
    sleeper.stderr.close()
    assert follower.returncode == 0
    assert "ended with exit code 143" in rest
