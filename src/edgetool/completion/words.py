"""From the words before the cursor to what is being typed: a command, an option, or the value of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where the cursor is.

    command: typer's command that the words lead to, and `path` its names. parameter: whose value is being typed; None
    where a command or an option is. current: the value so far. before: what precedes it in the same word (`--to=`).
    seen: parameters that have been given. skip: words in front of a command line that is another program's.
    """

    command: Any
    path: tuple[str, ...]
    parameter: Any | None
    current: str
    before: str = ""
    seen: tuple[Any, ...] = ()
    skip: int = 0


def find_place(root: Any, words: Sequence[str], current: str) -> Place:
    """The place of `current`, which follows `words` (the program's name is not one of them)."""
    command, path, seen = root, (), []  # type: Any, tuple[str, ...], list[Any]
    awaited: list[Any] = []  # the option whose values come next, once for each
    positional, plain = 0, False
    for number, word in enumerate(words):
        if awaited:
            awaited.pop()
        elif word == "--" and not plain:
            plain = True
            if _runs_another(command):
                return Place(command, path, None, current, seen=tuple(seen), skip=number + 2)
        elif _is_option(word) and not plain:
            name, equals, _ = word.partition("=")
            option = _option(command, name)
            if option is not None:
                seen.append(option)
                awaited = [] if option.is_flag or equals else [option] * option.nargs
        elif word in getattr(command, "commands", {}):
            command, path, positional = command.commands[word], (*path, word), 0
        elif _runs_another(command):
            return Place(command, path, None, current, seen=tuple(seen), skip=number + 1)
        else:
            positional += 1
    if awaited:
        return Place(command, path, awaited[-1], current, seen=tuple(seen))
    if current.startswith("-") and not plain:
        name, equals, value = current.partition("=")
        option = _option(command, name) if equals else None
        if option is not None:
            return Place(command, path, option, value, name + equals, tuple(seen))
        return Place(command, path, None, current, seen=tuple(seen))
    return Place(command, path, _argument(command, positional), current, seen=tuple(seen))


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _option(command: Any, name: str) -> Any | None:
    options = (p for p in command.params if p.param_type_name == "option")
    return next((option for option in options if name in (*option.opts, *option.secondary_opts)), None)


def _argument(command: Any, position: int) -> Any | None:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    if position < len(arguments):
        return arguments[position]
    return arguments[-1] if arguments and arguments[-1].nargs == -1 else None


def _runs_another(command: Any) -> bool:
    """Whether what follows the options is another program's command line (`gpus run -- CMD ...`)."""
    return command.context_settings.get("allow_interspersed_args") is False
