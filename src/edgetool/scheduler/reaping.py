"""Ending what outlived its lease's owner: a user's own orphans only, with proof that nothing is left of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from edgetool.errors import VerificationFailed
from edgetool.process.tree import ProcessId, end_tree, identify, own_ancestors
from edgetool.progress import NullProgress, Progress
from edgetool.scheduler.inventory import Inventory, describe
from edgetool.scheduler.leases import LeaseDirectory
from edgetool.scheduler.ownership import orphans

_DRIVER_LIMIT_S = 15.0
"""How long the driver may take to give the memory of a killed process back."""


def reap(
    directory: LeaseDirectory,
    inventory: Callable[[], Inventory],
    *,
    grace_s: float = 5.0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """End the orphans of the calling user's leases, and free those leases.

    An orphan is a process of this user under a lease of this user that is gone, or whose owner is gone. It is asked to
    end (SIGTERM) and killed after `grace_s` seconds. Processes above the caller are spared, and named.

    Returns:
        `reaped`: [{pid, command, lease, killed, used_memory_bytes}]; `spared`: the same without killed;
        `leases_freed`: ids; `memory_freed_bytes`; `memory_verified`: whether NVML was asked and showed none of them any
        more, null where there was nothing to ask (no GPU, or a recorded inventory). Of a dry run {"plan": the same,
        without killed and memory_verified}.

    Raises:
        VerificationFailed: a process or its memory is still there.
    """
    progress = progress or NullProgress()
    uid = os.geteuid()
    above = own_ancestors()

    def find() -> dict[ProcessId, str]:
        return orphans(directory.scan().leases, directory.path, uid)

    before = inventory()
    freed = [e.record.id for e in directory.scan().leases if e.uid == uid and e.held and e.orphaned]
    # remembered from each look on: a process that has ended cannot be asked any more
    seen: dict[ProcessId, dict[str, Any]] = {}

    begun = find()
    # of leases that are lost now; those that get lost meanwhile are another call's, or this one might never end
    lost = {*begun.values(), *freed}

    def targets() -> set[ProcessId]:
        orphaned = find().items()
        found = {process: lease for process, lease in orphaned if lease in lost and process.pid not in above}
        for process, lease in found.items():
            if process not in seen:
                seen[process] = _described(process, lease, before)
        return set(found)

    spared = [_described(process, lease, before) for process, lease in begun.items() if process.pid in above]
    if spared:
        progress.warn(f"spared, since this command runs below them: {_listing(spared)}")
    if dry_run:
        targets()
        return {"plan": _result(list(seen.values()), spared, freed)}
    deadline = time.monotonic() + grace_s
    end = end_tree(targets, None, lambda: deadline)
    for process, item in seen.items():
        item["killed"] = process in end.killed
    if end.left:
        left = _listing([seen[process] for process in end.left])
        raise VerificationFailed(f"still running after SIGKILL: {left}", "they hang in the kernel or the driver")
    verified = _memory_is_back(set(seen), inventory) if seen else None
    free = [identity for identity in freed if directory.remove_if_free(identity)]
    with directory.locked() as opened:
        opened.scan(clean=True)
    return {**_result(list(seen.values()), spared, free), "memory_verified": verified}


def _described(process: ProcessId, lease: str, inventory: Inventory) -> dict[str, Any]:
    used = [p.used_memory_bytes or 0 for gpu in inventory.gpus for p in gpu.processes if p.pid == process.pid]
    return {
        "pid": process.pid,
        "command": describe(process.pid)[1],
        "lease": lease,
        "used_memory_bytes": sum(used),
    }


def _memory_is_back(ended: set[ProcessId], inventory: Callable[[], Inventory]) -> bool | None:
    """Whether NVML shows none of them any more; raises when it still does after a while."""
    until = time.monotonic() + _DRIVER_LIMIT_S
    while True:
        now = inventory()
        if now.recorded or not now.gpus:
            return None
        numbers = {process.pid for process in ended if identify(process.pid) is None}
        left = [(gpu.index, p) for gpu in now.gpus for p in gpu.processes if p.pid in numbers]
        if not left:
            return True
        if time.monotonic() > until:
            listing = ", ".join(f"pid {p.pid} on GPU {index} ({p.used_memory_bytes or 0:,} bytes)" for index, p in left)
            raise VerificationFailed(
                f"the processes are gone, and after {_DRIVER_LIMIT_S:g} s NVML still shows memory of {listing}",
                "nvidia-smi shows the same? then the GPU needs a reset",
            )
        time.sleep(0.2)


def _result(items: list[dict[str, Any]], spared: list[dict[str, Any]], freed: list[str]) -> dict[str, Any]:
    return {
        "reaped": items,
        "spared": spared,
        "leases_freed": freed,
        "memory_freed_bytes": sum(item["used_memory_bytes"] for item in items),
    }


def _listing(items: list[dict[str, Any]]) -> str:
    return ", ".join(f"pid {item['pid']} ({item['command'] or 'unknown'})" for item in items)
