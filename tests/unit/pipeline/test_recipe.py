"""Recipes as they are written down, and the command lines that they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from edgetool.cli import app
from edgetool.config import SECTIONS, key_of, option_of
from edgetool.config_values import off_of
from edgetool.pipeline.command_line import arguments, inserted
from edgetool.pipeline.commands import COMMANDS
from edgetool.pipeline.recipe import parse_recipe, preset

ROOT = Path(__file__).parent.parent.parent.parent
CLI: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["smoke", "gpu", "vcu128"])
def test_presets_are_recipes_without_model_and_output(name: str) -> None:
    recipe = preset(name)
    assert (recipe.model, recipe.output) == (None, None)
    assert recipe.steps[0].command.name == "quantize" and recipe.steps[-1].command.serves
    assert len(recipe.rungs()) == len(recipe.ladder) + 1 > 1


def test_the_recipe_in_the_documentation_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "run.md").read_text(), re.DOTALL)
    recipe = parse_recipe(text, "docs/run.md")
    assert [step.command.name for step in recipe.steps] == ["quantize", "eval", "compile-vcu128", "serve-fpga"]
    assert recipe.steps[1].references == {"model": "quantize", "against": "model"}
    assert recipe.rungs() == [{}, {"group_size": 64}, {"group_size": 128, "method": "awq"}]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_that_a_recipe_may_have_is_an_option_of_its_command(name: str) -> None:
    command = COMMANDS[name]
    spelled = {word for parameter in CLI[name].params for word in (*parameter.opts, parameter.metavar)}
    for item in SECTIONS[command.section].model_fields.items():
        if option_of(*item) and key_of(*item) not in command.set_by_us:
            assert option_of(*item) in spelled, item[0]
    assert command.set_by_us <= {
        "output",
        "resume",
        "overwrite",
        "dry_run",
        *(key_of(*item) for item in SECTIONS[command.section].model_fields.items()),
    }


@pytest.mark.parametrize("name", sorted(set(CLI) & {name.replace("_", "-") for name in SECTIONS}))
def test_switches_are_turned_off_as_the_command_line_spells_it(name: str) -> None:
    """`off_of` against typer's own words, for every switch that has them."""
    fields = {key_of(*item): item for item in SECTIONS[name.replace("-", "_")].model_fields.items()}
    for parameter in CLI[name].params:
        if parameter.secondary_opts and parameter.name in fields:
            assert parameter.secondary_opts == [off_of(*fields[parameter.name])], parameter.name


VALUES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("quantize", {"bits": 4, "model": "m", "output": "o"}, ["quantize", "m", "-o", "o", "--bits", "4"]),
    ("quantize", {"model": "m", "sym": False, "desc_act": False}, ["quantize", "m", "--asym"]),
    ("quantize", {"model": "m", "sym": True, "group_size": -1}, ["quantize", "m", "--sym", "--group-size", "-1"]),
    ("convert", {"source": "a b", "source_format": "gptq"}, ["convert", "a b", "--from", "gptq"]),
    ("eval", {"model": "m", "tasks": ["perplexity", "mmlu"]}, ["eval", "m", "--tasks", "perplexity,mmlu"]),
    (
        "serve-gpu",
        {"model": "m", "front": False, "extra": ["--seed", 1]},
        ["serve-gpu", "m", "--no-front", "--", "--seed", "1"],
    ),
    ("serve-fpga", {"image": "i", "max_queue": 3}, ["serve-fpga", "--image", "i", "--max-queue", "3"]),
    ("quantize", {"model": "m", "offline": True}, ["quantize", "m", "--offline"]),
]


@pytest.mark.parametrize(("name", "settings", "words"), VALUES)
def test_settings_are_spelled_as_options(name: str, settings: dict[str, Any], words: list[str]) -> None:
    assert arguments(COMMANDS[name], settings, "a step") == words


def test_the_spelled_command_is_understood_by_the_command_line_itself() -> None:
    settings = {
        "model": "m",
        "output": "o",
        "sym": False,
        "group_size": -1,
        "max_shard_size_bytes": "1GB",
        "method": "awq",
    }
    words = arguments(COMMANDS["quantize"], settings, "a step")
    shown = CliRunner().invoke(app, [*words, "--show-config"]).stdout
    for line in (
        'model = "m"',
        "sym = false",
        "group_size = -1",
        "max_shard_size_bytes = 1000000000",
        'method = "awq"',
    ):
        assert line in shown


def test_options_of_a_run_stand_before_what_a_command_passes_on() -> None:
    assert inserted(["serve-gpu", "m", "--", "--seed", "1"], ["--json"]) == [
        "serve-gpu",
        "m",
        "--json",
        "--",
        "--seed",
        "1",
    ]
    assert inserted(["quantize", "m"], ["--json"]) == ["quantize", "m", "--json"]
