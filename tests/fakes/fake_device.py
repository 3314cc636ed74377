"""A device without a model: tokens are characters, and answers are what the prompt's end says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edgetool.errors import BadInput
from edgetool.fpga_service.device import DeviceFacts, GenerateOptions, ScoredToken, Step

EOS = 0


class FakeDevice:
    """The id of a character is its code point, of the end 0. The answer to a prompt is `<` + its last word + `>`.

    Args:
        vocab: ids below it.
        context_tokens: longest sequence.
        gate: every step waits for it, until it is taken away.
        fail: what `generate` raises after one step.
    """

    def __init__(
        self,
        vocab: int = 0x110000,
        context_tokens: int = 10_000,
        gate: threading.Semaphore | None = None,
        fail: BaseException | None = None,
    ) -> None:
        self.facts = DeviceFacts("fake", "llama", vocab, context_tokens, (EOS,), "et1", "ab" * 32, "fake-board")
        self.gate = gate
        self.fail = fail
        self.options: list[GenerateOptions] = []
        self.prompts: list[str] = []
        self.steps = 0
        self.threads: set[str] = set()
        self.stopped = 0
        self.closed = False

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if any(message["role"] == "tool" for message in messages):
            raise BadInput("the template knows no role tool")
        return [ord(c) for message in messages for c in f"[{message['role']}] {message['content']}"]

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(id) for id in ids if id != EOS)

    def generate(
        self, prompt: Sequence[int], options: GenerateOptions, cancelled: Callable[[], bool]
    ) -> Iterator[Step]:
        self.threads.add(threading.current_thread().name)
        self.options.append(options)
        if max(prompt) >= self.facts.vocab:
            raise BadInput(f"no token {max(prompt)}")
        text = self.decode(prompt)
        self.prompts.append(text)
        answer = [ord(c) for c in f"<{text.split()[-1]}>"] + [EOS]
        most = min(options.max_tokens or len(prompt) + len(answer), self.facts.max_context_tokens - len(prompt))
        for count, id in enumerate(answer[:most], 1):
            gate = self.gate
            while gate is not None and gate is self.gate and not cancelled() and not gate.acquire(timeout=0.01):
                pass
            if cancelled():
                self.stopped += 1
                return
            self.steps += 1
            last = "stop" if id == EOS else "length" if count == most else None
            logprob = None if options.logprobs is None else -float("inf") if id == EOS else -0.5
            top = tuple((id + more, chr(id + more), -0.5 - more) for more in range(options.logprobs or 0))
            yield Step(id, "" if id == EOS else chr(id), logprob, top, last)  # type: ignore[arg-type]
            if self.fail is not None:
                raise self.fail

    def score(
        self, prompt: Sequence[int], top: int = 0, cancelled: Callable[[], bool] | None = None
    ) -> list[ScoredToken]:
        return [
            ScoredToken(id, chr(id), at, None if at == 0 else -float(at), ((id, chr(id), -float(at)),) * top)
            for at, id in enumerate(prompt)
        ]

    def close(self) -> None:
        self.closed = True
