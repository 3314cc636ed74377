"""The GPUs of this machine and the processes on them: by NVML, or from a recorded file.

NVML is NVIDIA's management library, which comes with the driver (nvidia-ml-py is its Python binding, imported only when
it is asked for). No driver is no error: `driver_version` is None and there are no GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU. `used_memory_bytes` is None where the driver does not say."""

    pid: int
    user: str | None
    command: str | None
    used_memory_bytes: int | None


@dataclass(frozen=True)
class MigInstance:
    """A part of a GPU that CUDA sees as a device of its own (NVIDIA Multi-Instance GPU User Guide)."""

    uuid: str
    memory_total_bytes: int
    memory_used_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as it is now. `error` says why it cannot be used; figures of such a GPU may be 0.

    `mig` is empty unless the GPU is in MIG mode; then only its instances can be used, not the whole.
    """

    index: int
    uuid: str | None
    name: str
    gpu_class: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilization_percent: int | None = None
    compute_capability: str | None = None
    mig: tuple[MigInstance, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Inventory:
    """All GPUs. `driver_version` is None without an NVIDIA driver; `recorded` when it was read from a file."""

    driver_version: str | None = None
    gpus: tuple[Gpu, ...] = ()
    recorded: bool = False
