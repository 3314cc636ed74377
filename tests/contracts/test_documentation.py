"""Documentation, help texts, recipes and the Makefile agree with the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from edgetool.cli import app
from edgetool.commands._run import NOT_SETTINGS
from edgetool.config import SECTIONS, key_of, load, option_of

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in {".toml", ".yaml", ".yml"})
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


BUILT = [
    "quantize", "convert", "inspect", "demo", "compile-vcu128", "bench", "envs", "gpus", "serve-gpu", "serve-fpga",
    "fpga-host", "chat", "eval", "run", "jobs",
]  # fmt: skip

FETCH_NOTHING = {"bench", "envs", "gpus", "serve-fpga", "fpga-host", "chat", "run", "jobs"}
"""Commands that take no model: an option that does nothing would only mislead."""


def every_parameter(command: str) -> list[Any]:
    """Of the command and of its sub-commands, which read the same section."""
    parsed = [COMMANDS[command], *getattr(COMMANDS[command], "commands", {}).values()]
    return [parameter for one in parsed for parameter in one.params]


def settings_of(command: str) -> list[tuple[str, Any]]:
    """Name and field of every setting that the command may read: its own and those of all commands."""
    sections = SECTIONS["common"], SECTIONS[command.replace("-", "_")]
    return [item for section in sections for item in section.model_fields.items()]


def parameters(command: str) -> dict[str, Any]:
    return {p.name: p for p in every_parameter(command) if p.name not in {"help", *NOT_SETTINGS}}


def section_of(command: str) -> str:
    return command.replace("-", "_")


@pytest.mark.parametrize("page", ["cli.md", "config.md", "exit-codes.md"])
def test_generated_pages_are_fresh(page: str) -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec and spec.loader
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert (ROOT / "docs" / page).read_text() == generator.PAGES[page](), "run make docs"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(recipe: Path) -> None:
    config = load("quantize", {"model": "demo", "output": "out"}, recipe, {})
    assert any(str(recipe) in origin for origin in config.origins.values())


def test_there_are_recipes_in_both_languages() -> None:
    assert {path.suffix for path in RECIPES} >= {".toml", ".yaml"}


@pytest.mark.parametrize("command", BUILT)
def test_every_option_is_a_setting_and_defaults_to_not_given(command: str) -> None:
    known = {key_of(*item) for name in ("common", section_of(command)) for item in SECTIONS[name].model_fields.items()}
    for name, parameter in parameters(command).items():
        assert name in known
        assert parameter.default is None


@pytest.mark.parametrize("command", BUILT)
def test_every_setting_with_an_option_has_it(command: str) -> None:
    spelled = {spelling for p in every_parameter(command) for spelling in (*p.opts, *p.secondary_opts, p.metavar)}
    for item in settings_of(command):
        if command in FETCH_NOTHING and item[0] in ("cache_dir", "offline"):
            continue
        assert not option_of(*item) or option_of(*item) in spelled


def as_typed(default: object) -> str:
    """A default as a user would write it: 1,8 for a list, 600 for 600.0."""
    if isinstance(default, tuple):
        return ",".join(map(as_typed, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


@pytest.mark.parametrize("command", BUILT)
def test_defaults_in_help_texts_are_those_of_the_configuration(command: str) -> None:
    fields = {key_of(*i): i[1] for name in ("common", section_of(command)) for i in SECTIONS[name].model_fields.items()}
    for name, parameter in parameters(command).items():
        default = fields[name].default
        stated = re.search(r"\[default: (.+)\]", parameter.help)
        if isinstance(default, bool) and parameter.secondary_opts:
            default = (parameter.opts if default else parameter.secondary_opts)[0].removeprefix("--")
        if name == "max_shard_size_bytes":
            default = "5GB"
        if stated and default is not None and fields[name].default_factory is None:
            assert stated[1] == as_typed(default), name


@pytest.mark.parametrize("group", [(), ("envs",), ("gpus",), ("jobs",)])
def test_lists_of_commands_are_cut_nowhere_on_80_columns(group: tuple[str, ...]) -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*group, "--help"])
    assert shown.exit_code == 0 and "Commands:" in shown.stdout
    assert not [line for line in shown.stdout.splitlines() if line.endswith("...") and not line.startswith("Usage")]


def test_the_makefile_and_ci_hold_what_the_readme_promises() -> None:
    readme, makefile, ci = ((ROOT / name).read_text() for name in ("README.md", "Makefile", ".ci/run"))
    first_screen = "\n".join(readme.splitlines()[:24])
    for target in ("demo", "test"):
        assert f"\nmake {target} " in first_screen
        assert re.search(rf"^{target}: \$\(READY\)", makefile, re.MULTILINE)
    runs = [line for line in ci.splitlines() if line.startswith("make")]
    assert runs == ["make test", "make check", "make test-slow"]


def test_constraints_are_exact_and_leave_the_build_of_torch_open() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert "torch==2.13.0" in lines
