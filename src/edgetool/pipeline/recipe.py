"""Recipes: which commands run, with which settings, on whose output. All of it is checked before anything runs."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from edgetool.config import SECTIONS, keys
from edgetool.errors import ConfigError
from edgetool.pipeline.commands import COMMANDS, Command

MODEL = "model"
"""What a recipe calls the model that the run starts from."""

_RUN_KEYS = ("model", "output", "ladder")
_SERVED_KEYS = {"ask": "What is the capital of France?", "ask_tokens": 16}
_COMMON_KEYS = ("offline", "cache_dir")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_RESERVED = {MODEL, "logs"}


@dataclass(frozen=True)
class Reference:
    """The output of a step, or the run's model."""

    step: str


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    settings: key -> value as the command's section knows it, or a Reference. ask, ask_tokens: the question that a
    server is asked, and the most tokens of its answer.
    """

    name: str
    command: Command
    settings: Mapping[str, Any]
    ask: str
    ask_tokens: int

    @property
    def references(self) -> dict[str, str]:
        """Key -> the step (or MODEL) that it refers to."""
        return {key: value.step for key, value in self.settings.items() if isinstance(value, Reference)}

    @property
    def gated(self) -> bool:
        """Whether it may find that the model is not good enough."""
        return self.settings.get("gate") is not None


@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they run. ladder: settings of the quantize step for each further attempt; each rung
    keeps what those before it have changed.
    """

    name: str
    text: str
    model: str | None
    output: str | None
    ladder: tuple[Mapping[str, Any], ...]
    steps: tuple[Step, ...]

    def rungs(self) -> list[dict[str, Any]]:
        """The changes of each attempt, that of the first being none."""
        found: list[dict[str, Any]] = [{}]
        for rung in self.ladder:
            found.append({**found[-1], **rung})
        return found

    def on_rung(self, changes: Mapping[str, Any]) -> tuple[Step, ...]:
        """The steps of one attempt."""
        return tuple(
            replace(step, settings={**step.settings, **changes}) if step.command.name == "quantize" else step
            for step in self.steps
        )


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file. changes: settings in place of its own, such as `quantize.group_size=64`.

    Raises:
        ConfigError: the file cannot be read, or says what cannot be done; the nearest name is named.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors of Windows put a mark before the text
    except OSError as error:
        hint = "a model is run by: edgetool run MODEL --preset smoke -o DIR"
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} is no text in UTF-8") from error
    return parse_recipe(text, str(path), changes)


def preset(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe of edgetool's own, changed as in `read_recipe`."""
    text = resources.files("edgetool.pipeline.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, f"preset {name}", changes)


def parse_recipe(text: str, name: str, changes: Sequence[str] = ()) -> Recipe:
    """As `read_recipe`; `name` is where the text comes from."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}", "edgetool run demo --preset smoke --show-recipe") from error
    _check_names(document, ("run", "steps"), name)
    table, steps = _table(document, "run", name), _table(document, "steps", name)
    _check_names(table, _RUN_KEYS, f"[run] of {name}")
    for key in ("model", "output"):
        if not isinstance(table.get(key, ""), str):
            raise ConfigError(f"{key} in [run] of {name} is {table[key]!r}, and must be a text")
    if not steps:
        raise ConfigError(f"{name} has no steps", 'add a table such as [steps.quantize] with command = "quantize"')
    for change in changes:
        _change(steps, change, name)
    found: list[Step] = []
    for step_name, values in steps.items():
        found.append(_step(step_name, values, [step.name for step in found], f"[steps.{step_name}] of {name}", found))
    name = ", ".join([name, *changes])
    recipe = Recipe(name, text, table.get("model"), table.get("output"), (), tuple(found))
    return replace(recipe, ladder=_ladder(table.get("ladder", []), recipe))


def _change(steps: dict[str, Any], change: str, name: str) -> None:
    """Put one `STEP.KEY=VALUE` into the tables of the steps; the value is TOML, or else a text."""
    target, equals, text = change.partition("=")
    step, dot, key = target.strip().partition(".")
    if not (equals and dot and step and key):
        raise ConfigError(f"--set {change!r} cannot be read", "for instance --set quantize.group_size=64")
    if not isinstance(steps.get(step), dict):
        raise ConfigError(f"--set {change!r}: {name} has no step {step!r}", _did_you_mean(step, steps))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    steps[step] = {**steps[step], key: value}


def _step(name: str, values: Any, before: list[str], where: str, steps: list[Step]) -> Step:
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"a step cannot be called {name!r}: letters, digits, - and _, and neither of {', '.join(sorted(_RESERVED))}"
        )
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table, and is {values!r}")
    given = dict(values)
    command = _command(given.pop("command", None), where)
    source = given.pop("from", None if before else MODEL)
    if source is None:
        raise ConfigError(f"{where} does not say what it works on", f"add from = {before[-1]!r}, or from = 'model'")
    served = {key: given.pop(key, default) for key, default in _SERVED_KEYS.items()} if command.serves else {}
    allowed = [key for key in keys()[command.section] if key not in command.set_by_us]
    _check_names(given, [*allowed, *_COMMON_KEYS, *served], where, command)
    settings = {key: _value(value, where, key) for key, value in given.items()}
    settings[command.source] = Reference(str(source))
    step = Step(name, command, settings, str(served.get("ask", "")), _tokens(served.get("ask_tokens", 1), where))
    writers = {one.name for one in steps if not one.command.serves}
    for key, target in step.references.items():
        if target not in {MODEL, *writers}:
            what = "from" if key == command.source else key
            known = ", ".join([MODEL, *(one for one in before if one in writers)])
            raise ConfigError(
                f"{what} {target!r} of {where} is no step before it that writes something", f"one of {known}"
            )
    return step


def _command(name: Any, where: str) -> Command:
    if isinstance(name, str) and name in COMMANDS and COMMANDS[name].section in SECTIONS:
        return COMMANDS[name]
    known = [command for command, facts in COMMANDS.items() if facts.section in SECTIONS]
    if name is None:
        raise ConfigError(f"{where} has no command", f"add command = one of {', '.join(known)}")
    raise ConfigError(f"command {name!r} of {where} cannot be a step", _did_you_mean(str(name), known))


def _value(value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) != {"from"} or not isinstance(value["from"], str):
        raise ConfigError(f"{key} of {where} is {value!r}, and must be a value or {{ from = STEP }}")
    return Reference(value["from"])


def _tokens(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"ask_tokens of {where} is {value!r}, and must be a number of at least 1")
    return value


def _ladder(rungs: Any, recipe: Recipe) -> tuple[Mapping[str, Any], ...]:
    where = f"ladder in [run] of {recipe.name}"
    if not isinstance(rungs, list) or not all(isinstance(rung, dict) and rung for rung in rungs):
        raise ConfigError(f'{where} must be a list of tables such as [{{ group_size = 64 }}, {{ method = "awq" }}]')
    if not rungs:
        return ()
    quantizing = [step for step in recipe.steps if step.command.name == "quantize"]
    if len(quantizing) != 1:
        raise ConfigError(f"{where} changes the step that quantises, and there are {len(quantizing)} of them")
    if not any(step.gated for step in recipe.steps):
        raise ConfigError(f"{where} is climbed when a gate fails, and no eval step has one", 'add gate = "ratio<=1.05"')
    command = quantizing[0].command
    for rung in rungs:
        _check_names(rung, [key for key in keys()["quantize"] if key not in command.set_by_us], where, command)
    return tuple(rungs)


def _table(document: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{key!r} in {name} must be a table, and is {table!r}")
    return table


def _check_names(values: Mapping[str, Any], known: Iterable[str], where: str, command: Command | None = None) -> None:
    names = list(known)
    for name in values:
        if name in names:
            continue
        if command is not None and name in command.set_by_us:
            what = "from" if name == command.source else "the run itself"
            raise ConfigError(f"{name!r} in {where} is set by {what}", "leave it out")
        raise ConfigError(f"unknown key {name!r} in {where}", _did_you_mean(name, names))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    return f"did you mean {difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]!r}?"
