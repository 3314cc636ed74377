"""What an evaluation finds: scores with the outcome of every sample, perplexity by window, and their JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """The outcome of one question.

    id: upstream's own id where the row has one, else "<subtask>:<index>"; unique within its task.
    group: the subtask, e.g. mmlu_anatomy; the task's own name where it has none.
    score: the task's main metric for this sample, 0 to 1 (a right or wrong answer is 1.0 or 0.0).
    more: other metrics of the sample by upstream's names (acc_norm, plus, ...).
    """

    id: str
    group: str
    score: float
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScores:
    """One task measured on one target.

    metric: name of the main metric, as upstream calls it; higher is better, 0 to 1, the mean of `samples`' scores.
    n: number of samples. value, stderr: the main metric as upstream aggregates it.
    metrics: all of upstream's figures by upstream's names. groups: main metric by subtask, empty where there is one.
    seconds: wall time that measuring took, without answers that were known. generated_tokens: None where unknown.
    version: framework, its version, the task's version: what the profile is made of.
    """

    task: str
    metric: str
    n: int
    value: float
    stderr: float | None
    samples: tuple[Sample, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    generated_tokens: int | None = None
    version: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowLoss:
    """Summed negative log-likelihood, in nats, of the `tokens` tokens that one window predicts."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class PerplexityScores:
    """Perplexity of one target on one text.

    windows: in the order of the text; their predicted tokens do not overlap.
    words, text_bytes: of the text that was predicted (words are separated by white space; bytes of UTF-8).
    context: most tokens that a prediction sees. stride: tokens that a window after the first predicts.
    prefix: "every window" where each begins with the beginning-of-text token, "first window" where only the first has
    one (or the end-of-text token in its place), "none" where the server's tokenizer decides.
    unit: of context and stride; "characters" where nobody knows the server's tokenizer.
    """

    windows: tuple[WindowLoss, ...]
    words: int
    text_bytes: int
    context: int
    stride: int
    prefix: str
    text_sha256: str
    seconds: float = 0.0
    unit: Literal["tokens", "characters"] = "tokens"

    @property
    def nll(self) -> float:
        """Nats for the whole text."""
        return math.fsum(window.nll for window in self.windows)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(window.tokens for window in self.windows)

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); inf where that is beyond a float."""
        return _exp(self.nll / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(nll / words): comparable between tokenizers."""
        return _exp(self.nll / self.words)

    @property
    def bits_per_byte(self) -> float:
        """nll / text_bytes / ln 2: comparable between tokenizers and languages."""
        return self.nll / self.text_bytes / math.log(2)


@dataclass(frozen=True)
class Divergence:
    """How far the quantised model's next-token distributions are from the original's, over `tokens` tokens.

    kl_mean, kl_percentiles ("p50", "p90", "p99", "max"): KL(original || quantized) of a token, in nats.
    top1_agreement: share of tokens for which both find the same token the likeliest, 0 to 1.
    """

    kl_mean: float
    kl_percentiles: Mapping[str, float]
    top1_agreement: float
    tokens: int


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
