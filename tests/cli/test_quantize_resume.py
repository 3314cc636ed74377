"""`edgetool quantize` stopped, killed and damaged at exact steps, then taken up again: the same bytes in the end.

Every run here is a process of its own (tests/fakes/process_server.py) and a step is a call that changes the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgetool.artifacts import sha256_file
from tests.fakes.process_server import NO_SPACE, Ended, ProcessServer

LAYERS = 3
SMALL = ("--group-size", "32", "--calib-samples", "4", "--calib-seqlen", "32", "--threads", "1", "--json")

Line = Callable[..., tuple[str, ...]]


@dataclass(frozen=True)
class Whole:
    """An undisturbed run."""

    output: Path
    trace: list[str]
    files: dict[str, str]
    manifest: dict[str, Any]

    def step(self, pattern: str, which: int = 0) -> int:
        """Number of the step that matches: the first, or `which` in the manner of a list's index."""
        matching = [number for number, line in enumerate(self.trace, 1) if re.search(pattern, line)]
        return matching[which]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", layers=LAYERS)


@pytest.fixture(scope="module")
def line(model: Path) -> Line:
    """The arguments of a run into `output`."""

    def arguments(output: Path, *more: str) -> tuple[str, ...]:
        return ("quantize", str(model), "-o", str(output), *SMALL, *more)

    return arguments


@pytest.fixture(scope="module")
def whole(processes: ProcessServer, line: Line, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    output = tmp_path_factory.mktemp("whole") / "out"
    ended = processes.run(*line(output))
    assert ended.code == 0, ended.stderr
    return Whole(output, ended.trace, hashes(output), manifest_of(output))


def hashes(output: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, which holds times."""
    return {path.name: sha256_file(path) for path in output.iterdir() if path.name != "edgetool.json"}


def manifest_of(output: Path) -> dict[str, Any]:
    """What must not depend on how often a run was interrupted."""
    document = json.loads((output / "edgetool.json").read_text())
    return {key: document[key] for key in ("calibration", "recipe", "modules", "verified", "files", "seed", "source")}


def layers_written(ended: Ended) -> set[str]:
    return {found[1] for step in ended.trace if (found := re.match(r"pwrite (layer-\d+)", step))}


def assert_same(output: Path, whole: Whole) -> None:
    assert hashes(output) == whole.files
    assert manifest_of(output) == whole.manifest
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


KILLS = {
    "before anything is written": (r"mkdir .*partial", 0),
    "while the identity is written": (r"fsync ledger", 0),
    "while the calibration is kept": (r"replace .calibration", 0),
    "in the embedding": (r"pwrite activations", 0),
    "in the first layer": (r"pwrite activations", 2),
    "while the first layer is written": (r"pwrite layer-00000", 10),
    "after a layer, before its line in the ledger is safe": (r"fsync ledger", 2),
    "in the second layer": (r"pwrite activations-.*-0", 2),
    "while the last layer is written": (r"pwrite layer-00002", -1),
    "before the checkpoint is begun": (r"pwrite model.safetensors", 0),
    "while the checkpoint is put together": (r"pwrite model.safetensors", 40),
    "before the config": (r"replace .config.json", 0),
    "before the checkpoint counts as put together": (r"fsync ledger", -1),
    "while the layers' files are removed": (r"unlink layer", 1),
    "before the manifest": (r"replace .edgetool.json", 0),
    "between the manifest and the removal of the ledger": (r"unlink ledger.jsonl", -1),
    "before the files are safe": (r"fsync tokenizer.json", -1),
    "before the last name": (r"rename .*partial", 0),
}


@pytest.mark.parametrize(("pattern", "which"), KILLS.values(), ids=[name.replace(" ", "-") for name in KILLS])
def test_a_run_killed_at_any_moment_gives_the_same_bytes_and_repeats_one_layer_at_most(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, pattern: str, which: int
) -> None:
    output = tmp_path / "out"
    killed = processes.run(*line(output), at=whole.step(pattern, which), signals=(signal.SIGKILL,))
    assert killed.code == -signal.SIGKILL
    assert not output.exists()
    resumed = processes.run(*line(output, "--resume"))
    assert resumed.code == 0, resumed.stderr
    assert_same(output, whole)
    assert len(layers_written(killed) & layers_written(resumed)) <= 1
    assert layers_written(killed) | layers_written(resumed) == {f"layer-{n:05d}" for n in range(LAYERS)}


def test_killed_again_and_again_it_still_gets_there(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    codes = []
    for steps in (50, 60, 45, 90, 130, 60, 0):
        ended = processes.run(*line(output, "--resume"), at=steps, signals=(signal.SIGKILL,) if steps else ())
        codes.append(ended.code)
        if ended.code == 0:
            break
    assert codes[0] == -signal.SIGKILL and len(codes) >= 4 and codes[-1] == 0
    assert_same(output, whole)


def test_killed_after_the_renaming_the_output_is_whole(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    last = whole.step(r"rename .*partial") + 1
    assert processes.run(*line(output), at=last, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    assert hashes(output) == whole.files
    refused = processes.run(*line(output, "--resume"))
    assert (refused.code, refused.document()["type"]) == (4, "BadInput")
    assert "exists already" in refused.document()["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("pattern", "kept"),
    [(r"pwrite activations-.*-0", "1 of 3 layers"), (r"pwrite model.safetensors", "not yet verified")],
    ids=["in-a-layer", "while-writing"],
)
def test_a_signal_stops_with_exit_75_and_the_command_that_goes_on(
    processes: ProcessServer,
    line: Line,
    whole: Whole,
    tmp_path: Path,
    number: signal.Signals,
    pattern: str,
    kept: str,
) -> None:
    output = tmp_path / "out"
    stopped = processes.run(*line(output), at=whole.step(pattern, 1), signals=(number,))
    assert stopped.code == 75, stopped.stderr
    document = stopped.document()
    assert (document["ok"], document["type"], document["exit_code"]) == (False, "Stopped", 75)
    assert kept in document["message"]
    assert not output.exists()
    command, *arguments = document["hint"].split()
    assert command == "edgetool" and arguments == [*line(output), "--resume"]
    assert processes.run(*arguments).code == 0
    assert_same(output, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once_and_loses_one_layer_at_most(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out"
    twice = processes.run(*line(output), at=whole.step(r"pwrite layer-00001", 3), signals=(number, number))
    assert twice.code == code
    assert twice.document()["exit_code"] == code
    resumed = processes.run(*line(output, "--resume"))
    assert resumed.code == 0, resumed.stderr
    assert_same(output, whole)
    assert layers_written(twice) & layers_written(resumed) == {"layer-00001"}


def test_a_signal_before_the_first_layer_is_a_stop_too(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stopped = processes.run(*line(output), at=whole.step(r"replace .calibration"), signals=(signal.SIGTERM,))
    assert stopped.code == 75
    assert not layers_written(stopped)
    assert processes.run(*line(output, "--resume")).code == 0
    assert_same(output, whole)


def test_an_overwriting_run_that_is_stopped_goes_on_by_its_own_hint_and_keeps_the_old_output_until_then(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert processes.run(*line(output, "--method", "rtn")).code == 0
    old = hashes(output)
    stopped = processes.run(
        *line(output, "--overwrite"), at=whole.step("pwrite layer-00002"), signals=(signal.SIGTERM,)
    )
    assert stopped.code == 75
    assert hashes(output) == old
    resumed = processes.run(*stopped.document()["hint"].split()[1:])
    assert resumed.code == 0, resumed.stderr
    assert "layer-00000" not in layers_written(resumed)
    assert_same(output, whole)


OTHER_OPTIONS = {
    "bits": ("--bits", "8"),
    "group_size": ("--group-size", "64"),
    "sym": ("--asym",),
    "method": ("--method", "rtn"),
    "format": ("--format", "compressed-tensors"),
    "calib_samples": ("--calib-samples", "5"),
    "seed": ("--seed", "1"),
    "quantize_lm_head": ("--quantize-lm-head",),
}


@pytest.mark.parametrize("stage", [r"pwrite layer-00001", r"unlink ledger.jsonl"], ids=["in-a-layer", "at-the-end"])
def test_resuming_with_other_options_is_refused_and_names_them(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, stage: str
) -> None:
    output = tmp_path / "out"
    step = whole.step(stage, -1)
    assert processes.run(*line(output), at=step, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    for name, options in OTHER_OPTIONS.items():
        refused = processes.run(*line(output, "--resume", *options))
        document = refused.document()
        assert (refused.code, document["type"]) == (4, "BadInput"), (name, refused.stderr)
        assert re.search(rf"has another ([a-z_]+\.)*{name}: ", document["message"]), (name, document["message"])
        assert "--overwrite" in document["hint"]
        assert not output.exists()
    resumed = processes.run(*line(output, "--resume"))
    assert resumed.code == 0, resumed.stderr
    assert_same(output, whole)


def test_resuming_with_another_model_in_the_same_place_is_refused(
    processes: ProcessServer, model: Path, whole: Whole, tmp_path: Path
) -> None:
    copy, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, copy)
    arguments = ("quantize", str(copy), "-o", str(output), *SMALL)
    step = whole.step("pwrite layer-00001")
    assert processes.run(*arguments, at=step, signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    refused = processes.run(*arguments, "--resume")
    assert refused.code == 4
    assert "has another source.config.json" in refused.document()["message"]


def test_resume_with_nothing_there_starts_anew(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    assert processes.run(*line(tmp_path / "out", "--resume")).code == 0
    assert_same(tmp_path / "out", whole)


def test_an_unfinished_run_is_not_thrown_away_without_a_word(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    processes.run(*line(output), at=whole.step("pwrite layer-00001"), signals=(signal.SIGKILL,))
    refused = processes.run(*line(output))
    assert refused.code == 4
    assert "--resume" in refused.document()["hint"] and "--overwrite" in refused.document()["hint"]
    anew = processes.run(*line(output, "--overwrite"))
    assert anew.code == 0
    assert "layer-00000" in layers_written(anew)
    assert_same(output, whole)


@pytest.mark.parametrize("option", [(), ("--resume",), ("--overwrite",)], ids=["plain", "resume", "overwrite"])
def test_two_runs_into_the_same_output_do_not_meet(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, option: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    first = processes.start(*line(output), at=whole.step("pwrite layer-00001"), signals=(signal.SIGSTOP,))
    deadline = time.monotonic() + 120
    while not (output.with_name("out.partial") / "layer-00001.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = processes.run(*line(output, *option))
    assert (second.code, second.document()["type"]) == (6, "ResourceUnavailable"), second.stderr
    assert str(first[0]) in second.document()["message"]
    while True:  # the first may only be about to stop
        Path(f"/proc/{first[0]}").stat()
        if "State:\tT" in Path(f"/proc/{first[0]}/status").read_text():
            break
        time.sleep(0.02)
    os.kill(first[0], signal.SIGCONT)
    assert processes.wait(first).code == 0
    assert_same(output, whole)


@pytest.mark.parametrize("torn", [b'{"layer": 1, "mod', b"\x00\x00\x00\n", b"null\n", b"\xff\xfe\n"])
def test_a_torn_line_at_the_end_of_the_ledger_counts_as_not_written(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, torn: bytes
) -> None:
    output = tmp_path / "out"
    processes.run(*line(output), at=whole.step("pwrite layer-00001"), signals=(signal.SIGKILL,))
    with (tmp_path / "out.partial" / "ledger.jsonl").open("ab") as ledger:
        ledger.write(torn)
    resumed = processes.run(*line(output, "--resume"))
    assert resumed.code == 0, resumed.stderr
    assert layers_written(resumed) == {"layer-00001", "layer-00002"}
    assert_same(output, whole)


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "gone"])
def test_damaged_activations_are_found(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "out"
    processes.run(*line(output), at=whole.step("pwrite layer-00001"), signals=(signal.SIGKILL,))
    # the input of layer 1; layer 0 read the other file
    activations = tmp_path / "out.partial" / "activations-quantised-1.bin"
    content = bytearray(activations.read_bytes())
    if damage == "flipped bit":
        content[1000] ^= 1
        activations.write_bytes(content)
    elif damage == "cut off":
        activations.write_bytes(content[:-100])
    else:
        activations.unlink()
    refused = processes.run(*line(output, "--resume"))
    assert (refused.code, refused.document()["type"]) == (4, "BadInput"), refused.stderr
    assert "damaged" in refused.document()["message"] and "--overwrite" in refused.document()["hint"]
    assert not output.exists()


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "gone"])
def test_a_damaged_layer_file_never_reaches_the_output(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "out"
    processes.run(*line(output), at=whole.step("pwrite layer-00001"), signals=(signal.SIGKILL,))
    layer = tmp_path / "out.partial" / "layer-00000.safetensors"
    content = bytearray(layer.read_bytes())
    if damage == "flipped bit":
        content[-100] ^= 1
        layer.write_bytes(content)
    elif damage == "cut off":
        layer.write_bytes(content[:-1])
    else:
        layer.unlink()
    refused = processes.run(*line(output, "--resume"))
    assert refused.code == (8 if damage == "flipped bit" else 4), refused.stderr
    assert refused.document()["ok"] is False
    assert not output.exists()


def test_a_checkpoint_damaged_before_its_verification_is_not_published(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    processes.run(*line(output), at=whole.step(r"unlink layer", 1), signals=(signal.SIGKILL,))
    weights = tmp_path / "out.partial" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x10
    weights.write_bytes(content)
    refused = processes.run(*line(output, "--resume"))
    assert (refused.code, refused.document()["type"]) == (8, "VerificationFailed"), refused.stderr
    assert not output.exists()


DISK_FULL = {
    "in the first layer": (r"pwrite layer-00000", 5, False),
    "in the activations of the second layer": (r"pwrite activations-.*-0", 1, True),
    "in the third layer": (r"pwrite layer-00002", 7, True),
    "in the ledger": (r"fsync ledger", 3, True),
    "in the checkpoint": (r"pwrite model.safetensors", 30, True),
    "in the manifest": (r"fsync .edgetool.json", 0, True),
}


@pytest.mark.parametrize(("pattern", "which", "kept"), DISK_FULL.values(), ids=[k.replace(" ", "-") for k in DISK_FULL])
def test_a_full_disk_is_one_clear_error_and_no_work_is_lost(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path, pattern: str, which: int, kept: bool
) -> None:
    output = tmp_path / "out"
    failed = processes.run(*line(output), at=whole.step(pattern, which), error=NO_SPACE)
    assert failed.code == 6, failed.stderr
    document = failed.document()
    assert (document["ok"], document["type"]) == (False, "ResourceUnavailable")
    assert "disk full" in document["message"] and "--resume" in document["hint"]
    assert not output.exists()
    assert output.with_name("out.partial").exists() == kept  # before the first layer there is nothing worth keeping
    resumed = processes.run(*line(output, "--resume"))
    assert resumed.code == 0, resumed.stderr
    assert len(layers_written(failed) & layers_written(resumed)) <= 1
    assert_same(output, whole)


def test_a_real_limit_on_the_size_of_files_is_one_clear_error(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    # larger than every layer's file, smaller than the checkpoint: fails while putting it together
    largest = (whole.output / "model.safetensors").stat().st_size
    failed = processes.run(*line(tmp_path / "out"), file_limit_bytes=largest - 1000)
    assert (failed.code, failed.document()["type"]) == (6, "ResourceUnavailable"), failed.stderr
    assert "larger than" in failed.document()["message"]
    assert not (tmp_path / "out").exists()
    assert processes.run(*line(tmp_path / "out"), file_limit_bytes=largest - 1000).code == 4
    assert processes.run(*line(tmp_path / "out", "--resume")).code == 0
    assert_same(tmp_path / "out", whole)


def test_the_same_input_and_seed_give_the_same_bytes_and_another_seed_another_calibration(
    processes: ProcessServer, line: Line, whole: Whole, tmp_path: Path
) -> None:
    assert processes.run(*line(tmp_path / "a" / "out")).code == 0
    assert_same(tmp_path / "a" / "out", whole)
    assert processes.run(*line(tmp_path / "b", "--seed", "1")).code == 0
    other = manifest_of(tmp_path / "b")
    assert other["calibration"]["sha256_of_token_ids"] != whole.manifest["calibration"]["sha256_of_token_ids"]
    assert hashes(tmp_path / "b")["model.safetensors"] != whole.files["model.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "awq"),
        ("--asymmetric-calibration",),
        ("--awq-scaling",),
        ("--desc-act", "--asym"),
        ("--quantize-lm-head",),
        ("--method", "rtn"),
        ("--calib", "self", "--calib-seqlen", "8"),
        ("--max-shard-size", "40kB"),
    ],
    ids=lambda options: "".join(options),
)
def test_every_recipe_can_be_taken_up_again(
    processes: ProcessServer, line: Line, tmp_path: Path, options: tuple[str, ...]
) -> None:
    undisturbed = processes.run(*line(tmp_path / "a", *options))
    assert undisturbed.code == 0, undisturbed.stderr
    steps = [number for number, step in enumerate(undisturbed.trace, 1) if "pwrite layer-00001" in step]
    killed = processes.run(*line(tmp_path / "b", *options), at=steps[2], signals=(signal.SIGKILL,))
    assert killed.code == -signal.SIGKILL
    assert processes.run(*line(tmp_path / "b", *options, "--resume")).code == 0
    assert hashes(tmp_path / "b") == hashes(tmp_path / "a")


def test_the_installed_command_survives_kill_9_when_its_progress_says_that_it_quantises(
    line: Line, whole: Whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "edgetool", *line(output), "--progress", "json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for text in child.stderr:
        event = json.loads(text)
        if event["event"] == "start" and event["task"] == "quantise":
            break
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["ok"] is True
    assert_same(output, whole)
