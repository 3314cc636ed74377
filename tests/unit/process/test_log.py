"""Logs stay small and lose nothing that fits; readers see every line, however it ends."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest

from edgetool.process.log import LogFollower, RotatingLog, last_lines, older


def test_old_logs_move_up_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    log = RotatingLog(path, limit_bytes=10, keep=2)
    for text in (b"aaaaaaaa\n", b"bbbbbbbb\n", b"cccccccc\n", b"dddddddd\n"):
        log.write(text)
    assert path.read_bytes() == b"dddddddd\n"
    assert older(path, 1).read_bytes() == b"cccccccc\n"
    assert older(path, 2).read_bytes() == b"bbbbbbbb\n"
    assert sorted(tmp_path.iterdir()) == sorted([path, older(path, 1), older(path, 2)])


def test_without_old_logs_only_the_newest_is_kept(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "x.log", limit_bytes=4, keep=0)
    log.write(b"one\n")
    log.write(b"two\n")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"two\n"]


def test_a_log_of_an_earlier_run_counts_for_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"before\n")
    RotatingLog(path, limit_bytes=8, keep=1).write(b"after\n")
    assert (path.read_bytes(), older(path, 1).read_bytes()) == (b"after\n", b"before\n")


def test_a_log_that_cannot_be_renamed_is_written_on(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    older(path, 1).mkdir()
    (older(path, 1) / "in the way").touch()
    log = RotatingLog(path, limit_bytes=4, keep=1)
    log.write(b"one\n")
    log.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_what_a_full_disk_lost_is_counted_and_said(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = RotatingLog(path, limit_bytes=100, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))  # the third byte is one too many, as on a full disk
    try:
        for text in (b"12345", b"678"):
            log.write(text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(b"more\n")
    assert path.read_bytes() == b"12\n[6 bytes of output lost: the log could not be written]\nmore\n"


def test_logs_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    RotatingLog(tmp_path / "x.log", 100, 1)
    assert (tmp_path / "x.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("limit_bytes", [7, 50, 10**6])
def test_a_follower_sees_every_line_once_across_rotations(tmp_path: Path, limit_bytes: int) -> None:
    path = tmp_path / "x.log"
    log = RotatingLog(path, limit_bytes, keep=3)
    log.write(b"before\n")
    follower = LogFollower(path)
    seen: list[str] = []
    for number in range(200):
        log.write(f"line {number}\n".encode())
        seen += follower.lines()
    assert seen == [f"line {number}" for number in range(200)]


@pytest.mark.filterwarnings("error")
def test_a_follower_of_a_log_that_is_gone_says_so_and_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LogFollower(tmp_path / "gone.log")
    gc.collect()


def test_progress_bars_are_lines_and_control_codes_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.touch()
    follower = LogFollower(path)
    with path.open("ab", buffering=0) as stream:
        stream.write(b"\rLoading:  50%|\x1b[32m##\x1b[0m|\rLoading: 100%\r\n\r\n")
        assert follower.lines() == ["Loading:  50%|##|", "Loading: 100%"]
        stream.write(b"caf\xc3")
        assert follower.lines() == []
        stream.write(b"\xa9 \xff\nrest")
        assert follower.lines() == ["café \N{REPLACEMENT CHARACTER}"]
        assert follower.lines(final=True) == ["rest"]


def test_a_line_without_end_is_given_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.touch()
    follower = LogFollower(path)
    path.write_bytes(b"x" * 200_000)
    assert sum(len(line) for line in follower.lines()) == 200_000


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(10_000)))
    assert last_lines(path, 3) == "line 9997\nline 9998\nline 9999"
    assert last_lines(tmp_path / "absent", 3) == ""
