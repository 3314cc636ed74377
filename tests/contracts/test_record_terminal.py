"""tools/record_terminal.py: what a program leaves on a terminal's screen, and the picture of it in the README."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
PICTURE = ROOT / "docs" / "images" / "terminal.svg"


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_terminal", ROOT / "tools" / "record_terminal.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_in(svg: str) -> str:
    """The text of a picture, line by line (a text element is a run of one style)."""
    rows: dict[str, list[str]] = {}
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        rows.setdefault(element.get("y", ""), []).append("".join(element.itertext()))
    return "\n".join("".join(parts).replace("\xa0", " ").rstrip() for parts in rows.values())


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("one\r\ntwo\r\n", ["one", "two", ""]),
        ("50 %\r60 %", ["60 %"]),
        ("a\r\nb\r\x1b[1A\x1b[2Kdone\r\nnow\r\n", ["done", "now", ""]),
        ("\x1b[?25l\x1b[31mred\x1b[0m\x1b[?25h", ["\x1b[31mred\x1b[0m"]),
    ],
)
def test_the_screen_shows_what_a_terminal_does(recorder: ModuleType, written: str, left: list[str]) -> None:
    screen = recorder.Screen()
    screen.feed(written)
    assert screen.lines == left


def test_a_sequence_that_it_does_not_know_is_no_guess(recorder: ModuleType) -> None:
    with pytest.raises(ValueError, match="does not know"):
        recorder.Screen().feed("\x1b[5;5H")


def test_a_command_is_run_in_a_terminal_and_drawn(recorder: ModuleType, tmp_path: Path) -> None:
    script = "import sys; print(sys.stdout.isatty(), end='\\r'); print('\\x1b[1mTrue, really\\x1b[0m <&>')"
    code, written = recorder.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}; exit 3", tmp_path)
    assert code == 3
    svg = recorder.picture([("true", written)], "title")
    assert words_in(svg).splitlines()[1:3] == ["$ true", "True, really <&>"]
    assert recorder.picture([("true", written)], "title") == svg


def test_the_picture_in_the_readme_is_of_the_commands_of_the_tool(recorder: ModuleType) -> None:
    shown = words_in(PICTURE.read_text())
    for command in recorder.COMMANDS:
        assert f"$ {command}" in shown


def test_the_picture_fetches_nothing_and_names_no_machine() -> None:
    svg = PICTURE.read_text()
    assert not re.search(r"url\((?!#)|<image|<script|@font-face|@import", svg)
    assert not re.search(r"/(?:tmp|root|home|work)\b", words_in(svg))
    assert "error:" not in words_in(svg)
