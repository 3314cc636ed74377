"""Perplexity of a model in memory, window by window; what was computed once is not computed again."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetool.evaluation.answers import Answers, key_of
from edgetool.evaluation.records import Divergence, PerplexityScores, WindowLoss
from edgetool.evaluation.windows import CutText, Window
from edgetool.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from edgetool.evaluation.divergence import KeptDistributions
    from edgetool.evaluation.loaded import LoadedModel


@dataclass(frozen=True)
class Against:
    """The original whose distributions are kept, and its identity, any text that is equal for equal models alone."""

    kept: KeptDistributions
    original: str


def never() -> None:
    """Nobody asks to stop."""


def nll_key(window: Window) -> str:
    """Name of a window's nll in the answers of a target."""
    return key_of("nll", window.tokens, window.predicted)


def divergence_key(window: Window, original: str) -> str:
    """Name of a window's divergence from `original` in the answers of the quantised model."""
    return key_of("divergence", original, window.tokens, window.predicted)


def divergence_known(text: CutText, chosen: Sequence[int], original: str, answers: Answers) -> bool:
    """Whether the quantised model's answers have its divergence from `original`, so that nothing need be kept."""
    return all(divergence_key(text.windows[index], original) in answers for index in chosen)


def measure(
    load: Callable[[], LoadedModel],
    text: CutText,
    answers: Answers,
    progress: Progress,
    title: str,
    *,
    keep: KeptDistributions | None = None,
    against: Against | None = None,
    heed_stop: Callable[[], None] = never,
) -> tuple[PerplexityScores, Divergence | None]:
    """Perplexity of a model, which `load` brings into memory if anything has to be computed.

    `keep`: where this model's distributions are to wait for another. `against`: the model that it is compared with;
    the divergence is None without it, and where the two vocabularies differ in size. `heed_stop` is called after each
    window and raises to end the run.
    """
    losses: list[WindowLoss] = []
    compared: list[dict[str, Any]] = []
    began = time.perf_counter()

    def left(index: int, window: Window) -> tuple[bool, bool, bool]:
        """Whether the window's nll, its distributions and its divergence are still to be computed."""
        keeping = keep is not None and index in keep.chosen and not keep.has(index)
        wanted = against is not None and index in against.kept.chosen
        unknown = wanted and against is not None and divergence_key(window, against.original) not in answers
        return nll_key(window) not in answers, keeping, unknown

    done = sum(window.predicted for index, window in enumerate(text.windows) if not any(left(index, window)))
    with progress.task(title, text.predicted, "token", done) as task:
        for index, window in enumerate(text.windows):
            nll, keeping, unknown = left(index, window)
            if nll or keeping or unknown:
                logits = window_logits(load(), window)
                if nll:
                    answers.put(nll_key(window), window_nll(logits, window))
                if keeping and keep is not None:
                    keep.write(index, logits)
                if unknown and against is not None:
                    answers.put(divergence_key(window, against.original), against.kept.compared(index, logits))
                answers.flush()
                task.advance(window.predicted)
                heed_stop()
            losses.append(WindowLoss(float(answers.get(nll_key(window)) or 0.0), window.predicted))
            if against is not None and index in against.kept.chosen:
                compared.append(answers.get(divergence_key(window, against.original)) or {"kl": [], "agreed": 0})
    scores = scores_of(text, losses, time.perf_counter() - began)
    if against is None:
        return scores, None
    from edgetool.evaluation.divergence import summed

    divergence = summed(compared)
    if divergence is None:
        progress.warn(f"{title}: no KL divergence, since its vocabulary and the original's differ in size")
    return scores, divergence


def window_logits(loaded: LoadedModel, window: Window) -> Tensor:
    """Logits [predicted, vocabulary] in the model's dtype, from which the window's last tokens are predicted."""
    import torch

    from edgetool.models.devices import out_of_memory_named

    fed = torch.tensor([window.tokens[:-1]], device=loaded.device)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        options["logits_to_keep"] = window.predicted
    with torch.inference_mode(), out_of_memory_named("computing a window", "lower --context or --stride"):
        logits: Tensor = loaded.model(input_ids=fed, **options).logits[0, -window.predicted :]
    return logits


def window_nll(logits: Tensor, window: Window) -> float:
    """Nats for the predicted tokens, log-probabilities in float32; inf where a logit is not a number."""
    import torch

    targets = torch.tensor(window.tokens[-window.predicted :], device=logits.device)
    total = 0.0
    for rows, wanted in zip(logits.split(128), targets.split(128), strict=True):  # type: ignore[no-untyped-call]
        chosen = torch.log_softmax(rows.float(), 1).gather(1, wanted.unsqueeze(1))
        total -= float(chosen.double().sum())
    return total if math.isfinite(total) else math.inf


def known_tokens(text: CutText, answers: Answers) -> int:
    """Predicted tokens whose window is answered."""
    return sum(window.predicted for window in text.windows if nll_key(window) in answers)


def scores_of(text: CutText, losses: Sequence[WindowLoss], seconds: float) -> PerplexityScores:
    """The record of a text, given the loss of each of its windows."""
    return PerplexityScores(
        tuple(losses),
        text.words,
        text.text_bytes,
        text.context,
        text.stride,
        text.prefix,
        text.text_sha256,
        seconds,
    )
