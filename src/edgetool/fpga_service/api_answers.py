"""What the gateway answers: text and log-probabilities put together from the tokens that the host sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetool.fpga_service.device import ScoredToken, Step, TopToken


@dataclass(frozen=True)
class Likely:
    """One token of a prompt or an answer with its log-probability; `offset`: characters of text before it."""

    token: str
    logprob: float | None
    top: tuple[TopToken, ...]
    offset: int


@dataclass
class Choice:
    """One choice, growing. `text` begins with the prompt where that is to be echoed. Counts are None until known."""

    text: str = ""
    finish: str | None = None
    likely: list[Likely] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    steps: int = 0

    @property
    def made(self) -> int:
        """Tokens of the answer: as the host counts them, else those that came."""
        return self.steps if self.completion_tokens is None else self.completion_tokens

    def add_prompt(self, tokens: Sequence[ScoredToken], text: str | None) -> None:
        """Put the prompt before the answer: its tokens and, where it was given as text, that text as it was."""
        self.likely += [Likely(token.text, token.logprob, token.top, token.text_offset) for token in tokens]
        self.text += "".join(token.text for token in tokens) if text is None else text
        self.prompt_tokens = len(tokens)

    def add(self, step: Step, end_ids: Sequence[int]) -> Likely | None:
        """Add one step; what there is to say about its token, None for an end token or where nothing was asked."""
        before = len(self.text)
        self.text += step.text
        if step.finish is not None:
            self.finish = step.finish
        if step.logprob is None or (step.finish == "stop" and step.id in end_ids):
            return None
        likely = Likely(step.token, step.logprob, step.top, before)
        self.likely.append(likely)
        return likely


def completion_logprobs(tokens: Sequence[Likely], most: int) -> dict[str, Any]:
    """The record of /v1/completions for `tokens`: parallel lists, with `most` likeliest tokens and the one chosen."""
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token, most) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: Likely, most: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    # several ids may have the same text (halves of characters): the likeliest of them keeps the name
    for _, text, logprob in token.top[:most]:
        found.setdefault(text, logprob)
    found.setdefault(token.token, token.logprob)
    return found


def chat_logprobs(tokens: Sequence[Likely], most: int) -> dict[str, Any]:
    """The record of /v1/chat/completions for `tokens`."""
    content = [
        {
            **_entry(token.token, token.logprob),
            "top_logprobs": [_entry(text, logprob) for _, text, logprob in token.top[:most]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    # the bytes of a part of a character are not known: its text is only a mark that something is missing
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
