"""Tiny checkpoints whose every tensor matters, and transformers' own model of them as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.models.streamed import StreamedModel
from tests.fakes.tiny_models import make_tiny_model

VISION = {"qwen2_vl", "qwen2_5_vl"}


def stirred_model(directory: Path, family: str, *, seed: int = 0, **options: Any) -> Path:
    """make_tiny_model with norms and biases off their neutral start and weights large enough for attention to matter.

    A fresh model has norms of one, biases of zero and nearly uniform attention, so that leaving any of them out would
    go unnoticed.
    """
    make_tiny_model(directory, family, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensors[name] = (0.5 * noise).to(tensor.dtype)
            elif tensor.dim() == 1:
                tensors[name] = (1 + 0.3 * noise).to(tensor.dtype)
            elif ".layers." in name:
                tensors[name] = (0.15 * noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


def transformers_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model as transformers loads it, with its plainest attention."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    config = hf.AutoConfig.from_pretrained(directory)
    kind = hf.AutoModelForImageTextToText if config.model_type in VISION else hf.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def streamed(directory: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint.open(directory), torch.device("cpu"), dtype)


def some_ids(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    """int64 [rows, length] of ordinary tokens (the first few are special: images, ends)."""
    return torch.randint(16, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def all_states(model: StreamedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states in front of each layer and after the last one."""
    states = [model.embed(ids)]
    arguments = model.layer_arguments(states[0])
    with torch.no_grad():
        for index in range(model.map.n_layers):
            states.append(model.layer(index)(states[-1], **arguments[index]))
    return states


def logits(model: StreamedModel, states: torch.Tensor) -> torch.Tensor:
    normed = model.final_norm(states)
    return torch.cat([normed @ weight.t() for _, weight in model.output_chunks()], -1)
