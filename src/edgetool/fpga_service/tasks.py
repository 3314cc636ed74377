"""What the host has its device do, as tasks for work.py: generators that run in the device's thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetool.errors import BadInput
from edgetool.fpga_service.device import ContextLengthExceeded, Device, GenerateOptions, ScoredToken, Step
from edgetool.fpga_service.work import Task

Encode = Callable[[Device], list[int]]
"""How a prompt becomes ids; in the device's thread, since the tokenizer is the device's."""


@dataclass(frozen=True)
class Begun:
    """The device has begun to answer a prompt of so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class ScoresMade:
    """All tokens of a prompt with their scores."""

    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class IdsMade:
    """The ids of a text or a history."""

    ids: tuple[int, ...]


def of_messages(messages: Sequence[Mapping[str, Any]]) -> Encode:
    """The ids of a history."""
    return lambda device: device.encode_chat(messages)


def of_prompt(prompt: str | Sequence[int]) -> Encode:
    """The ids of a text; ids as they are."""
    return lambda device: device.encode(prompt) if isinstance(prompt, str) else list(prompt)


def answer(encode: Encode, options: GenerateOptions, *, fit: bool = False) -> Task:
    """Begun, and Steps. With `fit` an answer that would not fit ends with the context instead of being refused."""

    def task(device: Device, stopped: Callable[[], bool]) -> Generator[Begun | Step, None, None]:
        prompt = encode(device)
        context = device.facts.max_context_tokens
        room = context - len(prompt)
        asked = options.max_tokens
        if not prompt:
            raise BadInput("the prompt is empty")
        if room < 1 or (asked is not None and asked > room and not fit):
            raise ContextLengthExceeded(len(prompt), asked, context)
        yield Begun(len(prompt))
        fitted = options if asked is None else replace(options, max_tokens=min(asked, room))
        yield from device.generate(prompt, fitted, stopped)

    return task


def scores(encode: Encode, top: int) -> Task:
    """ScoresMade."""

    def task(device: Device, stopped: Callable[[], bool]) -> Generator[ScoresMade, None, None]:
        prompt = encode(device)
        if not prompt:
            raise BadInput("the prompt is empty")
        if len(prompt) > device.facts.max_context_tokens:
            raise ContextLengthExceeded(len(prompt), None, device.facts.max_context_tokens)
        yield ScoresMade(tuple(device.score(prompt, top, stopped)))

    return task


def ids(encode: Encode) -> Task:
    """IdsMade."""

    def task(device: Device, _: Callable[[], bool]) -> Generator[IdsMade, None, None]:
        yield IdsMade(tuple(encode(device)))

    return task
