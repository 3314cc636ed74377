"""A whole model in memory: transformers' own class, with weights dequantised where the checkpoint is quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.errors import BadInput, EdgetoolError
from edgetool.models.architectures import VISION_FAMILIES
from edgetool.models.streamed import as_torch, load_config, reason_of

if TYPE_CHECKING:
    from edgetool.progress import Progress


def load_whole(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> Any:
    """transformers' causal language model on `device`, all floating-point weights in `dtype`, ready to compute.

    Raises BadInput for an architecture that transformers has no language model for, and where the tensors are not those
    that the model wants.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _plain_config(checkpoint)
    config.dtype = dtype
    model_class = type(_on_meta(checkpoint, config))
    weights = _weights(checkpoint, device, dtype, progress)
    try:
        model, info = model_class.from_pretrained(  # it takes the tensors as they are, without copying
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except EdgetoolError:
        raise
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{checkpoint.directory}: its tensors do not fit {model_class.__name__}: {error}") from error
    wrong = [f"{kind} {sorted(info[kind])[0]}" for kind in ("missing_keys", "unexpected_keys") if info.get(kind)]
    if wrong:
        raise BadInput(f"{checkpoint.directory}: its tensors are not those of {model_class.__name__}: {wrong[0]}")
    return model.to(device).eval().requires_grad_(False)


def skeleton(checkpoint: Checkpoint) -> Any:
    """transformers' language model for the checkpoint on the meta device. Raises BadInput where there is none."""
    return _on_meta(checkpoint, _plain_config(checkpoint))


def _plain_config(checkpoint: Checkpoint) -> Any:
    config = load_config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights will be plain
    return config


def _on_meta(checkpoint: Checkpoint, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = config.model_type in VISION_FAMILIES  # asked with text alone, they are language models like the others
    try:
        with torch.device("meta"):
            return (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config)
    except Exception as error:
        reason = reason_of(error)
        raise BadInput(f"{checkpoint.directory}: transformers has no language model for it: {reason}") from error


def _weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> dict[str, Tensor]:
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    packed = set(found.modules) if found else set()
    plain = [name for name in checkpoint.tensors if name.rpartition(".")[0] not in packed or name.endswith(".bias")]
    weights: dict[str, Tensor] = {}
    with progress.task("read weights", len(plain) + len(packed), "tensor") as task:
        for name in plain:
            tensor = as_torch(checkpoint.read(name), checkpoint.tensors[name].dtype)
            weights[name] = tensor.to(device, dtype)
            task.advance()
        for module in found.modules if found else ():
            assert found is not None
            dense = torch.from_numpy(read_linear(checkpoint, module, found).dequantize())
            weights[f"{module}.weight"] = dense.to(device, dtype)
            task.advance()
    return weights
