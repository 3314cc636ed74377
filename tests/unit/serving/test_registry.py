"""The record of running servers, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from edgetool.errors import BadInput, ConfigError, ResourceUnavailable
from edgetool.process.tree import identify
from edgetool.serving import shared_memory
from edgetool.serving.registry import Registry
from edgetool.serving.secrets import hide_argument
from tests.fakes.started import started


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with tempfile.TemporaryDirectory(prefix="et-") as scratch:  # what tests leave behind goes with it
        monkeypatch.setattr("tempfile.tempdir", scratch)
        yield Registry(tmp_path / "servers")


def claim(registry, name="out", *, exact=False):
    return registry.claim(name, exact=exact, model="m", engine="vllm", device="cpu")


def of_another(registry, record, pid):
    """The same record as if another process had written it."""
    process = identify(pid)
    changed = replace(record, pid=process.pid, start_ticks=process.start_ticks)
    (registry.directory / f"{record.name}.json").write_text(json.dumps(changed.__dict__))
    return changed


def test_what_is_claimed_is_listed_until_it_is_dropped(registry):
    record = claim(registry)
    assert record.pid == os.getpid()
    assert [found.state for found in registry.records()] == ["starting"]
    registry.ready(record, [{"url": "http://x"}], [])
    assert [(found.state, found.servers[0]["url"]) for found in registry.records()] == [("ready", "http://x")]
    registry.drop(record)
    assert registry.records() == []


def test_a_name_that_is_taken_gets_a_number_unless_it_was_asked_for(registry):
    assert [claim(registry).name for _ in range(3)] == ["out", "out-2", "out-3"]
    with pytest.raises(ResourceUnavailable, match=str(os.getpid())):
        claim(registry, exact=True)


def test_many_at_once_get_different_names(registry):
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(claim(registry).name)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 16


def test_scratch_is_for_the_owner_alone_and_goes_with_the_record(registry):
    record = claim(registry)
    scratch = Path(record.scratch)
    assert scratch.stat().st_mode & 0o777 == 0o700
    # a path of 108 bytes and more cannot be a Unix socket
    assert len(str(scratch / "0" / "engine.sock")) < 100
    (scratch / "left").write_text("x")
    registry.drop(record)
    assert not scratch.exists()


def test_a_long_directory_for_temporary_files_is_passed_over(registry, tmp_path, monkeypatch):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    record = claim(registry)
    assert len(record.scratch) < 60
    assert not list(long.iterdir())
    registry.drop(record)


def test_what_a_killed_process_left_is_removed_by_the_next_look(registry):
    child = started(["sleep", "60"])
    record = of_another(registry, claim(registry), child.pid)
    assert [found.name for found in registry.records()] == ["out"]
    child.kill()
    child.wait()
    assert registry.records() == []
    assert not Path(record.scratch).exists()
    assert claim(registry, exact=True).name == "out"


def test_a_number_that_another_process_has_by_now_is_not_the_server(registry):
    child = started(["sleep", "60"])
    try:
        record = of_another(registry, claim(registry), child.pid)
        other = replace(record, start_ticks=record.start_ticks - 1)
        (registry.directory / "out.json").write_text(json.dumps(other.__dict__))
        with pytest.raises(BadInput, match="no server is named 'out'"):
            registry.stop("out", 5)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_stop_ends_the_process_and_says_so(registry):
    child = started(["sleep", "60"])
    threading.Thread(target=child.wait, daemon=True).start()
    of_another(registry, claim(registry), child.pid)
    stopped = registry.stop("out", 20)
    assert (stopped["stopped"], stopped["pid"]) == ("out", child.pid)
    assert registry.records() == []


def test_stop_of_a_name_that_is_not_there_says_which_are(registry):
    claim(registry, "here")
    with pytest.raises(BadInput) as caught:
        registry.stop("there", 1)
    assert "here" in str(caught.value.hint)


def test_damaged_records_are_passed_over(registry):
    claim(registry)
    for name, text in (("a", ""), ("b", "[]"), ("c", '{"name": "c"}'), ("d", "{")):
        (registry.directory / f"{name}.json").write_text(text)
    assert [found.name for found in registry.records()] == ["out"]


def test_a_directory_that_cannot_be_made_is_a_setting_that_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use the directory"):
        Registry(tmp_path / "file" / "servers").records()


def test_shared_memory_is_found_while_it_is_mapped_and_removed_only_after():
    memory = SharedMemory(create=True, size=4096)
    name = memory.name.lstrip("/")
    try:
        assert name in shared_memory.segments([os.getpid()])
        assert shared_memory.remove([name]) == []
        assert Path("/dev/shm", name).exists()
        memory.close()
        assert shared_memory.remove([name, "psm_../../etc/passwd", "other"]) == [name]
        assert not Path("/dev/shm", name).exists()
    finally:
        memory.close()
        if Path("/dev/shm", name).exists():
            memory.unlink()


def test_a_secret_among_the_arguments_is_not_to_be_seen_any_more():
    script = (
        "import sys; from edgetool.serving.secrets import hide_argument\n"
        "print(hide_argument(sys.argv[2]), flush=True); sys.stdin.read()"
    )
    arguments = ["--api-key", "K", "--api-key=K", "KEY", "out/K", "K"]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    shown = Path(f"/proc/{child.pid}/cmdline").read_text().split("\0")
    child.communicate()
    assert shown[-7:-1] == ["--api-key", "*", "--api-key=*", "KEY", "out/K", "*"]


def test_a_secret_that_is_no_argument_changes_nothing():
    before = Path("/proc/self/cmdline").read_bytes()
    assert not hide_argument("no such argument")
    assert not hide_argument("")
    assert Path("/proc/self/cmdline").read_bytes() == before
