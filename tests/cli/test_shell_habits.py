"""Pipes that end early, full disks, closed streams, odd terminals and homes: what scripts do to a program."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from edgetool import console
from edgetool.config import load
from edgetool.errors import ConfigError, ReaderGone, ResourceUnavailable
from tests.fakes.openai_server import Running, Stranger

INVENTORY = str(Path(__file__).parent.parent / "fakes" / "nvml_eight_gpus.json")
COMMANDS = [
    ["--version"],
    ["--help"],
    ["quantize", "--help"],
    ["gpus"],
    ["gpus", "--json"],
    ["jobs", "--json"],
    ["quantize", "demo", "-o", "out", "--show-config"],
    ["run", "--preset", "smoke", "demo", "--show-recipe"],
    ["completion", "zsh"],
]


def through_shell(script: str, arguments: list[str], directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`script` with edgetool and its arguments as "$@", in bash."""
    return subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "edgetool", *arguments],
        cwd=directory,
        env={**os.environ, "EDGETOOL_NVML_FIXTURE": INVENTORY, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_reader_that_goes_away_is_no_bug(arguments: list[str], tmp_path: Path) -> None:
    # `exec 3>&1` and so on would be no test: the reader has to be gone before anything is written
    result = through_shell('{ sleep 0.2; "$@"; echo $? >code; } | true', arguments, tmp_path)
    assert (tmp_path / "code").read_text() == "141\n"
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_said_once(arguments: list[str], tmp_path: Path) -> None:
    result = through_shell('"$@" >/dev/full', arguments, tmp_path)
    assert result.returncode == 6
    assert result.stderr.startswith("error: the output cannot be written to stdout: No space left on device\nhint: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("redirected", ["| true", ">/dev/full"])
def test_a_failure_keeps_its_exit_code_where_its_document_finds_no_reader(redirected: str, tmp_path: Path) -> None:
    script = f'{{ sleep 0.2; "$@"; echo $? >code; }} {redirected}'
    result = through_shell(script, ["inspect", "nothing-here", "--json"], tmp_path)
    assert (tmp_path / "code").read_text() == "4\n"
    assert result.stderr.startswith("error: nothing-here")


def test_words_that_cannot_be_said_cost_no_result(tmp_path: Path) -> None:
    result = through_shell('"$@" 2>/dev/full', ["gpus", "--json"], tmp_path)
    assert result.returncode == 0
    assert json.loads(result.stdout)["ok"] is True
    assert through_shell('"$@" 2>/dev/full', ["inspect", "nothing-here"], tmp_path).returncode == 4


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(closed: str, tmp_path: Path) -> None:
    for arguments, code in ((["gpus", "--json"], 0), (["--help"], 0), (["inspect", "nothing-here", "--json"], 4)):
        result = through_shell(f'"$@" {closed}', arguments, tmp_path)
        assert result.returncode == code
        assert "Traceback" not in result.stderr
        if ">&-" not in closed.replace("2>&-", ""):
            assert result.stdout


def test_what_a_closed_stream_would_have_said_lands_in_no_file(tmp_path: Path) -> None:
    """With stdout closed the next file to be opened has its number: the job store, here."""
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "EDGETOOL_JOBS_RECORD": "1"}
    through_shell('"$@" >&- 2>&-', ["quantize", "nothing-here", "-o", "out"], tmp_path, **environment)
    listed = through_shell('"$@"', ["jobs", "--json"], tmp_path, **environment)
    assert [job["exit_code"] for job in json.loads(listed.stdout)["jobs"]] == [4]


def test_a_command_under_a_lease_that_loses_its_reader_ends_as_without_edgetool(tmp_path: Path) -> None:
    script = '{ "$@"; echo $? >code; } | head -1'
    result = through_shell(script, ["gpus", "run", "--quiet", "--", "seq", "1000000"], tmp_path)
    assert (result.stdout, (tmp_path / "code").read_text()) == ("1\n", "141\n")


def test_a_removed_working_directory_is_named_before_libraries_fail_in_it(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = 'cd gone && rmdir ../gone && "$@"'
    for arguments in (["quantize", "demo", "-o", "out"], ["demo"], ["eval", "m", "--tasks", "perplexity", "-o", "o"]):
        result = through_shell(script, arguments, tmp_path)
        assert result.returncode == 4
        assert result.stderr.startswith("error: the working directory has been removed")
        (tmp_path / "gone").mkdir()
    assert through_shell(script, ["gpus", "--json"], tmp_path).returncode == 0


def test_a_full_disk_under_the_result_stream_leaves_the_process_its_stdout(tmp_path: Path) -> None:
    """In-process, since a later block of the same command would write into the wrong stream."""
    code = (
        "import os, sys\nfrom edgetool.console import Output\n"
        "output = Output('edgetool.x/1', True)\n"
        "try:\n    with output.reserved():\n        output.result({}, [])\n"
        "except Exception as error:\n    print(type(error).__name__, file=sys.stderr)\n"
        "print(os.readlink('/proc/self/fd/1'), file=sys.stderr)\n"
    )
    result = subprocess.run(["bash", "-c", '"$0" -c "$1" >/dev/full', sys.executable, code], capture_output=True)
    assert result.stderr.decode().split() == ["ResourceUnavailable", "/dev/full"]


def test_the_two_ways_to_lose_stdout_are_told_apart() -> None:
    assert isinstance(console.unwritable(BrokenPipeError(32, "Broken pipe")), ReaderGone)
    assert isinstance(console.unwritable(OSError(28, "No space left on device")), ResourceUnavailable)


def on_terminal(arguments: list[str], columns: int, **env: str) -> str:
    """What edgetool shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-m", "edgetool", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, **env},
    ) as process:
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                try:
                    piece = os.read(ours, 65536)
                except OSError:
                    break
                if not piece:
                    break
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    return shown.decode()


def test_a_narrow_terminal_gets_words_and_not_columns_of_letters() -> None:
    gpus = {"EDGETOOL_NVML_FIXTURE": INVENTORY}
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(["gpus", "-q"], 20, TERM="xterm", **gpus))
    wide = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(["gpus", "-q"], 300, TERM="xterm", **gpus))
    assert max(map(len, shown.splitlines())) <= 60 < max(map(len, wide.splitlines()))
    assert len(shown.splitlines()) < 8 * len(wide.splitlines())


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1"}])
def test_a_dumb_terminal_gets_no_control_codes(env: dict[str, str]) -> None:
    assert "\x1b" not in on_terminal(["gpus"], 80, EDGETOOL_NVML_FIXTURE=INVENTORY, **env)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/h"}, "/h/.cache/edgetool"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/edgetool"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "relative"}, "/h/.cache/edgetool"),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, "/h/.cache/edgetool"),
    ],
)
def test_directories_of_ones_own_follow_home(environ: dict[str, str], expected: str) -> None:
    assert load("inspect", {}, None, environ, complete=False).common.cache_dir == Path(expected)


def test_without_home_the_user_database_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    entry: Any = type("Entry", (), {"pw_dir": "/of/the/database"})
    monkeypatch.setattr("pwd.getpwuid", lambda _uid: entry)
    for environ in ({}, {"HOME": ""}):
        cache = load("inspect", {}, None, environ, complete=False).common.cache_dir
        assert cache == Path("/of/the/database/.cache/edgetool")


def test_a_user_without_any_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match="HOME is not set"):
        load("inspect", {}, None, {}, complete=False)


def test_control_characters_of_an_answer_reach_files_and_no_terminal(tmp_path: Path) -> None:
    evil = "a\x1b]0;title\x07b\x9bc\x08d\te"
    with Running(Stranger(text=evil)) as server:
        arguments = ["chat", server.url, "-m", "hi", "--max-tokens", "1", "--quiet"]
        assert through_shell('"$@"', arguments, tmp_path).stdout.startswith(evil)
        shown = on_terminal(arguments, 80)
    assert "a\u241b]0;title\u2407b\ufffdc\u2408d\te" in shown
    assert "\x1b]" not in shown and "\x9b" not in shown
