"""Which language somebody wants: the option, the variable or the file, and else the locale as POSIX orders it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from edgetool.messages import CHINESE, ENGLISH

AUTO = "auto"
LANGUAGES = (ENGLISH, CHINESE)
VARIABLE = "EDGETOOL_LANG"

_SIMPLIFIED = ("zh_cn", "zh_sg", "zh_hans")


def asked(arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """The language for what is said before the configuration is known: help, and errors of the command line itself."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = environ.get(VARIABLE, "")
    for position, argument in enumerate(arguments[:end]):
        if argument.startswith("--lang="):
            given = argument.removeprefix("--lang=")
        elif argument == "--lang" and position + 1 < end:
            given = arguments[position + 1]
    return resolved(given, environ)


def resolved(setting: str, environ: Mapping[str, str]) -> str:
    """`en` or `zh_CN`, from a setting that may also be `auto`. English where the terminal cannot show anything else."""
    language = setting if setting in LANGUAGES else of_locale(environ)
    return language if language == ENGLISH or (_can_show(sys.stdout) and _can_show(sys.stderr)) else ENGLISH


def of_locale(environ: Mapping[str, str]) -> str:
    """The language of LC_ALL, LC_MESSAGES or LANG: the first that is set and not empty (POSIX.1-2017, 8.2)."""
    given = next((environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), "")
    name = given.partition(".")[0].partition("@")[0].replace("-", "_").lower()
    return CHINESE if name == "zh" or name.startswith(_SIMPLIFIED) else ENGLISH


def _can_show(stream: object) -> bool:
    try:
        "量化：（）".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
