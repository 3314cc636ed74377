"""A text as the windows on which perplexity is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgetool.errors import BadInput

Prefix = Literal["every window", "first window"]


@dataclass(frozen=True)
class Window:
    """tokens: what the model is fed and, at the end, one token more; the last `predicted` of them are predicted."""

    tokens: tuple[int, ...]
    predicted: int


@dataclass(frozen=True)
class CutText:
    """A text cut for one tokenizer. Fields as in `records.PerplexityScores`."""

    windows: tuple[Window, ...]
    words: int
    text_bytes: int
    text_sha256: str
    context: int
    stride: int
    prefix: Prefix

    @property
    def predicted(self) -> int:
        """Tokens that are predicted, each once."""
        return sum(window.predicted for window in self.windows)


def read_text(path: Path) -> str:
    """The file as UTF-8, every byte of it. Raises BadInput where it is no text or has none."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not UTF-8 text (byte {error.start})", "convert it, e.g. with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"{path}: the file holds no text")
    return text


def cut(
    text: str, tokenizer: Any, context: int, stride: int, limit: int | None = None, longest: int | None = None
) -> CutText:
    """Cut `text` for transformers' `tokenizer`; at most `limit` windows of it.

    The first window predicts `context` tokens, each after it the next `stride` (1 <= stride <= context), seeing
    `context` tokens for the last of them. What precedes the first token of the text is the beginning-of-text token, or
    the end-of-text token of a tokenizer without one: as lm-evaluation-harness does, whose rolling log-likelihood
    this is for stride = context. Where the tokenizer puts a beginning-of-text token before texts of its own accord,
    the model has never seen a text without it: every window begins with it then, in the place of one token of context.

    Raises BadInput where the model's `longest` input is shorter than `context`.
    """
    if longest is not None and context > longest:
        raise BadInput(
            f"--context {context} is more than the {longest} tokens of the model", f"use --context {longest}"
        )
    start, everywhere = _start(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = tuple(_windows(tokens, context, stride, start, everywhere)[:limit])
    count = sum(window.predicted for window in windows)
    covered = text if count == len(tokens) else tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)
    return CutText(
        windows,
        max(1, len(covered.split())),
        len(covered.encode()),
        hashlib.sha256(text.encode()).hexdigest(),
        context,
        stride,
        "every window" if everywhere else "first window",
    )


def _start(tokenizer: Any) -> tuple[int, bool]:
    """The token before the text, and whether the tokenizer puts it before every text."""
    begin = tokenizer.bos_token_id
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    if begin is not None:
        return begin, first == [begin]
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has neither a beginning-of-text nor an end-of-text token to put before a text")
    return tokenizer.eos_token_id, False


def _windows(tokens: Sequence[int], context: int, stride: int, start: int, everywhere: bool) -> list[Window]:
    found = []
    done = 0
    while done < len(tokens):
        predicted = min(len(tokens) - done, stride if done else context)
        end = done + predicted
        low = end - context - 1  # a window is `context` tokens of input and the last that is predicted
        if low < 0:
            fed = (start, *tokens[:end])
        elif everywhere:
            fed = (start, *tokens[low + 1 : end])
        else:
            fed = tuple(tokens[low:end])
        found.append(Window(fed, predicted))
        done = end
    return found
