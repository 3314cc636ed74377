"""A checkpoint in memory: transformers' language model with its tokenizer, dequantised where it is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput
from edgetool.models.devices import MODEL_TOO_LARGE, out_of_memory_named
from edgetool.models.streamed import load_tokenizer
from edgetool.models.whole import load_whole
from edgetool.progress import Progress


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model of transformers in memory, its tokenizer, and where and in what it computes."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> LoadedModel:
    """The checkpoint in memory, dequantised where it is quantised.

    Raises BadInput for one that transformers cannot run, ResourceUnavailable where the memory does not hold it.
    """
    tokenizer = load_tokenizer(checkpoint)
    with out_of_memory_named(f"loading {checkpoint.directory}", MODEL_TOO_LARGE):
        model = load_whole(checkpoint, device, dtype, progress)
    if (checkpoint.directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{checkpoint.directory / 'generation_config.json'}: {error}") from error
    return LoadedModel(model, tokenizer, device, dtype)
