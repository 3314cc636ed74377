"""A step as the command line that a user could type to repeat it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from edgetool.config import SECTIONS, key_of, option_of
from edgetool.config_values import off_of
from edgetool.errors import ConfigError
from edgetool.pipeline.commands import Command

_OPTION = re.compile(
    r"(?<!leave )(?P<option>--[a-z][a-z0-9-]*)(?: (?!or\b|and\b|to\b|out\b)(?P<value>\w[\w.-]*(?:,[\w.-]+)*))?"
)


def arguments(command: Command, settings: Mapping[str, Any], where: str) -> list[str]:
    """The arguments after `edgetool`: the command, what it reads, where it writes, and then the other settings.

    Raises:
        ConfigError: a setting that has no option; `where` names the step.
    """
    first = [key for key in (command.source, "output") if key in settings]
    words = [command.name]
    for key in [*first, *(key for key in settings if key not in first and key != "extra")]:
        words += _words(command, key, settings[key], where)
    if settings.get("extra"):  # what serve-gpu passes on to vLLM
        words += ["--", *map(str, settings["extra"])]
    return words


def _words(command: Command, key: str, value: Any, where: str) -> list[str]:
    section = SECTIONS[command.section]
    fields = {key_of(*item): item for one in (section, SECTIONS["common"]) for item in one.model_fields.items()}
    name, field = fields[key]
    option = option_of(name, field)
    if not option:
        raise ConfigError(f"{key!r} of {where} has no option", "set it in the environment or in the file of --config")
    if value is True:
        return [option]
    if value is False:
        # a switch that is off by default has no spelling for "off"
        return [] if field.default is False else [off_of(name, field)]
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if not option.startswith("-"):
        return [text]
    return ["-o" if key == "output" else option, text]


def inserted(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """`words` with further options, before the arguments that a command passes on."""
    end = list(words).index("--") if "--" in words else len(words)
    return [*words[:end], *options, *words[end:]]


def for_a_step(hint: str, step: str, command: Command) -> str:
    """A command's hint for those who run it as a step: how a recipe says the options that the hint names.

    A hint that is a whole command line stays as it is.
    """
    fields = {option_of(*item): item for item in SECTIONS[command.section].model_fields.items()}
    settings = []
    for found in _OPTION.finditer(hint):
        item = fields.get(found["option"])
        if item is not None and key_of(*item) not in command.set_by_us:
            settings.append(f"--set {step}.{key_of(*item)}={_value_in(found['value'], item[1])}")
    return hint if "edgetool " in hint or not settings else f"{hint}; for this step: {' '.join(settings)}"


def _value_in(word: str | None, field: FieldInfo) -> str:
    """The word behind an option where it is a value of it, not the next word of the sentence; else dots."""
    if field.annotation is bool:
        return "true"
    kind: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(kind).validate_python(word)
    except ValidationError:
        return "..."
    return word if word and not word.isupper() else "..."


def path_text(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the working directory, and never like an option."""
    try:
        text = str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
    return f"./{text}" if text.startswith("-") else text
