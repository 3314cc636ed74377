"""An offer in the form that each shell's script reads: a line that says how, then a line for each word.

The first line is `PATHS SPACE KEPT`: what the shell adds by itself (`-`, `directories`, `files`, `files:gguf,toml` or
`command`), `space` or `nospace` after the word, and a number: for zsh the settled characters of the word, for `command`
the words to leave out.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from edgetool.completion.offers import Offer, Word, offer
from edgetool.completion.words import find_place

_OPEN_ENDED = ("=", ":", "/")
_ABOUT_CHARACTERS = 100


def reply(shell: str, root: Any, words: list[str]) -> str:
    """The answer to a shell's script.

    bash sends the line up to the cursor and the part of the last word that it will replace (it cuts words at = and :),
    the others send the words, the unfinished one last.
    """
    replaced = ""
    if shell == "bash":
        line, replaced = words
        words = split_line(line)
    *before, current = words
    place = find_place(root, before, current)
    if place.skip:
        return f"command space {place.skip}\n"
    found = offer(place)
    settled = place.before + found.kept
    if shell == "bash":
        cut = len(current) - len(replaced) if current.endswith(replaced) else 0
        lines = [(settled + word.text)[cut:] for word in found.words]
    elif shell == "fish":
        lines = [_described(Word(settled + word.text, word.about), "\t") for word in found.words]
    else:
        lines = [_described(Word(word.text.replace(":", r"\:"), word.about), ":") for word in found.words]
    open_ended = bool(found.words) and all(word.text.endswith(_OPEN_ENDED) for word in found.words)
    header = f"{_paths(found)} {'nospace' if open_ended else 'space'} {len(settled)}"
    return "".join(f"{line}\n" for line in (header, *lines))


def split_line(line: str) -> list[str]:
    """The words of an unfinished bash command line without the first, the last one perhaps empty or in open quotes."""
    for closing in ("", '"', "'"):
        lexer = shlex.shlex(line + closing, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = list(lexer)
        except ValueError:
            continue
        unfinished = closing or not re.search(r"(?<!\\)\s$", line)
        return words[1:] if unfinished and len(words) > 1 else [*words[1:], ""]
    return line.split()[1:] or [""]


def _paths(found: Offer) -> str:
    if not found.paths:
        return "-"
    return f"{found.paths}:{','.join(found.suffixes)}" if found.suffixes else found.paths


def _described(word: Word, separator: str) -> str:
    about = " ".join("".join(c if c.isprintable() else " " for c in word.about).split())
    about = about if len(about) <= _ABOUT_CHARACTERS else about[: _ABOUT_CHARACTERS - 1] + "…"
    return f"{word.text}{separator}{about}" if about else word.text
