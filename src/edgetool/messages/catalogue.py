"""A catalogue of templates, and how a finished sentence finds the one that it was made from.

A template is English with numbered values: `no port of {1} could be bound`. `{s}` is an `s` or nothing. A translation
names the same values, in any order. Values go over as they are, unless they are sentences themselves (the reason
within an error). What is put together from several sentences (`a; b`, `path: a`, `a (b)`) is translated in parts.

A sentence is looked up by its words: each template is listed under one word of its own, so a few are tried, the one
with the most text of its own first. Trying is a search for its pieces from left to right, linear in the length.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_HOLE = re.compile(r"\{(\d+)\}")
_WORD = re.compile(r"[A-Za-z_]+")
_QUANTITY = re.compile(r"[\d.,]+( [A-Za-z%/]+)?")
_NUMBER = re.compile(r"\d+: ")
_BRACKET = re.compile(r"[()]")
_BRACKETS = re.compile(r"(.*[^\s(]) \(([^()]*(?:\([^()]*\)[^()]*)*)\)", re.DOTALL)
_FILLING = frozenset(
    re.findall(r"\w+", "a an and are at by for from has in is it its not of on or than the there to was with")
)
_LONGEST = 4000
"""A longer text is no message, and is handed back as it is."""
_PLAIN_LETTERS = 14
"""So many letters of its own make a template plain, whatever its words are."""
_MOST_CUTS = 12
"""Places at which a text is tried to be cut at one kind of mark, so that a long list costs no more than a short one."""
_DEEPEST = 6
"""Sentences within sentences."""


@functools.cache
def chinese() -> Catalogue:
    """The catalogue of the package, read once."""
    return Catalogue(json.loads(Path(__file__).with_name("zh_CN.json").read_text(encoding="utf-8")))


class Reading(NamedTuple):
    """What a text says in the other language; `covered` signs of it were known, `own` of them by its first template."""

    said: str
    covered: int = 0
    own: int = 0


@dataclass(frozen=True)
class Template:
    """`pieces` of text with a value between each two.

    Attributes:
        target: the translation, with the values by number.
        weight: letters and signs of its own.
        plain: whether these are enough to know a sentence by them.
        telling: whether there is a word of its own at all, besides such as "of" and "is".
    """

    pieces: tuple[str, ...]
    target: str
    weight: int
    plain: bool
    telling: bool

    def values(self, text: str) -> list[str] | None:
        """The values of a sentence that was made from this template, None when it was not."""
        first, last = self.pieces[0], self.pieces[-1]
        if not (text.startswith(first) and text.endswith(last)):
            return None
        start, end = len(first), len(text) - len(last)
        found = []
        for piece in self.pieces[1:-1]:
            position = _after_brackets(text, piece, start, end)
            if position < 0:
                return None
            found.append(text[start:position])
            start = position + len(piece)
        if start > end:
            return None
        found.append(text[start:end])
        return found if all(map(_closed, found)) or not _closed(text) else None

    def filled(self, values: Sequence[Reading]) -> Reading:
        """The translation with these values in it."""
        said = _HOLE.sub(lambda hole: values[int(hole[1]) - 1].said, self.target)
        return Reading(said, self.weight + sum(value.covered for value in values), self.weight)


def _closed(text: str) -> bool:
    """Whether each bracket in it is opened and closed in it."""
    opened = 0
    for bracket in _BRACKET.findall(text):
        opened += 1 if bracket == "(" else -1
        if opened < 0:
            return False
    return opened == 0


def _after_brackets(text: str, piece: str, start: int, end: int) -> int:
    """Where `piece` is next, outside of brackets that have opened since `start` if there is such a place."""
    first = position = text.find(piece, start, end)
    for _ in range(_MOST_CUTS):
        if position < 0:
            break
        if _closed(text[start:position]):
            return position
        position = text.find(piece, position + 1, end)
    return first


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

    def label(self, text: str) -> str:
        """A title, a heading or a cell, where a single word counts as text."""
        return self._exact.get(text) or self.sentence(text)

    def sentence(self, text: str) -> str:
        """A sentence in the language of the catalogue; what is not known stays as it is."""
        bare = text.strip()
        return text.replace(bare, self._best(bare).said) if " " in bare and len(bare) <= _LONGEST else text

    def _add(self, source: str, target: str) -> None:
        pieces = tuple(_HOLE.split(source)[::2])
        own = _HOLE.sub("\0", source)
        words = [word for word in _WORD.findall(own) if f"\0{word}" not in own and f"{word}\0" not in own]
        telling = [word for word in _WORD.findall(own) if word not in _FILLING]
        plain = len(telling) > 1 or sum(map(str.isalpha, own)) >= _PLAIN_LETTERS
        template = Template(pieces, target, sum(map(len, pieces)), plain, bool(telling))
        self._by_word.setdefault(max(words, key=len, default=""), []).append(template)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one catalogue lives as long as the process
    def _best(self, text: str, depth: int = 0) -> Reading:
        """Of all ways to read a text that which accounts for most of it.

        A value that goes on too far (into the next sentence, say) accounts for less than the reading that ends it.
        """
        if text in self._exact and " " in text:
            return Reading(self._exact[text], len(text), len(text))
        if " " not in text or depth > _DEEPEST:
            return Reading(text)
        return max(self._readings(text, depth + 1), key=lambda one: (one.covered, one.own), default=Reading(text))

    def _readings(self, text: str, depth: int) -> Iterator[Reading]:
        if text.startswith("- "):
            listed = self._best(text[2:], depth)
            yield Reading(f"- {listed.said}", listed.covered)
            return
        if (number := _NUMBER.match(text)) is not None:  # of a line; or a value, where a sentence takes it for one
            listed = self._best(text[number.end() :], depth)
            yield Reading(f"{number[0]}{listed.said}", listed.covered, listed.own + 1)
        yield Reading(text)
        yield from self._by_template(text, depth)
        for mark, own in (("\n", "\n"), ("; ", "；")):
            if mark in text:
                yield _joined(own, [self._best(part, depth) for part in text.split(mark)])
        yield from self._by_mark(text, depth)
        if (behind := _BRACKETS.fullmatch(text)) is not None:
            yield _joined("", [self._best(behind[1], depth), self._aside(behind[2], depth)])

    def _by_template(self, text: str, depth: int) -> Iterator[Reading]:
        """One entry, with its values: as they are, or as sentences of their own."""
        for word in {*_WORD.findall(text), ""}:
            for template in self._by_word.get(word, ()):
                values = template.values(text)
                if values is None or not self._believed(template, values, depth):
                    continue
                read = [self._best(value, depth) for value in values]
                yield template.filled(read)
                # brackets at the end belong behind the sentence, wherever the last value goes
                behind = _BRACKETS.fullmatch(values[-1]) if template.pieces[-1] == "" else None
                if behind is not None:
                    head = template.filled([*read[:-1], self._best(behind[1], depth)])
                    both = _joined("", [head, self._aside(behind[2], depth)])
                    yield Reading(both.said, both.covered, head.own + 1)

    def _believed(self, template: Template, values: Sequence[str], depth: int) -> bool:
        """Whether its own text is enough to go by, or a value could be the rest of any other sentence."""
        if template.plain:
            return True
        if not template.telling:
            return all(_QUANTITY.fullmatch(value) for value in values)
        return all(
            " " not in value or piece.endswith(": ") or _QUANTITY.fullmatch(value) or self._best(value, depth).covered
            for piece, value in zip(template.pieces, values, strict=False)
        )

    def _by_mark(self, text: str, depth: int) -> Iterator[Reading]:
        """Two sentences with a mark between; single words beside it are names: in a list, of a step, of a task."""
        for mark, own in ((": ", "："), (", ", "，")):
            for head, tail in itertools.islice(_cuts(text, mark), _MOST_CUTS):
                first, second = self._best(head, depth), self._best(tail, depth)
                if mark == ": " and tail in self._exact:
                    second = Reading(self._exact[tail], len(tail))
                if mark == ", " and first.covered + second.covered:
                    first, second = (
                        Reading(self._exact.get(side, read.said), read.covered)
                        for side, read in ((head, first), (tail, second))
                    )
                # a path before a colon stays as it is, and so does the colon, so that it can be taken up
                yield _joined(mark if mark == ": " and not first.covered else own, [first, second])

    def _aside(self, inner: str, depth: int) -> Reading:
        read = self._best(inner, depth)
        return Reading(f"（{read.said}）" if read.covered else f" ({inner})", read.covered)


def _joined(mark: str, readings: Sequence[Reading]) -> Reading:
    """Readings one after the other; a mark between two that are known is known, too."""
    covered = sum(one.covered for one in readings)
    covered += len(mark) * sum(bool(one.covered and other.covered) for one, other in itertools.pairwise(readings))
    return Reading(mark.join(one.said for one in readings), covered)


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
