"""Prompts of a wanted length in tokens for a server whose tokenizer is not known.

Common English words are one token in nearly every vocabulary; what a chat template adds, and what is left of the
difference, is found by asking the server how long two prompts are. Every prompt is different from its first words on,
so that no prefix cache answers in place of the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face level office door health person art war history party result change morning reason research girl "
    "moment air teacher force education"
)

PROBE_WORDS = (32, 160)
_LEAST_WORDS = 4


@dataclass(frozen=True)
class Length:
    """tokens = fixed + per_word x words, as a server counts. `measured` is False where it would not tell."""

    fixed: float
    per_word: float
    measured: bool

    def words(self, tokens: int) -> int:
        """Words for a prompt of about `tokens` tokens, template included."""
        return max(_LEAST_WORDS, round((tokens - self.fixed) / self.per_word))


def fit(counts: tuple[int | None, int | None]) -> Length:
    """From the tokens that a server counts in prompts of PROBE_WORDS words."""
    few, many = counts
    if few is None or many is None or many <= few:
        return Length(0.0, 1.0, False)
    per_word = (many - few) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    return Length(few - per_word * PROBE_WORDS[0], per_word, True)


def text(words: int, seed: int, number: int) -> str:
    """Prompt `number` of a run: `words` random words, the same for the same seed."""
    draw = random.Random(f"{seed}/{number}")  # noqa: S311
    return " ".join(draw.choices(_WORDS.split(), k=words))
