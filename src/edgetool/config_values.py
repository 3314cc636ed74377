"""What settings are made of: sizes, times and numbers as users write them, and the base of all sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(value: object) -> object:
    """Bytes meant by `5GB`, `512 MiB` or a bare number; anything else is handed back for pydantic to refuse."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return value


_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?\s*", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_duration(value: object) -> object:
    """Seconds meant by `90`, `30s`, `10m`, `2h` or `1d`; anything else is handed back for pydantic to refuse."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        return float(match[1]) * _SECONDS[(match[2] or "").lower()]
    return value


def pairs(value: object) -> object:
    """`A=a, B=b` in a variable is the table {A = "a", B = "b"} of a file."""
    if not isinstance(value, str):
        return value
    items = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(name.strip() and equals and other.strip() for name, equals, other in items):
        raise ValueError("pairs were expected")
    return {name.strip(): other.strip() for name, _, other in items}


def names(value: object) -> object:
    """`a, b` in a variable or option is the list of two of a file."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _expand_home(value: object) -> object:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def only_numbers(value: object) -> object:
    # pydantic takes true for 1; in a recipe that is a slip, not a number
    if isinstance(value, bool):
        raise ValueError("a number was expected")
    return value


def whole(value: object) -> object:
    """Literals compare and do not convert: make the text of a variable the number that it spells."""
    only_numbers(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value) else value


@dataclass(frozen=True)
class Suggest:
    """Part of a setting's type: what a shell offers for it (completion/). A Literal needs none: it is offered as it is.

    words: values. source: a list that is looked up, by its name in completion/sources.py. paths: what of the disk, with
    these suffixes only where there are any (directories always lead on).
    """

    words: tuple[str, ...] = ()
    source: Literal["", "models", "tasks", "jobs", "servers", "urls", "environments"] = ""
    paths: Literal["", "directories", "files"] = ""
    suffixes: tuple[str, ...] = ()


HomePath = Annotated[Path, BeforeValidator(_expand_home), Suggest(paths="files")]
HomeDirectory = Annotated[Path, BeforeValidator(_expand_home), Suggest(paths="directories")]
ModelName = Annotated[str, Suggest(source="models", paths="files", suffixes=("gguf",))]
Address = Annotated[str, Suggest(source="urls")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Suggest(words=("auto", "cpu", "cuda"))]
Count = Annotated[int, BeforeValidator(only_numbers), Field(ge=1)]
Size = Annotated[int, BeforeValidator(parse_size), BeforeValidator(only_numbers), Field(ge=1)]
Duration = Annotated[
    float, BeforeValidator(parse_duration), BeforeValidator(only_numbers), Field(ge=0, allow_inf_nan=False)
]
Port = Annotated[int, BeforeValidator(only_numbers), Field(ge=1, le=65_535)]


def setting(
    default: Any, meaning: str, must: str, *, option: str | None = None, off: str | None = None, key: str | None = None
) -> Any:
    """A field: `meaning` for the documentation, `must` (what a value has to be) for errors and documentation.

    `option` is the command-line spelling where it is not `--` + the key with dashes; empty when there is none.
    `off` is the spelling for "no" where it is not `--no-` + that. `key` is the name in files and variables where the
    attribute cannot have it.
    """
    given = {"option": option, "off": off}
    extra: dict[str, Any] = {"must": must} | {name: text for name, text in given.items() if text is not None}
    if callable(default):
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, alias=key)
    return Field(default, description=meaning, json_schema_extra=extra, alias=key)


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, checked defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_by_name=True, defer_build=True
    )
    required: ClassVar[Mapping[str, str]] = {}
    """Keys that a command cannot do without, and how each is called in its usage line."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Other sections that the command reads, besides `common`."""


def key_of(name: str, field: FieldInfo) -> str:
    """The name of a field in files and variables."""
    return field.alias or name


def option_of(name: str, field: FieldInfo) -> str:
    """The command-line spelling of a field, empty when there is none."""
    extra = field.json_schema_extra
    given = extra.get("option") if isinstance(extra, dict) else None
    return "--" + key_of(name, field).replace("_", "-") if given is None else str(given)


def off_of(name: str, field: FieldInfo) -> str:
    """The command-line spelling that turns a switch off."""
    extra = field.json_schema_extra
    given = extra.get("off") if isinstance(extra, dict) else None
    return "--no-" + option_of(name, field).removeprefix("--") if given is None else str(given)


def must_of(field: FieldInfo) -> str:
    """What a value of the field has to be, in words."""
    extra = field.json_schema_extra
    return str(extra["must"]) if isinstance(extra, dict) else ""
