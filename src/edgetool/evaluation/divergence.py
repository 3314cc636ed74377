"""Next-token distributions of two models beside each other: KL divergence, and whether the likeliest token is the same.

The original's distributions wait on disk, window by window, until the quantised model is in memory: two models need not
fit together. They take 2 bytes for each token of the vocabulary, so a long text has only as many windows compared as
fit into a budget, evenly spread over it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetool.artifacts import disk_errors
from edgetool.evaluation.records import Divergence
from edgetool.evaluation.windows import CutText

KEPT_BYTES = 4 << 30
"""Disk for the distributions of one text: 40,000 tokens with a vocabulary of 50,000."""

ROWS_AT_ONCE = 128
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


class KeptDistributions:
    """Log-probabilities of one model, float16 [predicted, vocabulary], for some windows of a text: a file for each.

    A file is there whole or not at all, so what a stopped run has kept is of use to the next. The directory has to be
    one for this model, text and cut alone.
    """

    def __init__(self, directory: Path, chosen: Sequence[int]) -> None:
        """`chosen`: indices of the windows that are compared. Nothing is written yet."""
        self.directory = directory
        self.chosen = frozenset(chosen)

    def has(self, index: int) -> bool:
        """Whether the window is kept."""
        return self._path(index).is_file()

    def write(self, index: int, logits: Tensor) -> None:
        """Keep a window's logits [predicted, vocabulary]. Raises ResourceUnavailable where the disk is full."""
        kept = np.empty(logits.shape, dtype=np.float16)
        for low in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(low, low + ROWS_AT_ONCE)
            kept[rows] = torch.log_softmax(logits[rows].float(), 1).half().cpu().numpy()
        likeliest = logits.argmax(1).cpu().numpy()  # float16 cannot tell two that are almost as likely
        path = self._path(index)
        unfinished = path.with_suffix(".part")
        with disk_errors(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.savez(file, log_probs=kept, likeliest=likeliest)
            unfinished.replace(path)

    def compared(self, index: int, logits: Tensor) -> dict[str, Any]:
        """The other model's logits [predicted, vocabulary] against what is kept of the window.

        "kl": KL(kept || other) of each token in nats, "agreed": for how many both find the same token the likeliest.
        No tokens where the vocabularies differ in size.
        """
        with np.load(self._path(index), allow_pickle=False) as file:
            log_probs, likeliest = torch.from_numpy(file["log_probs"]), torch.from_numpy(file["likeliest"])
        if log_probs.shape != logits.shape:
            return {"kl": [], "agreed": 0}
        found: list[float] = []
        for low in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(low, low + ROWS_AT_ONCE)
            # normalised again, since rounding to float16 has moved the sum of the probabilities off 1
            kept = torch.log_softmax(log_probs[rows].to(logits.device).float(), 1)
            other = torch.log_softmax(logits[rows].float(), 1)
            chance = kept.exp()
            terms = torch.where(chance > 0, chance * (kept - other), 0.0)
            found += terms.sum(1).clamp(min=0.0).tolist()
        agreed = int((logits.argmax(1).cpu() == likeliest).sum())
        return {"kl": [float(f"{value:.7g}") for value in found], "agreed": agreed}

    def remove(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"window-{index:06d}.npz"


def chosen_windows(text: CutText, vocabulary: int, budget_bytes: int = KEPT_BYTES) -> list[int]:
    """Indices of the windows, evenly spread and at least one, whose distributions fit into `budget_bytes`."""
    rows = budget_bytes // (2 * vocabulary)
    count = min(len(text.windows), max(1, 1 + (rows - text.windows[0].predicted) // text.stride))
    return sorted({int(index) for index in np.linspace(0, len(text.windows) - 1, count).round()})


def summed(windows: Iterable[dict[str, Any]]) -> Divergence | None:
    """One figure of all windows' `compared`; None without any token."""
    found = list(windows)
    values = np.array([value for one in found for value in one["kl"]], dtype=np.float64)
    if not len(values):
        return None
    percentiles = {name: float(np.percentile(values, at)) for name, at in _PERCENTILES.items()}
    agreed = sum(int(one["agreed"]) for one in found)
    return Divergence(math.fsum(values) / len(values), percentiles, agreed / len(values), len(values))
