"""A stand-in for the module `pynvml` that answers from a recorded inventory, with NVML's own types and errors.

It knows the functions that edgetool asks, by their names and return shapes in nvidia-ml-py 13, and nothing else.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pynvml

ECC_ERRORS = "uncorrected ECC errors"


def install(monkeypatch: Any, document: Mapping[str, Any] | None) -> types.ModuleType:
    """Put it in place of pynvml for one test; None is a machine without a driver."""
    module = types.ModuleType("pynvml")
    for name in dir(pynvml):
        if name.startswith(("NVML_", "NVMLError")):
            setattr(module, name, getattr(pynvml, name))
    for name, function in _functions(document).items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr("edgetool.scheduler.inventory._initialized_by", None)
    return module


def _functions(document: Mapping[str, Any] | None) -> dict[str, Any]:
    def error(code: int) -> Exception:
        return pynvml.NVMLError(code)

    def init() -> None:
        if document is None:
            raise error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    gpus = list((document or {}).get("gpus", ()))

    def handle(index: int) -> Any:
        if "lost" in (gpus[index]["error"] or ""):
            raise error(pynvml.NVML_ERROR_GPU_IS_LOST)
        return gpus[index]

    def memory(device: Mapping[str, Any]) -> Any:
        total, used = device["memory_total_bytes"], device["memory_used_bytes"]
        return SimpleNamespace(total=total, used=used, free=total - used)

    def needs(value: Any) -> Any:
        if value is None:
            raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def mig_mode(device: Mapping[str, Any]) -> list[int]:
        if device["compute_capability"] == "8.9":  # GeForce cards do not know the question
            raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [1, 1] if device["mig"] else [0, 0]

    def mig_part(device: Mapping[str, Any], number: int) -> Any:
        if number >= len(device["mig"]):
            raise error(pynvml.NVML_ERROR_NOT_FOUND)
        part = device["mig"][number]
        return {**part, "processes": [p for p in device["processes"] if p.get("mig_uuid") == part["uuid"]]}

    def processes(graphics: bool) -> Any:
        def ask(device: Mapping[str, Any]) -> list[Any]:
            shown = [p for p in device["processes"] if not graphics or "Xorg" in p["command"]]
            return [SimpleNamespace(pid=p["pid"], usedGpuMemory=p["used_memory_bytes"]) for p in shown]

        return ask

    def ecc(device: Mapping[str, Any], _kind: int, _counter: int) -> int:
        text = device["error"] or ""
        if device["compute_capability"] is None:
            raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(text.split()[0]) if ECC_ERRORS in text else 0

    def not_supported(*_: Any) -> Any:
        raise error(pynvml.NVML_ERROR_NOT_SUPPORTED)

    return {
        "nvmlInit": init,
        "nvmlSystemGetDriverVersion": lambda: document["driver_version"] if document else None,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUUID": lambda device: device["uuid"],
        "nvmlDeviceGetName": lambda device: device["name"].encode(),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=needs(device["utilization_percent"])),
        "nvmlDeviceGetCudaComputeCapability": lambda d: tuple(
            int(n) for n in needs(d["compute_capability"]).split(".")
        ),
        "nvmlDeviceGetMigMode": mig_mode,
        "nvmlDeviceGetMaxMigDeviceCount": lambda _device: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": mig_part,
        "nvmlDeviceGetTotalEccErrors": ecc,
        "nvmlDeviceGetRemappedRows": not_supported,
        "nvmlDeviceGetComputeRunningProcesses": processes(graphics=False),
        "nvmlDeviceGetGraphicsRunningProcesses": processes(graphics=True),
    }
