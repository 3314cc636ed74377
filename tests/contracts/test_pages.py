"""What the pages say can be followed: links lead somewhere, command lines parse, options and variables exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edgetool.cli import app

ROOT = Path(__file__).parent.parent.parent
FILES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.[mty]*", "tests/golden/*.md")
    for path in ROOT.glob(pattern)
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(FILES)}
GENERATED = {"docs/cli.md", "docs/config.md"}
WRITTEN = [name for name in PAGES if name not in GENERATED]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])")
REDIRECTION = re.compile(r"\s\d?(?:>>?|<)\s*(?:&\d|\S+)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")

OTHERS = {
    "pip": {"--no-deps"},
    "systemd-tmpfiles": {"--create"},
    "ray": {"--head", "--address", "--block"},
    "vLLM": {"--max-num-seqs"},
    "mypy": {"--strict"},
    "benchmarks and tools": {"--repeat", "--starts", "--requests", "--add", "--prune", "--where"},
    "a slip of the hand": {"--group-sise"},
}
"""Options that are not ours."""

GROUP: Any = typer.main.get_command(app)


def links() -> Iterator[tuple[str, str]]:
    for name, text in PAGES.items():
        for target in LINK.findall(FENCE.sub("", text) if name.endswith(".md") else ""):
            if "://" not in target:
                yield name, target


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return kept.replace(" ", "-")


def headings(text: str) -> set[str]:
    return {slug(line.lstrip("#")) for line in FENCE.sub("", text).splitlines() if re.match(r"#+ ", line)}


@pytest.mark.parametrize(("page", "target"), sorted(set(links())))
def test_every_link_leads_somewhere(page: str, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
    name = str(path.relative_to(ROOT))
    assert path.exists(), f"{page} links to {target}"
    assert not anchor or anchor in headings(path.read_text()), f"{page}: {name} has no heading {anchor}"


def commands_in(text: str, page: str = "page.md") -> Iterator[str]:
    """Each `edgetool ...` of code blocks, code spans and comments of recipes, with lines that go on joined."""
    if not page.endswith(".md"):
        text = "".join(f"`{line[line.index('edgetool ') :]}`\n" for line in text.splitlines() if "edgetool " in line)
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "sh")]
    spans = re.findall(r"`(edgetool [^`]+)`", FENCE.sub("", text))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in [*lines, *spans]:
        for part in re.split(r"\s(?:&&|\|\||;|\|)\s|;\s", line):
            found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(edgetool (?:-|\w).*)", part)
            if found:
                yield found[1].strip()


COMMANDS = sorted({(name, line) for name in WRITTEN if not name.endswith(".py") for line in commands_in(PAGES[name])})


def parse(words: list[str]) -> None:
    """Parse as a shell would hand it over; raises what typer raises."""
    command, context = GROUP, None
    while hasattr(command, "commands") and words and words[0] in command.commands:
        context = context or GROUP.make_context("edgetool", [], resilient_parsing=True)
        command, words = command.commands[words[0]], words[1:]
    assert context is not None, "no such command"
    assert not hasattr(command, "commands") or not words or words[0].startswith("-"), f"no {command.name} {words[0]}"
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_line_parses(page: str, line: str) -> None:
    words = shlex.split(REDIRECTION.sub("", re.sub(r"\s\.\.\.|[\[\]]", "", line)), comments=True)[1:]
    if not words or PLACEHOLDER.fullmatch(words[0]) or words[0] in ("--version", "--help", "COMMAND"):
        return
    if "--help" in words:
        words.remove("--help")
    # a placeholder stands for a number where one is wanted
    words = [{"N": "1", "X": "0.5"}.get(word, word) for word in words]
    try:
        parse(words)
    except Exception as error:
        # a group is named, or an option without its value: there they are
        if type(error).__name__ == "NoArgsIsHelpError" or str(error).endswith(f"'{words[-1]}' requires an argument."):
            return
        raise AssertionError(f"{page}: {line}\n{getattr(error, 'message', error)}") from error


def options() -> set[str]:
    """Every option of every command."""

    def of(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for below in getattr(command, "commands", {}).values():
            yield from of(below)

    return {name for name in of(GROUP) if name.startswith("--")} | {"--help"}


@pytest.mark.parametrize("page", WRITTEN)
def test_no_page_names_an_option_that_does_not_exist(page: str) -> None:
    unknown = set(OPTION.findall(PAGES[page])) - options() - set().union(*OTHERS.values())
    assert not unknown


@pytest.mark.parametrize("page", WRITTEN)
def test_no_page_names_a_variable_that_does_not_exist(page: str) -> None:
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py")) + PAGES["docs/config.md"]
    named = set(re.findall(r"EDGETOOL_[A-Z][A-Z0-9_]*[A-Z0-9]", PAGES[page]))
    assert not {name for name in named if name not in source}


def test_every_page_can_be_found_from_the_index() -> None:
    linked = {target.partition("#")[0] for page, target in links() if page == "docs/README.md"}
    assert {Path(name).name for name in PAGES if Path(name).parent == Path("docs")} - {"README.md"} <= linked


def test_the_page_of_the_scheduler_has_the_layers_that_import_linter_holds() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in settings if one.get("containers") == ["edgetool.scheduler"])
    assert "\n" + " -> ".join(layers) + "\n" in PAGES["docs/scheduler.md"]


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(PAGES["README.md"].splitlines()) < 200


@pytest.mark.parametrize(
    "line",
    [
        "edgetool quantize demo --group-sise 64",
        "edgetool frobnicate",
        "edgetool quantize --bits four",
        "edgetool jobs log 1",
    ],
)
def test_a_command_line_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        test_every_command_line_parses("page", line)


def test_command_lines_are_found_where_they_stand() -> None:
    text = "`edgetool jobs`\n```sh\nA=1 edgetool run x \\\n  --json | jq .; edgetool gpus  # who\n```\n"
    text += "```json\nedgetool no\n```\n"
    assert list(commands_in(text)) == ["edgetool run x    --json", "edgetool gpus  # who", "edgetool jobs"]
