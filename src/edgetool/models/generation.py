"""Generation from a streamed model: enough to see whether a checkpoint still speaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from edgetool.models.degeneration import degenerate as degenerate
from edgetool.models.streamed import StreamedModel

KEEP_BYTES = 512 * 2**20
"""What the layers that stay in memory between tokens may take together, in the compute dtype."""

Choose = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """Most likely token of each row: float32 [rows, vocab] -> int64 [rows]."""
    return logits.argmax(1)


def generate(
    model: StreamedModel,
    prompts: Tensor,
    new_tokens: int,
    choose: Choose = greedy,
    *,
    stop: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> Tensor:
    """Tokens int64 [rows, <= new_tokens] that follow prompts int64 [rows, length].

    With one row, generation ends at token `stop`. As many layers as fit in `keep_bytes` stay in memory; the others are
    read again for every token: slower, with the memory of one.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.skeleton.config)
    may_keep = min(model.map.n_layers, keep_bytes // _layer_bytes(model))
    kept: dict[int, Any] = {}
    head = list(model.output_chunks()) if may_keep == model.map.n_layers else None
    made: list[Tensor] = []
    ids = prompts
    with torch.no_grad():
        for _ in range(new_tokens):
            hidden = model.embed(ids)
            arguments = model.layer_arguments(hidden, cache)
            for index in range(model.map.n_layers):
                layer = kept[index] if index in kept else model.layer(index)
                if len(kept) < may_keep:
                    kept[index] = layer
                hidden = layer(hidden, **arguments[index])
            chosen = choose(next_logits(model, hidden[:, -1], head)).cpu()
            made.append(chosen)
            ids = chosen.unsqueeze(1)
            if stop is not None and len(chosen) == 1 and int(chosen[0]) == stop:
                break
    return torch.stack(made, 1)


def next_logits(model: StreamedModel, hidden: Tensor, head: list[tuple[int, Tensor]] | None = None) -> Tensor:
    """float32 [rows, vocab] from the last layer's states [rows, hidden_size]; `head` as output_chunks gives it."""
    states = model.final_norm(hidden).to(model.compute_dtype)
    chunks = model.output_chunks() if head is None else head
    return torch.cat([(states @ weight.t()).to(torch.float32) for _, weight in chunks], 1)


def _layer_bytes(model: StreamedModel) -> int:
    size = sum(parameter.numel() for parameter in model.skeleton.layers[0].parameters())
    return int(size * torch.empty(0, dtype=model.compute_dtype).element_size())


def chat_prompt(tokenizer: Any, question: str) -> Tensor:
    """int64 [1, length]: the question in the model's chat template, or as plain text where it has none that works."""
    ids = None
    if getattr(tokenizer, "chat_template", None):
        # A template is the model's own program: it may insist on what a plain question does not have, or fail anyhow.
        with suppress(Exception):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids or tokenizer(question)["input_ids"]], dtype=torch.int64)
