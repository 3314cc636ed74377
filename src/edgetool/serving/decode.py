"""Token by token from a model in memory: sampling, stop strings, and text that is never cut inside a character."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the likeliest. top_p, top_k: the usual cuts, 1.0 and 0 for none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one step adds: text (may be empty) and one token; `finish` with the last piece: stop or length."""

    text: str
    tokens: int
    finish: str | None = None


class Decoder:
    """Generates from `model` (transformers' causal language model) with `tokenizer`; one sequence at a time."""

    def __init__(self, model: Any, tokenizer: Any, end_ids: Sequence[int], max_model_len: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.max_model_len = max_model_len

    def pieces(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        cancelled: Callable[[], bool],
    ) -> Iterator[Piece]:
        """Pieces of the answer to `prompt` (at least one token id); ends early when `cancelled` says so."""
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        cache = DynamicCache(config=self.model.config)
        generator = torch.Generator(device=device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed & (2**63 - 1))
        text = TextOut(self.tokenizer, stop)
        ids = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
        last = min(max_tokens, self.max_model_len - len(prompt))
        for count in range(1, last + 1):
            with torch.inference_mode():
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                token = choose(logits[0, -1].float(), sampling, generator)
            if cancelled():
                return
            if token in self.end_ids:
                yield Piece(text.rest(), 1, "stop")
                return
            new = text.add(token)
            if text.stopped:
                yield Piece(new, 1, "stop")
                return
            if count == last:
                yield Piece(new + text.rest(), 1, "length")
                return
            yield Piece(new, 1)
            ids = torch.tensor([[token]], dtype=torch.int64, device=device)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from float32 logits [vocab]."""
    if sampling.temperature < 1e-5:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    chances = logits.softmax(0)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True)
        # the first token that reaches top_p still belongs to the nucleus
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        beyond[0] = False  # a top_p that float32 cannot tell from 0 leaves the likeliest
        ordered[beyond] = 0
        chances = torch.zeros_like(chances).scatter_(0, order, ordered)
    return int(torch.multinomial(chances, 1, generator=generator))


class TextOut:
    """Tokens to text: what may still become another character or a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [word for word in stop if word]
        self._ids: list[int] = []
        self._decoded = ""
        self._said = 0

    def add(self, token: int) -> str:
        """The new text that is certain now. After a stop string `stopped` is True, and the string is left out."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""  # part of a character of several bytes
        self._decoded = text
        ends = [found for word in self._stop if (found := text.find(word, max(0, self._said - len(word)))) >= 0]
        if ends:
            self.stopped = True
            return self._up_to(max(self._said, min(ends)))
        return self._up_to(max(self._said, len(text) - self._held(text)))

    def rest(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        self._decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._up_to(len(self._decoded))

    def _up_to(self, end: int) -> str:
        new, self._said = self._decoded[self._said : end], end
        return new

    def _held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(word) - 1 for word in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0
