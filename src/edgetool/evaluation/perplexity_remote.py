"""Perplexity of an endpoint: by tokens where its tokenizer is known, else by pieces of text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from edgetool.errors import BackendFailed
from edgetool.evaluation.answers import Answers, key_of
from edgetool.evaluation.perplexity import known_tokens, never, nll_key, scores_of
from edgetool.evaluation.records import PerplexityScores, WindowLoss
from edgetool.evaluation.windows import CutText
from edgetool.progress import Progress

if TYPE_CHECKING:
    from edgetool.evaluation.endpoint import Scored

WINDOWS_AT_ONCE = 16
"""Windows that an endpoint is asked for together, and the most that a stop or a failure loses."""

CHARACTERS_PER_TOKEN = 3
"""How long a piece of text is that is sent to a server whose tokenizer nobody knows: short enough for any English."""


def measure_tokens(
    language_model: Any,
    text: CutText,
    answers: Answers,
    progress: Progress,
    title: str,
    heed_stop: Callable[[], None] = never,
) -> PerplexityScores:
    """Perplexity by a language model of lm-evaluation-harness: an endpoint whose tokenizer is known."""
    began = time.perf_counter()
    todo = [window for window in text.windows if nll_key(window) not in answers]
    with progress.task(title, text.predicted, "token", known_tokens(text, answers)) as task:
        for batch in _batches(todo):
            requests = [
                (None, list(window.tokens[: -window.predicted]), list(window.tokens[-window.predicted :]))
                for window in batch
            ]
            found = language_model._loglikelihood_tokens(requests, disable_tqdm=True)
            for window, (logprob, _) in zip(batch, found, strict=True):
                answers.put(nll_key(window), -float(logprob))
                task.advance(window.predicted)
            answers.flush()
            heed_stop()
    losses = [WindowLoss(answers.get(nll_key(window)) or 0.0, window.predicted) for window in text.windows]
    return scores_of(text, losses, time.perf_counter() - began)


def measure_text(
    score: Callable[[str], Scored],
    text: str,
    text_sha256: str,
    context: int,
    limit: int | None,
    answers: Answers,
    progress: Progress,
    title: str,
    *,
    concurrency: int = 1,
    heed_stop: Callable[[], None] = never,
) -> PerplexityScores:
    """Perplexity by an endpoint whose tokenizer nobody knows, which `score` asks (`endpoint.Client.scored`).

    The text is sent in pieces of `context` * CHARACTERS_PER_TOKEN characters that do not overlap; the server's first
    token of each has no probability, and neither it nor its word counts.
    """
    pieces = cut_at_blanks(text, context * CHARACTERS_PER_TOKEN)[:limit]
    keys = [key_of("text nll", piece) for piece in pieces]
    began = time.perf_counter()
    todo = [(key, piece) for key, piece in zip(keys, pieces, strict=True) if key not in answers]
    with (
        ThreadPoolExecutor(concurrency, "perplexity") as pool,
        progress.task(title, len(pieces), "piece", len(pieces) - len(todo)) as task,
    ):
        for batch in _batches(todo):
            scored = pool.map(lambda one: _piece_answer(score(one[1]), one[1], title), batch)
            for (key, _), answer in zip(batch, scored, strict=True):
                answers.put(key, answer)
                task.advance()
            answers.flush()
            heed_stop()
    found = [answers.get(key) or {} for key in keys]
    losses = [WindowLoss(one["nll"], one["tokens"]) for one in found]
    words = sum(len(piece.split()) - one["skipped_words"] for piece, one in zip(pieces, found, strict=True))
    size = sum(len(piece.encode()) for piece in pieces)
    return PerplexityScores(
        tuple(losses),
        max(1, words),
        size,
        context * CHARACTERS_PER_TOKEN,
        context * CHARACTERS_PER_TOKEN,
        "none",
        text_sha256,
        time.perf_counter() - began,
        "characters",
    )


def cut_at_blanks(text: str, characters: int) -> list[str]:
    """The text in pieces of at most `characters` that join to it, beginning with white space where they can."""
    pieces = []
    while len(text) > characters:
        blanks = [found.start() for found in re.finditer(r"(?<=\S)\s", text[characters // 2 : characters])]
        at = characters // 2 + blanks[-1] if blanks else characters
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text] if text.strip() else pieces


def _piece_answer(scored: Scored, piece: str, title: str) -> dict[str, Any]:
    values = scored.logprobs[:-1]  # the last token is one that the server generated
    known = [value for value in values if value is not None]
    if not known:
        raise BackendFailed(f"{title}: the server scored no token of {piece[:40]!r}")
    return {"nll": -math.fsum(known), "tokens": len(known), "skipped_words": int(values[0] is None)}


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), WINDOWS_AT_ONCE):
        yield items[start : start + WINDOWS_AT_ONCE]
