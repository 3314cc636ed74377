"""How far an engine has come in starting, read from its log."""

from __future__ import annotations

import re
from collections.abc import Sequence

Phases = Sequence[tuple[str, str]]

# vLLM 0.32
VLLM: Phases = (
    ("Resolved architecture", "reading the configuration"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "building the model"),
    (r"Loading safetensors.*Completed", "loading weights"),
    ("Loading weights took", "preparing weights"),
    (r"torch\.compile takes|Warming up|Capturing CUDA graphs", "warming up"),
    ("KV cache size", "making the key-value cache"),
    (r"init engine .* took", "starting the server"),
    ("Application startup complete", "answering"),
)
"""Pattern of a log line -> what goes on from there, in the order in which they come."""

TRANSFORMERS: Phases = (
    (r"read weights: \d", "reading weights"),
    ("read weights: done", "starting the server"),
    ("transformers engine: answering", "answering"),
)


class PhaseReader:
    """Follows a log line by line."""

    def __init__(self, phases: Phases) -> None:
        self.passed = 0
        self._phases = [(re.compile(pattern), words) for pattern, words in phases]

    def read(self, line: str) -> tuple[int, str] | None:
        """(phases newly passed, words) when `line` marks one that comes later than those seen; else None."""
        for number in range(self.passed, len(self._phases)):
            pattern, words = self._phases[number]
            if pattern.search(line):
                newly, self.passed = number + 1 - self.passed, number + 1
                return newly, words
        return None
