"""`edgetool run` as a real process: stopped, killed, beside another, and serving; its steps are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fakes import fake_steps
from tests.fakes.recipe_run import Run, states_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def start(run: Run, *arguments: str, steps: str = "") -> subprocess.Popen[str]:
    """edgetool run as a real process."""
    return subprocess.Popen(
        [*fake_steps.PROGRAM, "edgetool", "run", "r.toml", "--json", *arguments],
        env={**os.environ, "FAKE_STEPS": steps, "FAKE_GROUP": "128", "RUN_MARK": str(run.directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def marked(run: Run) -> list[int]:
    """Live processes of the run, found without edgetool."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUN_MARK") == str(run.directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_step_is_gone_on_with(run: Run, number: signal.Signals) -> None:
    process = start(run, steps="quantize=stop")
    wait_for((run.out / "quantize.partial" / "half").is_file, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    document = json.loads(output)
    assert (process.returncode, document["type"]) == (75, "Stopped")
    assert document["hint"] == "edgetool run r.toml"
    assert states_of(document)["quantize"] == "stopped"
    assert marked(run) == []
    run.calls()
    again = json.loads(run(steps="quantize=stop").stdout)
    assert again["steps"][0]["result"]["resumed"] is True
    assert "--resume" in run.calls()[0]


def test_a_server_that_is_ended_with_the_run_while_it_is_asked_was_stopped(run: Run) -> None:
    process = start(run, "--progress", "plain", steps="serve-gpu=hang")
    calls = run.directory / "calls"
    wait_for(lambda: calls.is_file() and "asked" in calls.read_text(), process)
    server = next(
        child for child in psutil.Process(process.pid).children(recursive=True) if "serve-gpu" in child.cmdline()
    )
    process.terminate()
    assert process.stderr is not None
    assert any("stopping" in line for line in process.stderr)
    server.terminate()
    document = json.loads(process.communicate(timeout=60)[0])
    assert (process.returncode, document["type"], document["message"]) == (75, "Stopped", "step serve was stopped")
    assert states_of(document)["serve"] == "stopped" and marked(run) == []


def test_an_unfinished_step_of_other_settings_is_started_again(run: Run) -> None:
    process = start(run, steps="quantize=stop")
    wait_for((run.out / "quantize.partial" / "half").is_file, process)
    process.terminate()
    process.communicate(timeout=60)
    run.edit("group_size = 128", "group_size = 32")
    run.calls()
    assert json.loads(run().stdout)["steps"][0]["result"]["resumed"] is False
    assert "--overwrite" in run.calls()[0]


def test_a_killed_run_takes_its_step_along_and_can_be_gone_on_with(run: Run) -> None:
    process = start(run, steps="quantize=stop")
    wait_for((run.out / "quantize.partial" / "half").is_file, process)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while marked(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(run().stdout)["steps"][0]["result"]["resumed"] is True


def test_two_runs_into_one_directory_do_not_meet(run: Run) -> None:
    process = start(run, steps="quantize=stop")
    wait_for((run.out / "quantize.partial" / "half").is_file, process)
    try:
        result = run()
        assert result.exit_code == 6
        assert "another edgetool run is at work" in json.loads(result.stdout)["message"]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_serve_leaves_the_server_running_until_it_is_stopped(run: Run) -> None:
    import httpx

    process = start(run, "--serve")
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        text += process.stdout.readline()
        assert process.poll() is None or text, process.communicate()
    document = json.loads(text)
    server = document["server"]
    body = {"max_tokens": 3}
    address = f"{server['openai_base_url']}/chat/completions"
    answer = httpx.post(address, json=body, headers={"Authorization": f"Bearer {server['api_key']}"})
    assert answer.status_code == 200
    assert httpx.post(address, json=body, headers={"Authorization": "Bearer x"}).status_code == 401
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert marked(run) == []
    assert server["api_key"] not in "".join(path.read_text() for path in run.out.rglob("*") if path.is_file())


def test_a_server_that_ends_by_itself_ends_serve_with_7(run: Run) -> None:
    process = start(run, "--serve", steps="serve-gpu=end")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "step serve ended" in errors
    assert json.loads(output)["ok"] is True  # it had been ready, and said so
