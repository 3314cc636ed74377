"""Output directories are whole or absent, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgetool import artifacts
from edgetool.artifacts import OutputDirectory, atomic_write, disk_errors, sha256_file, write_manifest
from edgetool.errors import BadInput, ResourceUnavailable


def fill(out: OutputDirectory, text: str) -> None:
    (out.partial / "sub").mkdir(exist_ok=True)
    (out.partial / "weights").write_text(text)
    (out.partial / "sub" / "file").write_text(text)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_output_appears_only_when_published_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "deep" / "out") as out:
        fill(out, "new")
        assert not out.output.exists()
        out.publish()
        assert (out.output / "weights").read_text() == "new"
    assert entries(tmp_path / "deep") == ["out"]


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="exists already") as caught, OutputDirectory(tmp_path / "out"):
        pass
    assert "--overwrite" in (caught.value.hint or "")
    assert entries(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("old")
    write_manifest(tmp_path / "out", {})
    with OutputDirectory(tmp_path / "out", overwrite=True) as out:
        fill(out, "new")
        assert (tmp_path / "out" / "weights").read_text() == "old"
        out.publish()
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_overwrite_works_where_the_kernel_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_exchange", lambda left, right: False)
    test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(tmp_path)


def test_overwrite_spares_directories_that_edgetool_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "project" / "src").mkdir(parents=True)
    with pytest.raises(BadInput, match="was not written by edgetool"):
        OutputDirectory(tmp_path / "project", overwrite=True).check()
    write_manifest(tmp_path / "project", {})
    OutputDirectory(tmp_path / "project", overwrite=True).check()


def test_overwrite_spares_files_that_edgetool_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "Qwen2.5-7B").mkdir()
    OutputDirectory(tmp_path / "Qwen2.5-7B", overwrite=True).check()  # an empty place loses nothing
    (tmp_path / "Qwen2.5-7B" / "model.safetensors").write_bytes(b"fetched for hours")
    with pytest.raises(BadInput, match="was not written by edgetool"):
        OutputDirectory(tmp_path / "Qwen2.5-7B", overwrite=True).check()


def test_overwrite_spares_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput):
        OutputDirectory(Path(), overwrite=True).check()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_or_a_link_in_the_place_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(BadInput, match="not a directory"):
            OutputDirectory(tmp_path / name, overwrite=overwrite).check()


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is not a directory"):
        OutputDirectory(tmp_path / "file" / "out").check()


def test_a_place_that_the_system_does_not_give_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cannot write"), OutputDirectory(Path("/proc/nowhere/out")):
        pass


def test_an_unfinished_run_is_kept_and_must_be_decided_upon(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), OutputDirectory(tmp_path / "out") as out:
        fill(out, "half")
        raise RuntimeError
    assert entries(tmp_path) == ["out.partial"]
    with pytest.raises(BadInput, match="unfinished") as caught, OutputDirectory(tmp_path / "out"):
        pass
    assert "--resume" in (caught.value.hint or "") and "--overwrite" in (caught.value.hint or "")
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert out.resuming
        assert (out.partial / "weights").read_text() == "half"
    with OutputDirectory(tmp_path / "out", overwrite=True) as out:
        assert entries(out.partial) == []
        out.discard()
    assert entries(tmp_path) == []


def test_resume_without_an_unfinished_run_starts_one(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert entries(out.partial) == []


def test_taking_a_run_up_removes_what_a_killed_write_left(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".config.json.123.tmp").write_text("half")
    (partial / ".hidden").write_text("not ours to remove")
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        out.publish()
    assert entries(tmp_path / "out") == [".hidden"]


def test_a_run_beside_one_that_is_under_way_is_told_so_whatever_its_options(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out"):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ResourceUnavailable, match=str(os.getpid())):
                OutputDirectory(tmp_path / "out", **options).open()
    with pytest.raises(BadInput, match="unfinished run"):
        OutputDirectory(tmp_path / "out").open()


def test_check_writes_nothing(tmp_path: Path) -> None:
    OutputDirectory(tmp_path / "deep" / "out").check()
    assert entries(tmp_path) == []


def test_a_second_run_into_the_same_place_is_refused_by_process_id(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out"):
        second = OutputDirectory(tmp_path / "out", resume=True)
        with pytest.raises(ResourceUnavailable, match=f"process {os.getpid()}"):
            second.open()
    with OutputDirectory(tmp_path / "out", resume=True):
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from edgetool.artifacts import OutputDirectory
        OutputDirectory(Path({str(tmp_path / "out")!r})).open()
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        out.discard()
    assert entries(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResourceUnavailable, match="disk full") as caught, disk_errors(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert "--resume" in (caught.value.hint or "")


def test_a_full_disk_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "file", b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ResourceUnavailable):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert entries(tmp_path) == ["file"]


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()


def test_a_directory_that_was_removed_under_the_writer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot write .*removed/file: No such file"):
        atomic_write(tmp_path / "removed" / "file", b"text")


def test_the_hash_is_that_of_the_bytes_also_over_piece_borders(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4097 + b"end"
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    (tmp_path / "file").write_bytes(data[:-1] + b"D")
    assert sha256_file(tmp_path / "file") != hashlib.sha256(data).hexdigest()


def test_the_manifest_is_sorted_indented_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"b": Path("x"), "a": {"d": 1, "c": "é"}})
    text = (tmp_path / "edgetool.json").read_text()
    assert text == '{\n  "a": {\n    "c": "é",\n    "d": 1\n  },\n  "b": "x"\n}\n'
    assert json.loads(text)["b"] == "x"
