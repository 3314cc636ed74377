"""`edgetool convert` killed, stopped and starved at exact steps, then taken up again: the same bytes in the end.

Every run is a process of its own (tests/fakes/process_server.py) and a step is a call that changes the disk.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetool.artifacts import sha256_file
from tests.fakes.packed_checkpoints import make_checkpoint, random_layers, read_safetensors, write_safetensors
from tests.fakes.process_server import NO_SPACE, Ended, ProcessServer

OPTIONS = ("--to", "awq", "--max-shard-size", "12kB", "--threads", "1", "--json")


def hashes(output: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, which holds times."""
    return {path.name: sha256_file(path) for path in output.iterdir() if path.name != "edgetool.json"}


def alone(output: Path) -> None:
    """Neither a partial directory nor a lock beside the output."""
    assert [path.name for path in output.parent.iterdir() if output.name in path.name] == [output.name]


def shards_written(ended: Ended) -> set[str]:
    return {found[1] for step in ended.trace if (found := re.match(r"pwrite (model-\d+)", step))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", random_layers(), "gptq")


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(processes: ProcessServer, model: Path) -> Run:
    def convert(
        output: Path, *more: str, at: int = 0, signals: tuple[signal.Signals, ...] = (), error: int = 0
    ) -> Ended:
        line = ("convert", str(model), "-o", str(output), *OPTIONS, *more)
        return processes.run(*line, at=at, signals=signals, error=error, every_thread=True)

    return convert


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """The files of an undisturbed run, and its steps."""
    output = tmp_path_factory.mktemp("whole") / "out"
    ended = run(output)
    assert ended.code == 0, ended.stderr
    assert len(shards_written(ended)) >= 4
    return hashes(output), ended.trace


Whole = tuple[dict[str, str], list[str]]


def test_killed_at_any_step_it_gives_the_same_bytes_and_repeats_one_shard_at_most(
    run: Run, whole: Whole, tmp_path: Path
) -> None:
    files, trace = whole
    last = max(number for number, step in enumerate(trace, 1) if step.startswith("rename"))
    for at in range(2, last + 1, last // 9):
        output = tmp_path / f"at{at}" / "out"
        killed = run(output, at=at, signals=(signal.SIGKILL,))
        assert killed.code == -signal.SIGKILL
        assert not output.exists(), f"step {at}: {trace[at - 1]}"
        resumed = run(output, "--resume")
        assert resumed.code == 0, f"step {at}: {trace[at - 1]}: {resumed.stderr}"
        assert hashes(output) == files, f"step {at}: {trace[at - 1]}"
        alone(output)
        assert len(shards_written(killed) & shards_written(resumed)) <= 1
        document = resumed.document()
        assert document["tensors_compared"] == document["tensors_equal"] == 14 * 3 + 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_the_command_that_goes_on_and_keeps_finished_shards(
    run: Run, whole: Whole, tmp_path: Path, number: signal.Signals
) -> None:
    files, trace = whole
    middle = [at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00003")][1]
    output = tmp_path / "out"
    stopped = run(output, at=middle, signals=(number,))
    assert stopped.code == 75, stopped.stderr
    assert "--resume" in stopped.document()["hint"]
    assert not output.exists()
    resumed = run(output, "--resume")
    assert resumed.code == 0 and hashes(output) == files
    assert not {"model-00001", "model-00002"} & shards_written(resumed)
    alone(output)


def test_a_full_disk_is_named_and_what_was_written_is_gone_on_with(run: Run, whole: Whole, tmp_path: Path) -> None:
    files, trace = whole
    middle = [at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00003")][2]
    output = tmp_path / "out"
    full = run(output, at=middle, error=NO_SPACE)
    assert full.code == 6, full.stdout + full.stderr
    assert (full.document()["type"], "disk full" in full.document()["message"]) == ("ResourceUnavailable", True)
    resumed = run(output, "--resume")
    assert resumed.code == 0 and hashes(output) == files
    assert not {"model-00001", "model-00002"} & shards_written(resumed)


def test_a_full_disk_before_the_first_shard_leaves_nothing(run: Run, whole: Whole, tmp_path: Path) -> None:
    _, trace = whole
    first = next(at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00001"))
    output = tmp_path / "out"
    assert run(output, at=first, error=NO_SPACE).code == 6
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_what_a_killed_run_left_is_neither_used_nor_removed_unasked(run: Run, whole: Whole, tmp_path: Path) -> None:
    files, trace = whole
    output = tmp_path / "out"
    assert run(output, at=len(trace) // 2, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    refused = run(output)
    assert (refused.code, refused.document()["type"]) == (4, "BadInput")
    assert "--resume" in refused.document()["hint"] and "--overwrite" in refused.document()["hint"]
    again = run(output, "--overwrite")
    assert again.code == 0 and hashes(output) == files
    assert len(shards_written(again)) >= 4
    alone(output)


def test_another_conversion_does_not_go_on_with_the_shards_of_this_one(run: Run, whole: Whole, tmp_path: Path) -> None:
    _, trace = whole
    output = tmp_path / "out"
    middle = [at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00003")][1]
    assert run(output, at=middle, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    for more in (("--to", "gptq_v2"), ("--max-shard-size", "13kB")):
        other = run(output, "--resume", *more)
        assert (other.code, other.document()["type"]) == (4, "BadInput")
    assert not output.exists()


def test_a_shard_that_was_damaged_between_kill_and_resume_is_found(run: Run, whole: Whole, tmp_path: Path) -> None:
    _, trace = whole
    output = tmp_path / "out"
    middle = [at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00003")][1]
    assert run(output, at=middle, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    [shard] = (tmp_path / "out.partial").glob("model-00001*")
    tensors = read_safetensors(shard)
    name = next(iter(tensors))
    tensors[name].reshape(-1).view("u2")[3] ^= 4
    write_safetensors(shard, tensors)
    resumed = run(output, "--resume")
    assert (resumed.code, resumed.document()["type"]) == (8, "VerificationFailed"), resumed.stderr
    assert name in resumed.document()["message"]
    assert not output.exists()


def test_a_source_that_changed_between_kill_and_resume_is_not_gone_on_with(
    processes: ProcessServer, model: Path, whole: Whole, tmp_path: Path
) -> None:
    _, trace = whole
    source = tmp_path / "model"
    source.mkdir()
    for path in model.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    line = ("convert", str(source), "-o", str(tmp_path / "out"), *OPTIONS)
    middle = [at for at, step in enumerate(trace, 1) if step.startswith("pwrite model-00003")][1]
    killed = processes.run(*line, at=middle, signals=(signal.SIGKILL,), every_thread=True)
    assert killed.code == -signal.SIGKILL
    tensors = read_safetensors(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    write_safetensors(source / "model.safetensors", tensors)
    resumed = processes.run(*line, "--resume")
    assert (resumed.code, resumed.document()["type"]) == (4, "BadInput"), resumed.stderr
    assert processes.run(*line, "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "edgetool.json").read_text())["result"]["tensors_equal"] == 14 * 3 + 8
