"""What a board service needs of a device, and nothing of how it is built: the simulator today, a board by DMA one day.

A device does one thing at a time: the host calls it from one thread, and lets one call end before the next begins.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edgetool.errors import BadInput

Finish = Literal["stop", "length"]
TopToken = tuple[int, str, float]
"""One of the likeliest tokens: id, its text, natural logarithm of its probability."""


class ContextLengthExceeded(BadInput):
    """A prompt, or a prompt with the tokens asked for, is longer than the device's context."""

    def __init__(self, prompt_tokens: int, max_tokens: int | None, max_context_tokens: int) -> None:
        asked = f" and max_tokens is {max_tokens}" if max_tokens is not None else ""
        super().__init__(
            f"the context is {max_context_tokens} tokens long; the prompt has {prompt_tokens}{asked}",
            "shorten the prompt or ask for fewer tokens",
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.max_context_tokens = max_context_tokens


@dataclass(frozen=True)
class DeviceFacts:
    """What stays the same while a device is open.

    vocab: logits of a token. numerics: "et1" or "fast". image_sha256: of the image's manifest, which names all hashes.
    temperature, top_p, top_k: the model's own defaults (1.0, 1.0, 0 where it has none). chat: whether the model has a
    form for conversations, so that `encode_chat` works.
    """

    model: str
    family: str
    vocab: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    numerics: str
    image_sha256: str
    board: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    chat: bool = True


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is made.

    max_tokens: at most so many; None: until the context is full. temperature 0: the likeliest token. top_p 1.0 and
    top_k 0: no cut. seed: equal seeds give equal answers; None: another each time. stop: strings that end the answer
    and are left out of it. logprobs: how many of the likeliest tokens each Step names; 0: the chosen one's logprob
    only; None: none at all. ignore_eos: an end token is a token like others.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Step:
    """One token of an answer.

    text: the text that is certain now; it may belong to earlier tokens and is never half a character or the beginning
    of a stop string. logprob, top: of the model's own distribution (temperature 1), top by falling probability. finish:
    None except in the last Step, which may be an end token (its id is one of eos_token_ids). token: the text of this id
    alone, where log-probabilities were asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()
    finish: Finish | None = None
    token: str = ""


@dataclass(frozen=True)
class ScoredToken:
    """One token of a prompt. text_offset: characters of the prompt's text before it. logprob: None for the first."""

    id: int
    text: str
    text_offset: int
    logprob: float | None
    top: tuple[TopToken, ...] = ()


class Device(Protocol):
    """One device with one model in it.

    Prompts are token ids, at least one, each below facts.vocab: BadInput otherwise. ContextLengthExceeded where they do
    not fit. `cancelled` is asked at least once a token and between the chunks of a prompt; after True the call ends
    early, without an error.
    """

    @property
    def facts(self) -> DeviceFacts: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a history ({"role", "content": text}) in the model's own form, ready for its answer.

        Raises BadInput where the model's template refuses the history, or the model has none.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with the tokens that the tokenizer puts before any text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...

    def generate(
        self, prompt: Sequence[int], options: GenerateOptions, cancelled: Callable[[], bool]
    ) -> Iterator[Step]:
        """The tokens that follow `prompt`, as they are made. The last has `finish`, unless it was cancelled."""
        ...

    def score(
        self, prompt: Sequence[int], top: int = 0, cancelled: Callable[[], bool] | None = None
    ) -> list[ScoredToken]:
        """Every token of `prompt` with its logprob after those before it, and the `top` likeliest tokens there."""
        ...

    def close(self) -> None:
        """Let go of the device. Further calls are an error."""
        ...
