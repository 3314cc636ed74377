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
_QUANTITY = re.compile(r"[\d.,]+( [A-Za-z%/]+)?")
_BRACKETS = re.compile(r"(.*[^\s(]) \(([^()]*(?:\([^()]*\)[^()]*)*)\)", re.DOTALL)
_FILLING = frozenset(
    re.findall(r"\w+", "a an and are at by for from has in is it its not of on or than the there to was with")
)
_LONGEST = 4000
"""A longer text is no message, and is handed back as it is."""


@functools.cache
def chinese() -> Catalogue:
    """The catalogue of the package, read once."""
    return Catalogue(json.loads(Path(__file__).with_name("zh_CN.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Template:
    """`pieces` of text with a value between each two; `weight` letters and signs of its own in `words` that tell."""

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
            position = text.find(piece, start, end)
            if position < 0:
                return None
            found.append(text[start:position])
            start = position + len(piece)
        if start > end:
            return None
        found.append(text[start:end])
        return found


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
        if bare.startswith("- "):
            return text.replace(bare, f"- {self.sentence(bare[2:])}")
        found = self._translation(bare)
        return text if found is None else text.replace(bare, found)

    def _translation(self, text: str) -> str | None:
        if text in self._exact:
            return self._exact[text]
        match = self._match(text)
        if match and not any(mark in value for value in match[1] for mark in ("\n", "; ")):
            return self._filled(*match)
        # a value that goes on behind the end of a sentence may be the next sentence
        listed = self._listed(text)
        return listed or (self._filled(*match) if match else self._parts(text))

    def _add(self, source: str, target: str) -> None:
        pieces = tuple(_HOLE.split(source)[::2])
        own = _HOLE.sub("\0", source)
        words = [word for word in _WORD.findall(own) if f"\0{word}" not in own and f"{word}\0" not in own]
        weighty = [word for word in _WORD.findall(own) if word not in _FILLING]
        template = Template(pieces, target, sum(map(len, pieces)), len(weighty))
        self._by_word.setdefault(max(words, key=len, default=""), []).append(template)

    def _known(self, text: str) -> str | None:
        """The translation of what is one entry: a sentence, or a single word that is there as such."""
        return self._whole(text) if " " in text else self._exact.get(text)

    def _whole(self, text: str) -> str | None:
        """The translation by one entry."""
        match = None if text in self._exact else self._match(text)
        return self._filled(*match) if match else self._exact.get(text)

    def _match(self, text: str) -> tuple[Template, list[str]] | None:
        """The template that a sentence was made from, with its values."""
        listed = (self._by_word.get(word, ()) for word in {*_WORD.findall(text), ""})
        for template in sorted((one for group in listed for one in group), key=lambda one: -one.weight):
            values = template.values(text)
            if values is not None and (template.words > 1 or self._plain(template, values)):
                return template, values
        return None

    def _filled(self, template: Template, values: Sequence[str]) -> str:
        """The translation of a template, and of those of its values that are sentences."""
        behind = _BRACKETS.fullmatch(values[-1]) if template.pieces[-1] == "" else None
        if behind is None:
            return _filled(template.target, [self.sentence(value) for value in values])
        # brackets at the end belong behind the sentence, wherever the last value goes
        return _filled(template.target, [self.sentence(one) for one in (*values[:-1], behind[1])]) + self._aside(
            behind[2]
        )

    def _aside(self, inner: str) -> str:
        said = self.sentence(inner)
        return f" ({inner})" if said == inner else f"（{said}）"

    def _plain(self, template: Template, values: Sequence[str]) -> bool:
        """Whether one word is enough to go by: not when a value could be the rest of any other sentence."""
        if not template.words:
            return all(_QUANTITY.fullmatch(value) for value in values)
        return all(
            " " not in value or piece.endswith(": ") or _QUANTITY.fullmatch(value) or self._known(value)
            for piece, value in zip(template.pieces, values, strict=False)
        )

    def _listed(self, text: str) -> str | None:
        """The translation of sentences one after the other, each of them known."""
        for mark, own in (("\n", "\n"), ("; ", "；")):
            parts = text.split(mark)
            if len(parts) > 1 and (mark == "\n" or all(" " in part for part in parts)):
                said = [self._known(part) for part in parts]
                if None not in said:
                    return own.join(one for one in said if one)
        return None

    def _parts(self, text: str) -> str | None:
        """The translation of what is put together from several sentences, as far as they are known."""
        if "\n" in text:
            return "\n".join(self.sentence(line) for line in text.split("\n"))
        for known in (self._known, self.sentence):
            for mark, own in _MARKS.items():
                for head, tail in _cuts(text, mark):
                    # names in a list are values, not words
                    first, second = (None if mark == ", " and " " not in side else known(side) for side in (head, tail))
                    first, second = (None if one in (head, tail) else one for one in (first, second))
                    if first is not None or second is not None:
                        # a path before the mark stays as it is, and so does the mark, so that it can be taken up
                        between = mark if first is None and mark == ": " else own
                        return f"{first or self.label(head)}{between}{second or self.label(tail)}"
            if (behind := _BRACKETS.fullmatch(text)) is not None:
                first = known(behind[1])
                if first not in (None, behind[1]) or self.sentence(behind[2]) != behind[2]:
                    return f"{first or behind[1]}{self._aside(behind[2])}"
        return None


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
