"""The simulated board as a device: an image, its tokenizer, and how tokens are drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edgetool.errors import BadInput, Stopped
from edgetool.fpga.image import Image
from edgetool.fpga.image_format import MANIFEST_NAME
from edgetool.fpga.simulator.engine import Simulator
from edgetool.fpga.simulator.interfaces import NumericsName, Wanted
from edgetool.fpga.simulator.session import Session
from edgetool.fpga_service.device import (
    ContextLengthExceeded,
    DeviceFacts,
    GenerateOptions,
    ScoredToken,
    Step,
    TopToken,
)
from edgetool.fpga_service.tokens import HALF_A_CHARACTER, Tokens
from edgetool.models.devices import resolve_device
from edgetool.serving.decode import Sampling, TextOut, choose

_SCORED_LOGITS = 1 << 24
"""Logits of a prompt that are in memory at a time."""

Cancelled = Callable[[], bool]


def open_device(
    directory: Path,
    *,
    numerics: NumericsName = "et1",
    device: str = "auto",
    threads: int | None = None,
    board: str = "simulator",
    model: str | None = None,
) -> SimulatorDevice:
    """The image at `directory`, checked byte by byte, on a simulated board.

    device: auto, cpu or cuda, for `fast` (et1 runs on the CPU). threads: of torch; None: as it is. model: its name;
    None: the directory's.
    """
    image = Image.open(directory, hashes=True, jobs=torch.get_num_threads())
    where = str(resolve_device(device)) if numerics == "fast" else "cpu"
    simulator = Simulator(image, numerics, threads, where)
    return SimulatorDevice(simulator, board=board, model=model or directory.resolve().name)


class SimulatorDevice:
    """A Device (device.py) on a Simulator."""

    def __init__(self, simulator: Simulator, *, board: str, model: str) -> None:
        self._simulator = simulator
        image = simulator.image
        self._tokens = Tokens(image.directory / "tokenizer", simulator.facts.family)
        self._ends, self.facts = _facts(simulator, self._tokens, board, model)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._tokens.encode_chat(messages)

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokens.decode(ids)

    def generate(self, prompt: Sequence[int], options: GenerateOptions, cancelled: Cancelled) -> Iterator[Step]:
        self._check(prompt, max(1, options.max_tokens) if options.max_tokens is not None else None)
        return self._generate(list(prompt), options, cancelled)

    def _generate(self, prompt: list[int], options: GenerateOptions, cancelled: Cancelled) -> Iterator[Step]:
        room = self.facts.max_context_tokens - len(prompt)
        last = room if options.max_tokens is None else max(1, options.max_tokens)
        text = TextOut(self._tokens.tokenizer, options.stop)
        draw = _Draw(options)
        with self._simulator.session(prompt) as session:
            new = prompt[session.position :]
            for count in range(1, last + 1):
                rows = _feed(session, new, "last", cancelled)
                if rows is None or cancelled():
                    return
                logits = rows[0]
                chosen = draw(logits)
                said, finish = self._say(text, chosen, options, count == last)
                yield self._step(chosen, said, logits, options.logprobs, finish)
                if finish is not None:
                    return
                new = [chosen]

    def _say(
        self, text: TextOut, chosen: int, options: GenerateOptions, final: bool
    ) -> tuple[str, Literal["stop", "length"] | None]:
        """The text that is certain after a token, and whether it was the last."""
        if chosen in self._ends and not options.ignore_eos:
            return _whole(text.rest()), "stop"
        said = text.add(chosen)
        if text.stopped:
            return said, "stop"
        return (said + _whole(text.rest()), "length") if final else (said, None)

    def _step(
        self, chosen: int, said: str, logits: Tensor, top: int | None, finish: Literal["stop", "length"] | None
    ) -> Step:
        if top is None:
            return Step(chosen, said, finish=finish)
        chances = logits.log_softmax(0)
        return Step(
            chosen, said, float(chances[chosen]), self._likeliest(chances, top), finish, self._tokens.decode([chosen])
        )

    def score(self, prompt: Sequence[int], top: int = 0, cancelled: Cancelled | None = None) -> list[ScoredToken]:
        self._check(prompt, None, spare=0)
        ids = list(prompt)
        texts = self._tokens.texts(ids)
        found = [ScoredToken(ids[0], texts[0], 0, None)]
        offset = len(texts[0])
        block = max(1, _SCORED_LOGITS // self.facts.vocab)
        with self._simulator.session() as session:
            for start in range(0, len(ids) - 1, block):
                fed = ids[start : min(start + block, len(ids) - 1)]
                rows = _feed(session, fed, "all", cancelled)
                if rows is None:
                    return found
                for row, at in zip(rows, range(start + 1, start + 1 + len(fed)), strict=True):
                    chances = row.log_softmax(0)
                    likeliest = self._likeliest(chances, top)
                    found.append(ScoredToken(ids[at], texts[at], offset, float(chances[ids[at]]), likeliest))
                    offset += len(texts[at])
        return found

    def close(self) -> None:
        del self._simulator

    def _likeliest(self, chances: Tensor, top: int) -> tuple[TopToken, ...]:
        """The `top` likeliest tokens, the lowest id first among equals."""
        if not top:
            return ()
        values, _ = chances.topk(min(top, len(chances)))
        ids = torch.nonzero(chances >= values[-1]).flatten()
        order = torch.argsort(chances[ids], descending=True, stable=True)[:top]
        return tuple((int(one), self._tokens.decode([int(one)]), float(chances[one])) for one in ids[order])

    def _check(self, prompt: Sequence[int], max_tokens: int | None, spare: int = 1) -> None:
        vocab, room = self.facts.vocab, self.facts.max_context_tokens
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab:
            raise BadInput(f"the prompt must hold at least one token id, all from 0 to {vocab - 1}")
        if len(prompt) + (spare if max_tokens is None else max_tokens) > room:
            raise ContextLengthExceeded(len(prompt), max_tokens, room)


class _Draw:
    """Chooses tokens by the options of one answer."""

    def __init__(self, options: GenerateOptions) -> None:
        self._sampling = Sampling(options.temperature, options.top_p, options.top_k, options.seed)
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed & (2**63 - 1))

    def __call__(self, logits: Tensor) -> int:
        return choose(logits, self._sampling, self._generator)


def _whole(text: str) -> str:
    """What was held back to the end, without the sign for a character that will not be completed."""
    return text.rstrip(HALF_A_CHARACTER)


def _feed(session: Session, ids: list[int], wanted: Wanted, cancelled: Cancelled | None) -> Tensor | None:
    """float32 [rows, vocab] as `wanted`; None when cancelled. Infinite logits become the largest finite ones.

    Raises BadInput where there is nothing to choose from, since numbers overflowed on the way.
    """
    try:
        logits = torch.from_numpy(session.feed(ids, wanted, cancelled)).float()
    except Stopped:
        return None
    if math.isfinite(float(logits.sum())):
        return logits
    if bool(logits.isnan().any()):
        first = next(iter(session.overflows), "an operation")
        raise BadInput(
            f"numbers became infinite in {first} of the image, and the next token cannot be told",
            "the model's activations do not fit into fp16: --numerics fast has more room",
        )
    return torch.nan_to_num(logits)


def _facts(simulator: Simulator, tokens: Tokens, board: str, model: str) -> tuple[frozenset[int], DeviceFacts]:
    facts, own = simulator.facts, tokens.generation_defaults()
    ends = {*facts.eos_token_ids, *own.end_ids, tokens.tokenizer.eos_token_id} - {None}
    manifest = (simulator.image.directory / MANIFEST_NAME).read_bytes()
    return frozenset(ends), DeviceFacts(
        model=model,
        family=facts.family,
        vocab=facts.vocab,
        max_context_tokens=facts.max_context_tokens,
        eos_token_ids=tuple(sorted(ends)),
        numerics=facts.numerics,
        image_sha256=hashlib.sha256(manifest).hexdigest(),
        board=board,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=own.top_k,
        chat=tokens.chat,
    )
