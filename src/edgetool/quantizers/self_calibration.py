"""Calibration text sampled from the model itself, for models whose training data is out of reach.

After arXiv 2305.17888 (section 3.1): start from a random token and sample from the model's own distribution, so that
the text has the statistics of what the model has learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgetool.errors import BadInput
from edgetool.models.generation import generate
from edgetool.models.streamed import StreamedModel
from edgetool.progress import Progress
from edgetool.quantizers.calibration import Calibration, from_tokens
from edgetool.quantizers.engine import Abandoned

GREEDY_TOKENS = 4
"""First tokens taken greedily, which keeps a sample from starting as noise (the paper takes 3 to 5)."""
ROWS_AT_ONCE = 32
TEMPERATURE = 1.0


def sample_from_model(
    model: StreamedModel,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Calibration:
    """`samples` windows of `seqlen` tokens; the same seed and model give the same tokens on the same device.

    Raises Abandoned when `stop_requested`, which is asked before every token, says so.
    """
    if seqlen < 2:
        raise BadInput(f"self calibration needs sequences of at least 2 tokens, calib_seqlen is {seqlen}")
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([i for i in range(min(len(tokenizer), model.map.vocab_size)) if i not in special])
    rows = []
    with progress.task("sample calibration text", samples * seqlen, "token") as task:
        for start in range(0, samples, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, samples - start)
            first = usable[torch.randint(len(usable), (count, 1), generator=generator)]
            position = 0

            def choose(logits: Tensor) -> Tensor:
                nonlocal position
                if stop_requested():
                    raise Abandoned
                position += 1
                task.advance(len(logits))
                logits[:, list(special)] = -torch.inf  # an ended sequence would be followed by another prompt's start
                if position <= GREEDY_TOKENS:
                    return logits.argmax(1)
                probabilities = (logits.cpu() / TEMPERATURE).softmax(1)
                return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

            rows.append(torch.cat([first, generate(model, first, seqlen - 1, choose)], 1))
    return from_tokens(torch.cat(rows), "self")
