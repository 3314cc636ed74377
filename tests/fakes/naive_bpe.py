"""Byte-level BPE by the book: split with a regular expression, then merge the best pair until none is left."""

from __future__ import annotations

from itertools import pairwise

import regex

SMOLLM = [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
"""Patterns of llama.cpp for pre-tokenizer "smollm", each applied to the pieces the one before it left."""


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    spare = 256
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(spare)
            spare += 1
    return letters


LETTERS = _byte_letters()


class NaiveBpe:
    """Encoder over a vocabulary, a list of merges ("left right"), special tokens and split patterns."""

    def __init__(self, vocab: dict[str, int], merges: list[str], special: list[str], patterns: list[str]) -> None:
        self.vocab = vocab
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = special
        self.patterns = [regex.compile(pattern) for pattern in patterns]

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self._cut_special(text):
            if part in self.special:
                ids.append(self.vocab[part])
                continue
            pieces = [part]
            for pattern in self.patterns:
                pieces = [piece for old in pieces for piece in self._cut(old, pattern)]
            for piece in pieces:
                ids += self._merge([LETTERS[byte] for byte in piece.encode()])
        return ids

    def _cut_special(self, text: str) -> list[str]:
        if not self.special:
            return [text]
        pattern = "|".join(regex.escape(token) for token in sorted(self.special, key=len, reverse=True))
        return [part for part in regex.split(f"({pattern})", text) if part]

    @staticmethod
    def _cut(text: str, pattern: regex.Pattern[str]) -> list[str]:
        pieces, end = [], 0
        for match in pattern.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        return [piece for piece in [*pieces, text[end:]] if piece]

    def _merge(self, symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            pairs = [(self.ranks.get(pair, 1 << 60), i) for i, pair in enumerate(pairwise(symbols))]
            rank, i = min(pairs)
            if rank == 1 << 60:
                break
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.vocab[symbol] for symbol in symbols]
