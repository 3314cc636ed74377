"""Which device computes, and in which precision it is fast."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgetool.errors import ConfigError, ResourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; auto prefers the GPU with most free memory."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if not count:
            return torch.device("cpu")
        return torch.device("cuda", max(range(count), key=lambda index: torch.cuda.mem_get_info(index)[0]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not count:
            raise ResourceUnavailable(f"device {name}: no CUDA device is available here", hint="use --device cpu")
        index = device.index or 0
        if index >= count:
            raise ResourceUnavailable(f"device {name}: this machine has {count} CUDA device(s), numbered from 0")
        return torch.device("cuda", index)
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which `device` multiplies matrices fastest without losing what calibration needs.

    bf16 on GPUs from compute capability 8.0 and on CPUs with bf16 instructions, fp16 on older GPUs, else fp32; never
    fp16 on a CPU, where it is slower than fp32 by a factor of about five.
    """
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


MODEL_TOO_LARGE = "use --dtype bfloat16, or a machine with more memory"
"""What helps where it is the model that does not fit."""


@contextmanager
def out_of_memory_named(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory failure of torch into ResourceUnavailable naming `what` was being done; the hint begins
    with `remedy`, what needs less memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceUnavailable(
            f"the GPU ran out of memory while {what}: {str(error).splitlines()[0]}",
            hint=f"{remedy}; or free the GPU, or use --device cpu",
        ) from error
    except (MemoryError, RuntimeError) as error:
        words = ("not enough memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise ResourceUnavailable(f"out of memory while {what}", hint=remedy) from error
