"""What could stand at the cursor: names of commands and options, or what the type of a setting allows or suggests."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from edgetool.completion.words import Place


@dataclass(frozen=True)
class Word:
    """One word to offer, and what it means (empty where it speaks for itself)."""

    text: str
    about: str = ""


@dataclass(frozen=True)
class Offer:
    """What to offer for a value.

    words: whole values. paths: what of the disk the shell is to add: "directories", or "files" (with `suffixes` only
    those and directories). kept: how much of what was typed is settled, such as the first names of a list with commas.
    """

    words: tuple[Word, ...] = ()
    paths: Literal["", "directories", "files"] = ""
    suffixes: tuple[str, ...] = ()
    kept: str = ""


def offer(place: Place) -> Offer:
    """What fits the place and begins with what has been typed."""
    if place.parameter is not None:
        return _values(place)
    if place.current.startswith("-"):
        return _beginning(_options(place), place.current)
    commands = getattr(place.command, "commands", {})
    listed = [Word(name, _first_sentence(one.help)) for name, one in commands.items() if not one.hidden]
    if listed or place.current:
        return _beginning(listed, place.current)
    return Offer(tuple(_options(place)))


def _options(place: Place) -> Iterator[Word]:
    for option in place.command.params:
        if option.param_type_name == "option" and not option.hidden and (option.multiple or option not in place.seen):
            for name in (*option.opts, *option.secondary_opts):
                if name.startswith("--") or place.current == "-":
                    yield Word(name, option.help or "")
    yield Word("--help", "Show what the command does, and its options.")


def _values(place: Place) -> Offer:
    # here, not above: names of commands and options are offered without the time that pydantic takes
    from edgetool.completion.sources import SOURCES
    from edgetool.config_values import Suggest

    parameter = place.parameter
    assert parameter is not None
    own = parameter.type_descriptor.annotation
    if isinstance(own, type) and issubclass(own, Enum):
        return _beginning([Word(str(one.value)) for one in own], place.current)
    if parameter.name == "config":
        return Offer(paths="files", suffixes=("toml", "yaml", "yml"))
    field = _field(place.path, parameter.name)
    if field is None:
        return Offer()
    kept, current = _settled(place.current) if _is_list(field.annotation) else ("", place.current)
    words, paths, suffixes = [], "", ()  # type: list[Word], Any, tuple[str, ...]
    for part in (*_parts(field.annotation), *field.metadata):
        if isinstance(part, Suggest):
            words += [Word(text) for text in part.words]
            words += [Word(*found) for found in SOURCES[part.source](place.path)] if part.source else []
            paths, suffixes = (part.paths, part.suffixes) if part.paths else (paths, suffixes)
        elif isinstance(part, str | int) and not isinstance(part, bool):
            words.append(Word(str(part)))
    taken = kept.split(",")
    return _beginning([word for word in words if word.text not in taken], current, paths, suffixes, kept)


def _settled(typed: str) -> tuple[str, str]:
    """A list with commas, cut before its last name."""
    cut = typed.rfind(",") + 1
    return typed[:cut], typed[cut:]


def _beginning(words: Any, current: str, paths: Any = "", suffixes: tuple[str, ...] = (), kept: str = "") -> Offer:
    fitting = {word.text: word for word in words if word.text.startswith(current)}
    return Offer(tuple(fitting.values()), paths, suffixes, kept)


def _field(path: tuple[str, ...], key: str) -> Any | None:
    """The setting that a parameter gives; None for one that is no setting."""
    from edgetool.config import SECTIONS, key_of

    for name in (path[0].replace("-", "_") if path else "", "common"):
        for item in SECTIONS[name].model_fields.items() if name in SECTIONS else ():
            if key_of(*item) == key:
                return item[1]
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """Literal values and Suggests in an annotation, however deep."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from get_args(annotation)
    elif origin is Annotated:
        base, *extras = get_args(annotation)
        yield from _parts(base)
        yield from extras
    elif origin in (Union, types.UnionType, tuple):
        for inner in get_args(annotation):
            yield from _parts(inner)


def _is_list(annotation: Any) -> bool:
    """Whether values are listed with commas: a tuple of any length, however wrapped."""
    if get_origin(annotation) is tuple:
        return Ellipsis in get_args(annotation)
    inner = get_args(annotation) if get_origin(annotation) in (Annotated, Union, types.UnionType) else ()
    return any(_is_list(one) for one in inner)


def _first_sentence(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[0] if lines else ""
