"""The catalogue and the code agree: complete, nothing stale, values kept, no sentence taken for another."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from edgetool.cli import app
from edgetool.config import SECTIONS, must_of
from edgetool.messages.catalogue import Catalogue

ROOT = Path(__file__).parent.parent.parent
HOLE = re.compile(r"\{(\d+)\}")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield load("messages")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def said(tool: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = tool.said()
    return found


@pytest.fixture(scope="module")
def entries(tool: Any) -> dict[str, str]:
    found: dict[str, str] = tool.read()
    return found


def test_everything_that_is_said_has_a_translation(said: dict[str, list[str]], entries: dict[str, str]) -> None:
    missing = {english: places[0] for english, places in said.items() if english not in entries}
    assert not missing, "tools/messages.py prints them ready to be filled in"


def test_nothing_is_translated_that_is_said_no_more(tool: Any, entries: dict[str, str]) -> None:
    assert tool.stale(entries) == [], "tools/messages.py --prune takes them out"


def test_translations_name_the_same_values_and_are_chinese(tool: Any, entries: dict[str, str]) -> None:
    assert tool.faults(entries) == []


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("cannot write {1}: {2}", "无法写入 {1}"),
        ("cannot write {1}", "无法写入 {1}：{2}"),
        ("choose another", " "),
        ("choose another --output", "换一个，please choose another --output"),
    ],
)
def test_a_wrong_translation_is_found(tool: Any, english: str, chinese: str) -> None:
    assert len(tool.faults({english: chinese})) == 1


@pytest.mark.parametrize("value", ["V{}x", "/data/v{}.bin", "'q{}'", "{}.5"])
def test_each_sentence_finds_its_own_template(entries: dict[str, str], value: str) -> None:
    catalogue = Catalogue(entries)
    wrong = []
    for template, target in entries.items():
        for english in {template.replace("{s}", ""), template.replace("{s}", "s")}:
            bare = not re.search(r"[A-Za-z]", re.sub(r"\{\d+\}|\b(of|or|to)\b", "", english))
            if bare and not value.startswith("{"):
                continue  # `3 of 30`: with anything but numbers these would be any two words
            text, expected = (HOLE.sub(lambda hole: value.format(hole[1]), one) for one in (english, target))
            if catalogue.label(text) != expected:
                wrong.append((text, catalogue.label(text), expected))
    assert not wrong


def test_every_help_text_is_in_the_catalogue(entries: dict[str, str]) -> None:
    """Read from the parsed command line, not from the source: an oracle for the extraction."""
    missing = [text for text in help_texts(typer.main.get_command(app)) if text not in entries]
    assert not missing
    assert sum(1 for _ in help_texts(typer.main.get_command(app))) > 300


def help_texts(command: Any) -> Iterator[str]:
    for paragraph in (command.help or "").split("\n\n"):
        if paragraph:
            yield " ".join(paragraph.split())
    for parameter in command.params:
        if getattr(parameter, "help", None):
            yield " ".join(parameter.help.split())
    for below in getattr(command, "commands", {}).values():
        yield from help_texts(below)


def test_every_requirement_of_a_setting_is_in_the_catalogue(entries: dict[str, str]) -> None:
    musts = {must_of(field) for section in SECTIONS.values() for field in section.model_fields.values()}
    assert {must for must in musts if " " in must and must not in entries} == set()
    assert len(musts) > 60


SOURCE = """
HINT = "ask somebody who knows"
def f(path, name, count, many, error):
    where = f" ({name})" if name else ""
    kind = "a file" if many else "a directory"
    raise BadInput(f"{path} is {kind}, and was not wanted{where}", HINT)
def g(path, names, count):
    text = f"{count} tensor{'s' if count != 1 else ''} missing in {path}" + (f": {names}" if names else "")
    progress.note("reading " + path + " again")
    raise BadInput(text if count else "no tensors at all", hint=f"use --max {count}")
def h(log, config):
    log.info("never shown to a person")
    if config == "compared with a text":
        raise ValueError("this was wrong: " f"{config!r} is no value")
    return {"a key with words": 1}["a key with words"]
"""


def test_messages_are_found_in_all_the_shapes_that_code_gives_them(tool: Any) -> None:
    found = {template for template, _ in sys.modules["message_templates"].module_templates(SOURCE, "x.py")}
    assert found >= {
        "ask somebody who knows",
        "{1} is a file, and was not wanted",
        "{1} is a directory, and was not wanted",
        "{1} tensor{s} missing in {2}",
        "{1} tensor{s} missing in {2}: {3}",
        "reading {1} again",
        "no tensors at all",
        "use --max {1}",
        "this was wrong: {1} is no value",
    }
    assert not {one for one in found if "never shown" in one or "compared" in one or "a key" in one}


def test_words_of_typer_are_those_of_the_installed_typer() -> None:
    sources = "".join(path.read_text() for path in Path(typer.__file__).parent.rglob("*.py"))
    scope = sys.modules.get("message_scope") or load("message_scope")
    whole = [text for text in scope.FIXED["typer"] if " " in text and "{" not in text and "Input should" not in text]
    assert len(whole) > 3
    for text in whole:  # those with values are met by the tests of the command line
        assert text in re.sub(r'"\s*\n\s*f?"', "", sources)
