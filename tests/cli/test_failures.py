"""Each way to fail: exit code, what stands on stdout and stderr, in this process and through a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUANTIZE = ("quantize", "demo", "-o", "out")
ERROR_CLASSES = {
    "UsageError": 2,
    "ConfigError": 3,
    "BadInput": 4,
    "MissingDependency": 5,
    "ResourceUnavailable": 6,
    "BackendFailed": 7,
    "VerificationFailed": 8,
    "Stopped": 75,
}  # written by hand from the command-line contract, not read from errors.py


@pytest.mark.parametrize(("name", "code"), ERROR_CLASSES.items())
def test_an_error_class_has_its_exit_code_and_says_what_to_do(
    edgetool: Callable[..., Any], name: str, code: int
) -> None:
    result = edgetool(*QUANTIZE, job=name)
    assert result.exit_code == code
    assert result.stdout == ""
    assert "error: what was wrong\n" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("name", "code"), ERROR_CLASSES.items())
def test_with_json_an_error_is_exactly_one_flat_document(edgetool: Callable[..., Any], name: str, code: int) -> None:
    result = edgetool(*QUANTIZE, "--json", job=name)
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert list(document) == ["schema", "ok", "type", "message", "hint", "exit_code"]
    assert document["schema"] == "edgetool.quantize/1"
    assert document["ok"] is False
    assert (document["type"], document["message"], document["exit_code"]) == (name, "what was wrong", code)


@pytest.mark.parametrize(("name", "code"), [("BadInput", 4), ("Stopped", 75)])
def test_a_real_process_exits_with_the_code_and_one_document(shell: Callable[..., Any], name: str, code: int) -> None:
    result = shell(*QUANTIZE, "--json", job=name)
    assert result.returncode == code
    assert json.loads(result.stdout)["type"] == name
    assert "error: what was wrong" in result.stderr


def test_a_stopped_run_names_the_command_that_goes_on(edgetool: Callable[..., Any]) -> None:
    result = edgetool("quantize", "my model", "-o", "out", "--overwrite", job="Stopped")
    # without --overwrite the second run would be refused, since the old output is still there
    assert "hint: edgetool quantize 'my model' -o out --overwrite --resume\n" in result.stderr


def test_the_command_that_goes_on_keeps_what_follows_two_dashes(edgetool: Callable[..., Any]) -> None:
    result = edgetool("quantize", "-o", "out", "--", "-model", job="Stopped")
    assert "hint: edgetool quantize -o out --resume -- -model\n" in result.stderr


def test_a_bug_keeps_its_traceback_and_exits_1(shell: Callable[..., Any]) -> None:
    result = shell(*QUANTIZE, job="bug")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" in result.stderr
    assert "ValueError: a bug of ours" in result.stderr


def test_a_bug_with_json_is_a_document_too(shell: Callable[..., Any]) -> None:
    result = shell(*QUANTIZE, "--json", job="bug")
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert (document["ok"], document["type"], document["exit_code"]) == (False, "Bug", 1)
    assert "a bug of ours" in document["message"]
    assert "Traceback" in result.stderr


def test_a_bug_reaches_the_test_runner_as_the_exception_it_is(edgetool: Callable[..., Any]) -> None:
    assert isinstance(edgetool(*QUANTIZE, job="bug").exception, ValueError)


@pytest.mark.parametrize("arguments", [("quantize", "--bitz", "4"), ("quantize", "demo", "--bits", "four"), ("nope",)])
def test_usage_errors_exit_2(edgetool: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    result = edgetool(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_usage_errors_with_json_are_a_document(shell: Callable[..., Any]) -> None:
    result = shell("quantize", "--bitz", "4", "--json")
    assert result.returncode == 2
    document = json.loads(result.stdout)
    assert (document["type"], document["exit_code"]) == ("UsageError", 2)
    assert "--bitz" in document["message"]


@pytest.mark.parametrize("arguments", [("quantize",), ("quantize", "demo"), ("quantize", "-o", "out"), ("inspect",)])
def test_a_missing_model_or_output_is_a_usage_error(edgetool: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert edgetool(*arguments).exit_code == 2


def test_an_interrupt_exits_130(edgetool: Callable[..., Any]) -> None:
    result = edgetool(*QUANTIZE, "--json", job="interrupt")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["exit_code"] == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_real_process_with_its_code(number: signal.Signals, code: int) -> None:
    fake = Path(__file__).parent.parent / "fakes" / "fake_job.py"
    child = subprocess.Popen(
        [sys.executable, str(fake), *QUANTIZE, "--json"],
        env={**os.environ, "FAKE_JOB": "sleep"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    while "ready" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=30)
    assert child.returncode == code
    assert json.loads(stdout)["exit_code"] == code
    assert "Traceback" not in stderr


def test_stdout_that_is_closed_early_is_no_bug() -> None:
    fake = Path(__file__).parent.parent / "fakes" / "fake_job.py"
    line = f"{sys.executable} {fake} quantize demo -o out --json --quiet | true"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "schema", "code"),
    [
        (("nosuch",), "edgetool.failure/1", 2),
        (("envs",), "edgetool.failure/1", 2),
        (("completion", "tcsh"), "edgetool.failure/1", 2),
        (("quantize", "--nosuch"), "edgetool.quantize/1", 2),
        (("serve-gpu", "demo", "stray"), "edgetool.serve-gpu/1", 2),
        (("gpus", "nosuch"), "edgetool.gpus/1", 2),
        (("gpus", "reap", "--nosuch"), "edgetool.gpus-reap/1", 2),
        (("gpus", "--interval", "x"), "edgetool.gpus/1", 3),
        (("gpus", "reap", "--grace", "x"), "edgetool.gpus-reap/1", 3),
        (("envs", "remove", "nosuch"), "edgetool.envs-remove/1", 2),
        (("jobs", "logs"), "edgetool.jobs-logs/1", 2),
        (("gpus", "reap", "--grace", "x", "--show-config"), "edgetool.gpus-reap/1", 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_failure_is_the_document_of_the_command_that_was_typed(
    edgetool: Callable[..., Any], arguments: tuple[str, ...], schema: str, code: int
) -> None:
    result = edgetool(*arguments, "--json")
    document = json.loads(result.stdout)
    assert (document["schema"], document["ok"], document["exit_code"]) == (schema, False, code)
    assert result.exit_code == code
