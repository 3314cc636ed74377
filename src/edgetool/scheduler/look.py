"""The machine at one moment: what is there, who holds what, and who waits. What `edgetool gpus` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetool.scheduler import ports
from edgetool.scheduler.inventory import Gpu, Inventory
from edgetool.scheduler.lease_records import Entry, Scan
from edgetool.scheduler.ownership import Owners
from edgetool.scheduler.placement import Unit, units_of


@dataclass(frozen=True)
class Look:
    """What was found. `directory` is that of the leases."""

    inventory: Inventory
    scan: Scan
    directory: Path

    @cached_property
    def owners(self) -> Owners:
        """Whose the processes are."""
        return Owners(self.scan.leases, self.directory)

    @cached_property
    def held(self) -> tuple[Entry, ...]:
        """The leases that are not over."""
        return tuple(entry for entry in self.scan.leases if entry.held)

    @cached_property
    def units(self) -> list[Unit]:
        """GPUs and MIG instances that can be leased."""
        return units_of(self.inventory, self.held, self.owners)

    def document(self) -> dict[str, Any]:
        """The content of schema `edgetool.gpus/1` (docs/gpus.md)."""
        return {
            "driver_version": self.inventory.driver_version,
            "gpus": [self._gpu(gpu) for gpu in self.inventory.gpus],
            "ports": [
                {"port": port, **_holder(entry), "listening": ports.listener(port) is not None}
                for entry in self.held
                for port in entry.record.ports
            ],
            "boards": [{"board": entry.record.board, **_holder(entry)} for entry in self.held if entry.record.board],
        }

    def _gpu(self, gpu: Gpu) -> dict[str, Any]:
        units = {unit.uuid: unit for unit in self.units if unit.index == gpu.index}
        reserved = sum(unit.reserved_bytes for unit in units.values())
        whole = units.get(gpu.uuid or "")
        if whole is not None:
            free = whole.free_bytes
        else:  # in MIG mode, or so lost that it has no UUID
            outside = sum(unit.outside_bytes for unit in units.values())
            free = 0 if gpu.error else max(0, gpu.memory_total_bytes - max(gpu.memory_used_bytes, outside + reserved))
        return {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "class": gpu.gpu_class,
            "memory_total_bytes": gpu.memory_total_bytes,
            "memory_used_bytes": gpu.memory_used_bytes,
            "memory_reserved_bytes": reserved,
            "memory_free_bytes": free,
            "utilization_percent": gpu.utilization_percent,
            "error": gpu.error,
            "mig": [
                {
                    "uuid": part.uuid,
                    "memory_total_bytes": part.memory_total_bytes,
                    "memory_used_bytes": part.memory_used_bytes,
                    "memory_reserved_bytes": units[part.uuid].reserved_bytes,
                    "memory_free_bytes": units[part.uuid].free_bytes,
                    "leases": _leases(units[part.uuid].leases, {part.uuid}),
                }
                for part in gpu.mig
            ],
            "processes": [
                {
                    "pid": process.pid,
                    "user": process.user,
                    "command": process.command,
                    "class": self.owners.of(process, gpu).kind,
                    "used_memory_bytes": process.used_memory_bytes,
                }
                for process in gpu.processes
            ],
            "leases": _leases([entry for unit in units.values() for entry in unit.leases], set(units)),
        }


def _leases(entries: Sequence[Entry], uuids: set[str]) -> list[dict[str, Any]]:
    return [
        {
            **_holder(entry),
            "memory_bytes": sum(share.memory_bytes for share in entry.record.gpus if share.uuid in uuids),
            "exclusive": entry.record.exclusive,
        }
        for entry in entries
    ]


def _holder(entry: Entry) -> dict[str, Any]:
    since = datetime.fromtimestamp(entry.record.since_unix_s, UTC)
    return {
        "id": entry.record.id,
        "user": entry.user,
        "pid": entry.record.pid,
        "command": entry.record.command,
        "since": since.isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
