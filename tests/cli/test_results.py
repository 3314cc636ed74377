"""What success looks like: one document, or a table that nothing cuts; and progress on stderr in its four forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

QUANTIZE = ("quantize", "demo", "-o", "out")


def test_json_prints_exactly_one_document(edgetool: Callable[..., Any], fake_job: Any) -> None:
    result = edgetool(*QUANTIZE, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == {"schema": "edgetool.quantize/1", "ok": True, **fake_job.RESULT}


def test_json_stays_one_document_when_libraries_and_children_print(shell: Callable[..., Any]) -> None:
    result = shell(*QUANTIZE, "--json", job="print")
    assert json.loads(result.stdout)["ok"] is True
    assert "a library talks on stdout" in result.stderr
    assert "a child talks on stdout" in result.stderr


def test_numbers_that_json_does_not_have_become_null(edgetool: Callable[..., Any]) -> None:
    document = json.loads(edgetool(*QUANTIZE, "--json", job="nan").stdout, parse_constant=pytest.fail)
    assert document["worst_modules"][0]["relative_error"] is None


def test_the_table_off_a_terminal_is_whole_and_plain(shell: Callable[..., Any], fake_job: Any) -> None:
    result = shell(*QUANTIZE, env={"COLUMNS": "30"})
    assert result.returncode == 0
    assert fake_job.RESULT["worst_modules"][0]["module"] in result.stdout
    for shown in ("210", "650.0 MB", "output size", "112.0 MB", "blue ☀", "something to know"):
        assert shown in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert "…" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_text_that_the_locale_cannot_write_is_no_failure(shell: Callable[..., Any]) -> None:
    result = shell(*QUANTIZE, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert result.returncode == 0
    assert "blue \\u2600" in result.stdout


def test_a_dry_run_shows_the_plan(edgetool: Callable[..., Any]) -> None:
    result = edgetool(*QUANTIZE, "--dry-run")
    assert result.exit_code == 0
    for shown in ("plan", "650.0 MB", "gptq_marlin", "needs Hopper", "90 s"):
        assert shown in result.stdout
    assert "plan" in json.loads(edgetool(*QUANTIZE, "--dry-run", "--json").stdout)


def test_quiet_leaves_stderr_empty(edgetool: Callable[..., Any]) -> None:
    assert edgetool(*QUANTIZE, "--quiet").stderr == ""
    assert edgetool(*QUANTIZE, "--progress", "quiet").stderr == ""


def test_progress_json_is_one_event_a_line_even_when_the_command_fails(edgetool: Callable[..., Any]) -> None:
    lines = edgetool(*QUANTIZE, "--progress", "json", job="BadInput").stderr.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "note", "warning", "done", "error"]
    assert (events[3]["task"], events[3]["done"], events[3]["total"]) == ("quantise", 3, 3)
    assert events[4]["exit_code"] == 4


def test_progress_off_a_terminal_is_plain_lines(edgetool: Callable[..., Any]) -> None:
    stderr = edgetool(*QUANTIZE).stderr
    assert "\x1b" not in stderr and "\r" not in stderr
    assert "quantise: 0 of 3 layers" in stderr
    assert "quantise: done in" in stderr
    assert "warning: a warning" in stderr


def test_bars_can_be_forced(edgetool: Callable[..., Any]) -> None:
    result = edgetool(*QUANTIZE, "--progress", "bar")
    assert result.exit_code == 0
    assert "quantise" in result.stderr


def test_the_version_is_one_line(edgetool: Callable[..., Any]) -> None:
    from edgetool import __version__

    assert edgetool("--version").stdout == f"edgetool {__version__}\n"


def test_help_names_every_command(edgetool: Callable[..., Any]) -> None:
    shown = edgetool("--help").stdout
    built = ["quantize", "convert", "inspect", "demo", "compile-vcu128"]
    for command in [*built, "eval", "serve-gpu", "serve-fpga", "gpus"]:
        assert f"\n  {command} " in shown
