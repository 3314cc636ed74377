"""Perplexity of a checkpoint on a text, layer by layer: memory is one layer and the hidden states of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetool.models.streamed import StreamedModel
from edgetool.progress import Progress

TOKENS_AT_ONCE = 1024
"""Tokens that go through a layer together: enough to fill the matrix units, few enough to stay in the cache."""


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll_per_token); every token but the first of each window is predicted from those before it."""

    perplexity: float
    nll_per_token: float
    predicted_tokens: int
    context_tokens: int


def windows(token_ids: list[int], context: int, limit_tokens: int | None = None) -> Tensor:
    """int64 [n, context]: the text cut into windows that do not overlap; the rest that fills none is left out."""
    ids = torch.tensor(token_ids[:limit_tokens], dtype=torch.int64)
    count = len(ids) // context
    return ids[: count * context].view(count, context)


def measure(model: StreamedModel, token_ids: Tensor, progress: Progress, title: str) -> Perplexity:
    """Perplexity over windows int64 [n, context] (n >= 1)."""
    batches = token_ids.split(max(1, TOKENS_AT_ONCE // token_ids.shape[1]))  # type: ignore[no-untyped-call]
    hidden = [model.embed(batch) for batch in batches]
    arguments = {batch.shape: model.layer_arguments(batch) for batch in {h.shape: h for h in hidden}.values()}
    with progress.task(title, model.map.n_layers, "layer") as task, torch.no_grad():
        for index in range(model.map.n_layers):
            layer = model.layer(index)
            for number, states in enumerate(hidden):
                hidden[number] = layer(states, **arguments[states.shape][index])
            task.advance()
    losses = token_losses(model, torch.cat([h[:, :-1].flatten(0, 1) for h in hidden]), token_ids[:, 1:].flatten())
    mean = float(losses.double().mean())
    return Perplexity(math.exp(min(mean, 700.0)), mean, losses.numel(), token_ids.shape[1])


def token_losses(model: StreamedModel, hidden: Tensor, targets: Tensor, rows_at_once: int = 1024) -> Tensor:
    """Negative log-likelihood float32 [n] of targets int64 [n] from the last layer's states [n, hidden_size].

    Runs over the vocabulary in chunks with a running log-sum-exp, so that neither the output matrix nor the logits of
    all tokens are ever held whole.
    """
    states = model.final_norm(hidden).to(model.compute_dtype)
    targets = targets.to(model.device)
    total = torch.full((len(targets),), -math.inf, device=model.device)
    chosen = torch.zeros(len(targets), device=model.device)
    with torch.no_grad():
        for start, weight in model.output_chunks():
            for low in range(0, len(targets), rows_at_once):
                rows = slice(low, low + rows_at_once)
                logits = (states[rows] @ weight.t()).to(torch.float32)
                total[rows] = torch.logaddexp(total[rows], logits.logsumexp(1))
                offset = targets[rows] - start
                inside = (offset >= 0) & (offset < weight.shape[0])
                picked = logits.gather(1, offset.clamp(0, weight.shape[0] - 1).unsqueeze(1)).squeeze(1)
                chosen[rows] = torch.where(inside, picked, chosen[rows])
    return total - chosen
