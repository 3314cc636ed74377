"""The GPUs of this machine and the processes on them: by NVML, or from a recorded file.

NVML is NVIDIA's management library, which comes with the driver (nvidia-ml-py, `import pynvml`, is its binding). No
driver is no error: `driver_version` is None and there are no GPUs.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool.errors import ConfigError
from edgetool.scheduler.lease_records import process_uid, user_name

_GEFORCE = re.compile(r"(?:RTX|GTX) (\d{3,4})((?: (?:Ti|SUPER|D|Laptop))*)", re.IGNORECASE)
_MODEL = re.compile(r"\b([A-Z]{1,2}\d{1,4}[A-Z]?)\b")
_WATCHED_ECC = "uncorrected ECC errors since the driver was loaded"


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU. None stands for what the driver or the system does not tell.

    `mig_uuid` is the MIG instance it runs on.
    """

    pid: int
    user: str | None
    command: str | None
    used_memory_bytes: int | None
    mig_uuid: str | None = None


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


def gpu_class(name: str, classes: Mapping[str, str] | None = None) -> str:
    """The class of a GPU: what people call it. `NVIDIA GeForce RTX 4090` is a 4090, `NVIDIA H100 80GB HBM3` an H100.

    `classes` maps a part of the name (letter case does not matter, the longest part wins) to a class of one's own.
    """
    own = [part for part in classes or {} if part.lower() in name.lower()]
    if classes and own:
        return classes[max(own, key=len)]
    if "GeForce" in name and (match := _GEFORCE.search(name)):
        return match[1] + match[2].replace(" ", "")
    if match := _MODEL.search(name):
        return match[1]
    return "-".join(name.removeprefix("NVIDIA ").split()) or "unknown"


def same_class(one: str, other: str) -> bool:
    """Whether two spellings mean one class: letter case, spaces and dashes do not count."""
    return re.sub(r"[\s_-]", "", one).lower() == re.sub(r"[\s_-]", "", other).lower()


def reader(fixture: Path | None = None, classes: Mapping[str, str] | None = None) -> Callable[[], Inventory]:
    """A function that reads the inventory: from `fixture`, each time anew, or by NVML."""
    if fixture is not None:
        return lambda: read_recorded(fixture, classes)
    return lambda: read_nvml(classes)


def read_recorded(path: Path, classes: Mapping[str, str] | None = None) -> Inventory:
    """A recorded inventory: JSON as docs/gpus.md describes it.

    Raises:
        ConfigError: the file cannot be read, or is no such record; the message says where.
    """
    document = _parsed(path)
    try:
        version = document["driver_version"]
        gpus = tuple(_recorded_gpu(gpu, classes) for gpu in document["gpus"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"the recorded inventory {path} cannot be used: {what}", "docs/gpus.md shows one") from error
    return Inventory(None if version is None else str(version), gpus, recorded=True)


def _parsed(path: Path) -> Any:
    for attempt in range(5):
        try:
            return json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the recorded inventory {path}: {error.strerror}") from error
        except ValueError as error:
            if attempt == 4:
                raise ConfigError(f"the recorded inventory {path} is not JSON: {error}") from error
            time.sleep(0.02)  # somebody may be writing it, while a request waits
    raise AssertionError


def _recorded_gpu(gpu: Mapping[str, Any], classes: Mapping[str, str] | None) -> Gpu:
    name = str(gpu["name"])
    instances = [
        MigInstance(str(part["uuid"]), int(part["memory_total_bytes"]), int(part["memory_used_bytes"]))
        for part in gpu.get("mig") or ()
    ]
    processes = [
        GpuProcess(
            int(process["pid"]),
            process.get("user"),
            process.get("command"),
            _number(process.get("used_memory_bytes")),
            process.get("mig_uuid"),
        )
        for process in gpu.get("processes") or ()
    ]
    uuid, error = gpu.get("uuid"), gpu.get("error")
    if uuid is None and error is None:
        raise ValueError(f"GPU {gpu['index']} has neither a uuid nor an error")
    return Gpu(
        int(gpu["index"]),
        uuid,
        name,
        gpu_class(name, classes),
        _number(gpu["memory_total_bytes"]) or 0,
        _number(gpu["memory_used_bytes"]) or 0,
        _number(gpu.get("utilization_percent")),
        gpu.get("compute_capability"),
        tuple(instances),
        tuple(processes),
        error,
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


_initialized_by: int | None = None


def read_nvml(classes: Mapping[str, str] | None = None) -> Inventory:
    """The inventory as the driver tells it. A GPU that fails does not hide the others."""
    try:
        import pynvml as nvml
    except ImportError:
        return Inventory()
    try:
        _initialize(nvml)
        version = _text(nvml.nvmlSystemGetDriverVersion())
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError:
        return Inventory()
    return Inventory(version, tuple(_read_gpu(nvml, index, classes) for index in range(count)))


def _initialize(nvml: Any) -> None:
    """Once a process: it takes tens of milliseconds. A forked child starts anew."""
    global _initialized_by
    if _initialized_by != os.getpid():
        nvml.nvmlInit()
        _initialized_by = os.getpid()


def _read_gpu(nvml: Any, index: int, classes: Mapping[str, str] | None) -> Gpu:
    uuid, name = None, "unknown"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        use = _unless(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        capability = _unless(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
        in_mig_mode, instances, processes = _mig(nvml, handle)
        error = _fault(nvml, handle)
        if in_mig_mode and not instances:
            error = error or "MIG mode is on and no instance has been made"
        processes = processes if in_mig_mode else _processes(nvml, handle, None)
    except nvml.NVMLError as problem:
        return Gpu(index, uuid, name, gpu_class(name, classes), 0, 0, error=f"NVML: {problem}")
    return Gpu(
        index,
        uuid,
        name,
        gpu_class(name, classes),
        int(memory.total),
        int(memory.used),
        None if use is None else int(use.gpu),
        None if capability is None else "{}.{}".format(*capability),
        tuple(instances),
        tuple(processes),
        error,
    )


def _mig(nvml: Any, handle: Any) -> tuple[bool, list[MigInstance], list[GpuProcess]]:
    mode = _unless(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return False, [], []
    instances: list[MigInstance] = []
    processes: list[GpuProcess] = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        part = _unless(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if part is None:
            continue
        uuid, memory = _text(nvml.nvmlDeviceGetUUID(part)), nvml.nvmlDeviceGetMemoryInfo(part)
        instances.append(MigInstance(uuid, int(memory.total), int(memory.used)))
        processes += _processes(nvml, part, uuid)
    return True, instances, processes


def _fault(nvml: Any, handle: Any) -> str | None:
    errors = _unless(
        nvml,
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
    )
    if errors:
        return f"{errors} {_WATCHED_ECC}"
    rows = _unless(nvml, nvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None and rows[3]:
        return "remapping of damaged memory rows has failed"
    if rows is not None and rows[2]:
        return "damaged memory rows wait for a reset of the GPU"
    return None


def _processes(nvml: Any, handle: Any, mig_uuid: str | None) -> list[GpuProcess]:
    used: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _unless(nvml, ask, handle) or ():
            known = used.get(process.pid)
            # who computes and draws is in both lists with the same memory
            figures = [figure for figure in (known, process.usedGpuMemory) if figure is not None]
            used[process.pid] = max(figures, default=None)
    return [GpuProcess(pid, *describe(pid), bytes_, mig_uuid) for pid, bytes_ in sorted(used.items())]


def describe(pid: int) -> tuple[str | None, str | None]:
    """User and command line of a process, as far as they can be seen (not across containers)."""
    home = Path(f"/proc/{pid}")
    uid = process_uid(pid)
    if uid is None:
        return None, None
    try:
        words = (home / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return user_name(uid), words[:500] or (home / "comm").read_text().strip()
    except OSError:
        return user_name(uid), None


def _unless(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where this GPU or this driver does not know the question. A lost GPU is an error."""
    try:
        return ask(*arguments)
    except nvml.NVMLError as error:
        if error.value in {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED}:
            raise
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
