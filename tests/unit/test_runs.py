"""What surrounds every long run."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetool import runs
from edgetool.artifacts import OutputDirectory
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.runs import (
    FileHashes,
    available_memory_bytes,
    existing_parent,
    free_disk_bytes,
    refuse_overlap,
    stop_requests,
    tool_versions,
)


def test_the_nearest_existing_directory_is_found(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


def test_a_control_groups_limit_bounds_the_memory_and_its_cached_files_count_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_CGROUP", tmp_path)
    free = available_memory_bytes()
    assert free > 1 << 20
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    (tmp_path / "memory.max").write_text("1500000\n")
    assert available_memory_bytes() == 900_000
    (tmp_path / "memory.max").write_text("500000\n")
    assert available_memory_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes() > 1 << 20


def test_too_little_disk_is_refused_naming_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    assert free_disk_bytes(tmp_path / "out", 1000, "converting") == 1000
    with pytest.raises(ResourceUnavailable, match=r"converting needs about 1\.0 kB of disk, .* has 1\.0 kB free"):
        free_disk_bytes(tmp_path / "out", 1001, "converting")


@pytest.mark.parametrize(("output", "refused"), [("model", True), ("model/out", True), (".", True), ("out", False)])
def test_an_output_in_or_around_its_input_is_refused(output: str, refused: bool, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    out = OutputDirectory(tmp_path / output)
    if not refused:
        refuse_overlap(out, [model, tmp_path / "absent"])
        return
    with pytest.raises(BadInput, match="must not lie in one another"):
        refuse_overlap(out, [model])


@pytest.mark.parametrize("threads", [1, 3])
def test_hashes_are_those_of_the_bytes(threads: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (1 << 20) * number + b"end")
    with FileHashes(threads) as hashes:
        for path in paths:
            hashes.add(path)
        assert hashes.of(paths[1:]) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[1:]}


def test_a_stop_is_asked_for_once_and_the_second_signal_acts_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(timeout=10)
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stop_requests():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_versions_are_of_what_is_installed() -> None:
    import numpy

    versions = tool_versions("numpy", "not-a-package-of-anyone")
    assert versions["numpy"] == numpy.__version__
    assert versions.keys() == {"edgetool", "python", "numpy"}
