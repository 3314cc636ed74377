"""What will be started, decided before anything is: the checkpoint, the device, the context, what to lease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound
from edgetool.checkpoints.inspect import has_chat_template
from edgetool.config import ServeGpuConfig
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.runs import available_memory_bytes
from edgetool.scheduler.inventory import Gpu, Inventory, same_class
from edgetool.scheduler.leasing import Request
from edgetool.serving.legality import Allowed, Demand, Device, check, look


@dataclass(frozen=True)
class Plan:
    """One server. `requests`: what to lease, without the port; the first that can be had is taken, in this order."""

    model: str
    checkpoint: Checkpoint
    found: QuantizationFound | None
    served_model_name: str
    device: str
    device_name: str
    allowed: Allowed
    requests: tuple[Request, ...]
    chat: bool
    utilization: float

    def to_dict(self) -> dict[str, Any]:
        """For --dry-run."""
        found = self.found
        kind = None if found is None else f"{found.format}, {found.bits} bits, group {found.group_size}"
        return {
            "model": self.model,
            "quantization": kind,
            "served_model_name": self.served_model_name,
            "device": self.device,
            "device_name": self.device_name,
            "dtype": self.allowed.dtype,
            "max_model_len": self.allowed.max_model_len,
            "weights_bytes": self.allowed.weights_bytes,
            "kv_cache_bytes": self.allowed.kv_cache_bytes,
            "kv_bytes_per_token": self.allowed.kv_bytes_per_token,
            "needed_bytes": self.allowed.needed_bytes,
            "lease": [str(replace(request, ports=1)) for request in self.requests],
            "warnings": list(self.allowed.warnings),
        }


def make_plan(
    spec: str, directory: Path, settings: ServeGpuConfig, inventory: Inventory, *, shared: bool, taken_bytes: int = 0
) -> Plan:
    """The plan for one model.

    Args:
        spec: as the user named it; `directory` is where it lies.
        shared: whether the user said how much of a GPU to take, so that the rest is left to others.
        taken_bytes: memory of this machine that another server of the same run is going to take.

    Raises:
        BadInput: the checkpoint cannot be served as asked.
        ResourceUnavailable: no GPU of that kind is there.
    """
    checkpoint = Checkpoint.open(directory)
    found = look(checkpoint)
    demand = Demand(
        settings.engine,
        settings.dtype,
        settings.kv_cache_dtype,
        settings.tensor_parallel_size,
        settings.max_model_len,
        settings.gpu_memory_utilization,
    )
    name = settings.served_model_name or directory.resolve().name
    part = Plan(
        spec, checkpoint, found, name, "cpu", "this machine's CPU", _NOTHING, (), has_chat_template(checkpoint), 0.0
    )
    if settings.device == "cpu" or (settings.device == "auto" and not _usable(inventory)):
        if settings.gpu_class is not None:
            raise ResourceUnavailable(f"class {settings.gpu_class} of GPUs was asked for, and there is no GPU")
        device = Device(None, max(0, available_memory_bytes() - taken_bytes), "this machine's CPU")
        allowed = check(checkpoint, found, demand, device)
        if shared:
            said = "gpu_memory_utilization has no effect on a CPU: the cache is as large as the context asks for"
            allowed = replace(allowed, warnings=(*allowed.warnings, said))
        if settings.device == "auto" and inventory.gpus:
            why = "; ".join(f"{gpu.name}: {gpu.error or 'in MIG mode'}" for gpu in inventory.gpus)
            allowed = replace(allowed, warnings=(*allowed.warnings, f"no GPU can be used ({why}): the CPU serves"))
        return replace(part, allowed=allowed, requests=(Request(),))
    return _on_gpus(part, demand, settings, inventory, shared=shared)


_NOTHING = Allowed(0, "", 0, 0, None, 0, ())


def _on_gpus(part: Plan, demand: Demand, settings: ServeGpuConfig, inventory: Inventory, *, shared: bool) -> Plan:
    classes = _by_class(_usable(inventory), settings.gpu_class)
    if not classes:
        wanted = f"no GPU of class {settings.gpu_class}" if settings.gpu_class else "no GPU that can be used"
        there = ", ".join(sorted({gpu.gpu_class for gpu in inventory.gpus})) or "no NVIDIA driver"
        raise ResourceUnavailable(f"{wanted} on this machine ({there})", "use --device cpu, or another --class")
    refusals: list[BadInput] = []
    fitting: list[tuple[Device, Allowed, Request]] = []
    for gpu_class, gpus in classes:
        if len(gpus) < demand.tensor_parallel_size:
            refusals.append(BadInput(f"{len(gpus)} GPUs of class {gpu_class}, {demand.tensor_parallel_size} wanted"))
            continue
        worst = min(gpus, key=lambda gpu: (_capability(gpu), gpu.memory_total_bytes))
        device = Device(_capability(worst), worst.memory_total_bytes, f"{worst.name} ({worst.compute_capability})")
        try:
            allowed = check(part.checkpoint, part.found, demand, device)
        except BadInput as error:
            refusals.append(error)
            continue
        reserved = int(max(gpu.memory_total_bytes for gpu in gpus) * demand.gpu_memory_utilization)
        request = Request(
            gpus=demand.tensor_parallel_size,
            gpu_class=gpu_class,
            min_free_bytes=reserved if shared else 0,
            exclusive=not shared,
        )
        fitting.append((device, allowed, request))
    if not fitting:
        raise refusals[0]
    device, allowed, _ = fitting[0]
    requests = tuple(request for _, _, request in fitting)
    if settings.distributed is not None:
        requests = (Request(),)  # Ray places the workers itself, here or on other machines
    name = device.name if len(fitting) == 1 else f"{device.name} or larger"
    return replace(
        part,
        device="cuda",
        device_name=name,
        allowed=allowed,
        requests=requests,
        utilization=demand.gpu_memory_utilization,
    )


def _usable(inventory: Inventory) -> list[Gpu]:
    return [gpu for gpu in inventory.gpus if gpu.error is None and not gpu.mig]


def _by_class(gpus: Sequence[Gpu], wanted: str | None) -> list[tuple[str, list[Gpu]]]:
    """Classes with their GPUs, the smallest memory first: large GPUs are left to those who need them."""
    classes: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        if wanted is None or same_class(gpu.gpu_class, wanted):
            classes.setdefault(gpu.gpu_class, []).append(gpu)
    return sorted(classes.items(), key=lambda item: min(gpu.memory_total_bytes for gpu in item[1]))


def _capability(gpu: Gpu) -> float:
    """8.9 for "8.9"; what the driver does not tell is taken for the newest, so that the engine itself decides."""
    try:
        return float(gpu.compute_capability or "")
    except ValueError:
        return 9.0
