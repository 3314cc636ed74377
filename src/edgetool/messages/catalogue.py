"""A catalogue of templates, and how a finished sentence finds the one that it was made from.

A template is English with numbered values: `no port of {1} could be bound`. `{s}` is an `s` or nothing. A translation
names the same values, in any order. Values go over as they are, unless they are sentences themselves (the reason
within an error). What is put together from several sentences (`a; b`, `path: a`, `a (b)`) is translated in parts.

A sentence is looked up by its words: each template is listed under one word of its own, so a few are tried, the one
with the most text of its own first. Trying is a search for its pieces from left to right, linear in the length.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_HOLE = re.compile(r"\{(\d+)\}")
_WORD = re.compile(r"[A-Za-z_]+")
_MARKS = {"; ": "；", ": ": "：", ", ": "，"}
_LONGEST = 4000
"""A longer text is no message, and is handed back as it is."""


@functools.cache
def chinese() -> Catalogue:
    """The catalogue of the package, read once."""
    return Catalogue(json.loads(Path(__file__).with_name("zh_CN.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Template:
    """`pieces` of text with a value between each two; `weight` letters and signs of its own in `words` words."""

    pieces: tuple[str, ...]
    target: str
    weight: int
    words: int

    def values(self, text: str) -> list[str] | None:
        """The values of a sentence that was made from this template, None when it was not."""
        first, last = self.pieces[0], self.pieces[-1]
        if not (text.startswith(first) and text.endswith(last)):
            return None
        start, end = len(first), len(text) - len(last)
        found = []
        for piece in self.pieces[1:-1]:
            position = text.find(piece, start + 1, end)
            if position < 0:
                return None
            found.append(text[start:position])
            start = position + len(piece)
        if start >= end:
            return None
        found.append(text[start:end])
        # one word is too little to go by when the rest could be any sentence
        return None if self.words < 2 and any(" " in value for value in found) else found


class Catalogue:
    """Templates of one language; see the module."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._exact: dict[str, str] = {}
        self._by_word: dict[str, list[Template]] = {}
        for english, target in entries.items():
            for source in _plurals(english):
                if _HOLE.search(source):
                    self._add(source, target)
                else:
                    self._exact[source] = target
        for listed in self._by_word.values():
            listed.sort(key=lambda template: -template.weight)

    def label(self, text: str) -> str:
        """A title, a heading or a cell, where a single word counts as text."""
        return self._exact.get(text) or self.sentence(text)

    @functools.lru_cache(maxsize=2048)  # noqa: B019  one catalogue lives as long as the process
    def sentence(self, text: str) -> str:
        """A sentence in the language of the catalogue; what is not known stays as it is."""
        bare = text.strip()
        if " " not in bare or len(bare) > _LONGEST:
            return text
        found = self._whole(bare)
        found = self._parts(bare) if found is None else found
        return text if found is None else text.replace(bare, found)

    def _add(self, source: str, target: str) -> None:
        pieces = tuple(_HOLE.split(source)[::2])
        own = _HOLE.sub("\0", source)
        words = [word for word in _WORD.findall(own) if f"\0{word}" not in own and f"{word}\0" not in own]
        template = Template(pieces, target, sum(map(len, pieces)), len(_WORD.findall(own)))
        self._by_word.setdefault(max(words, key=len, default=""), []).append(template)

    def _whole(self, text: str) -> str | None:
        """The translation by one entry."""
        if text in self._exact:
            return self._exact[text]
        listed = (self._by_word.get(word, ()) for word in {*_WORD.findall(text), ""})
        for template in sorted((one for group in listed for one in group), key=lambda one: -one.weight):
            values = template.values(text)
            if values is not None:
                return _filled(template.target, [self.sentence(value) for value in values])
        return None

    def _parts(self, text: str) -> str | None:
        """The translation of what is put together from several sentences."""
        if "\n" in text:
            lines = [self.sentence(line) for line in text.split("\n")]
            return "\n".join(lines)
        if text[:2] == "- ":
            return f"- {self.sentence(text[2:])}"
        for mark, own in _MARKS.items():
            for head, tail in _cuts(text, mark):
                first, second = self._known(head), self._known(tail)
                if first is not None or second is not None:
                    # a path before the mark stays as it is, and so does the mark, so that it can be taken up
                    between = mark if first is None and mark == ": " else own
                    return f"{first or self.sentence(head)}{between}{second or self.sentence(tail)}"
        if text.endswith(")") and (opening := text.find(" (")) > 0:
            head, inner = text[:opening], text[opening + 2 : -1]
            first, second = self._known(head), self._known(inner)
            if first is not None or second is not None:
                behind = f" ({inner})" if second is None else f"（{second}）"
                return f"{first or self.sentence(head)}{behind}"
        return None

    def _known(self, text: str) -> str | None:
        return self._whole(text) if " " in text else self._exact.get(text)


def _filled(target: str, values: Sequence[str]) -> str:
    return _HOLE.sub(lambda hole: values[int(hole[1]) - 1], target)


def _plurals(source: str) -> Iterator[str]:
    if "{s}" in source:
        yield source.replace("{s}", "")
        yield source.replace("{s}", "s")
    else:
        yield source


def _cuts(text: str, mark: str) -> Iterator[tuple[str, str]]:
    position = text.find(mark)
    while position >= 0:
        yield text[:position], text[position + len(mark) :]
        position = text.find(mark, position + 1)
