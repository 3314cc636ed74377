"""Text in columns where a Chinese character takes two cells and a line may end behind any of them."""

from __future__ import annotations

import re
import unicodedata

_WIDE = r"\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60"
_UNIT = re.compile(rf"\s+|[{_WIDE}]|[^\s{_WIDE}]+")
_NOT_FIRST = frozenset("])，。；：、！？）」』》】”’…")
_NOT_LAST = frozenset("[(（「『《【“‘")


def cells(text: str) -> int:
    """How many cells of a terminal a text takes (Unicode Standard Annex 11: wide and full-width are two)."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def wrapped(text: str, width: int) -> list[str]:
    """The lines of one paragraph, none wider than `width` cells unless a single word is.

    No line begins with a closing mark or ends with an opening one.
    """
    lines: list[str] = []
    line = ""
    for unit in _units(text):
        if line and cells(line) + cells(unit.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += unit if line else unit.lstrip()
    return [*lines, line.rstrip()] if line.strip() else lines


def _units(text: str) -> list[str]:
    """What may not be cut, each with the space behind it: words, characters, marks with what they belong to."""
    units: list[str] = []
    for piece in _UNIT.findall(text.strip()):
        glued = units and (units[-1][-1] in _NOT_LAST or piece[0] in _NOT_FIRST or piece.isspace())
        if glued:
            units[-1] += " " if piece.isspace() else piece
        else:
            units.append(piece)
    return units
