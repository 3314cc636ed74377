"""Whose a process is: of a lease that is held, an orphan of one, of somebody else, or of the system.

A process of our own tells by its environment (EDGETOOL_LEASE). The environment of other users' processes is not ours to
read: they are recognised as children of the process that holds the lease, or of those that it has named (Lease.adopt).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetool.process import tree as process_tree
from edgetool.process.tree import ProcessId
from edgetool.scheduler.inventory import Gpu, GpuProcess
from edgetool.scheduler.lease_records import DIRECTORY_VARIABLE, Entry, lease_ids, process_uid

ProcessClass = Literal["leased", "orphan", "foreign", "system"]

_SYSTEM_COMMANDS = {
    *("X", "Xorg", "Xwayland", "gnome-shell", "gnome-remote-desktop-daemon", "kwin_x11", "kwin_wayland", "mutter"),
    *("nvidia-persistenced", "nvidia-fabricmanager", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"),
    *("nv-hostengine", "dcgm-exporter", "sddm-greeter", "gdm-x-session"),
}
_SYSTEM_USERS = {"gdm", "sddm", "lightdm", "nvidia-persistenced", "nvidia-dcgm"}


@dataclass(frozen=True)
class Owner:
    """What a process is, and the id of the lease that it belongs to."""

    kind: ProcessClass
    lease: str | None = None


class Owners:
    """Answers for one look at the machine.

    Args:
        leases: what leases.LeaseDirectory finds.
        directory: its path. An unknown lease is one that is gone only where the process names this directory.
    """

    def __init__(self, leases: Sequence[Entry], directory: Path) -> None:
        self.leases = {entry.record.id: entry for entry in leases}
        self._orphaned = {entry.record.id: entry.orphaned for entry in leases}
        self._directory = directory.absolute()
        self._known: dict[int, tuple[str, ...]] = {}

    def of(self, process: GpuProcess, gpu: Gpu) -> Owner:
        """The owner of a process on a GPU. Who uses a GPU that its lease does not name is foreign there."""
        uuids = {gpu.uuid, *(part.uuid for part in gpu.mig)}
        orphan_of = None
        for identity in self.leases_of(process.pid):
            entry = self.leases.get(identity)
            if entry is None or self._orphaned[identity]:
                orphan_of = identity
            elif any(share.uuid in uuids for share in entry.record.gpus):
                return Owner("leased", identity)
        if orphan_of is not None:
            return Owner("orphan", orphan_of)
        return Owner("system" if _is_system(process) else "foreign")

    def leases_of(self, pid: int) -> tuple[str, ...]:
        """The ids of the leases that a process works under; also of leases that are gone."""
        if pid not in self._known:
            self._known[pid] = tuple(self._leases_of(pid))
        return self._known[pid]

    def _leases_of(self, pid: int) -> list[str]:
        this = process_tree.entry(pid)
        if this is None:
            return []
        uid = process_uid(pid)
        found = []
        for identity in lease_ids(process_tree.variable_of(pid, process_tree.LEASE_VARIABLE)):
            entry = self.leases.get(identity)
            # anybody can write another user's id into an environment
            if self._is_from_here(pid) if entry is None else entry.uid == uid:
                found.append(identity)
        above = _above(this)
        for identity, entry in self.leases.items():
            if identity in found or not entry.held or not entry.same_namespace:
                continue
            # an owner that has let go may have other children, which are none of the lease's business
            roots = {*entry.record.members, *(() if entry.record.released else (entry.process,))}
            own_sessions = {member.pid: member.start_ticks for member in entry.record.members}
            in_session = own_sessions.get(this.session, this.id.start_ticks + 1) <= this.id.start_ticks
            if roots & above or in_session:
                found.append(identity)
        return found

    def _is_from_here(self, pid: int) -> bool:
        named = process_tree.variable_of(pid, DIRECTORY_VARIABLE)
        return bool(named) and Path(str(named)) == self._directory


def orphans(leases: Sequence[Entry], directory: Path, uid: int) -> dict[ProcessId, str]:
    """The live processes of a user that belong to leases of this user that are gone or orphaned, each with the lease.

    A process belongs to a lease when its environment says so, when it holds the lease's file open, when it is in the
    session of a process that the lease names, or below such a process.
    """
    own = {entry.record.id for entry in leases if entry.uid == uid}
    others = {entry.record.id for entry in leases if entry.uid != uid}
    lost = {entry.record.id for entry in leases if entry.uid == uid and entry.orphaned}
    inodes = {entry.inode: entry.record.id for entry in leases if entry.record.id in lost and entry.held}
    owners = Owners(leases, directory)
    found: dict[ProcessId, str] = {}
    for this in process_tree.entries():
        pid = this.id.pid
        if process_uid(pid) != uid:
            continue
        claimed = [identity for identity in owners.leases_of(pid) if identity not in others]
        identity = next((one for one in claimed if one not in own or one in lost), None)
        if identity is None and inodes:
            identity = next((inodes[key] for key in _open_files(pid) if key in inodes), None)
        if identity is not None:
            found[this.id] = identity
    return found


def _above(this: process_tree.Entry) -> set[ProcessId]:
    """A process and all above it."""
    found = {this.id}
    while this.parent > 0 and (parent := process_tree.entry(this.parent)) and parent.id not in found:
        found.add(parent.id)
        this = parent
    return found


def _open_files(pid: int) -> set[tuple[int, int]]:
    """Device and inode of every file that a process has open; empty when that is not ours to see."""
    found = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")  # noqa: PTH208 - names alone are enough
    except OSError:
        return set()
    for name in names:
        try:
            status = os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116 - thousands of them
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return found


def _is_system(process: GpuProcess) -> bool:
    if process.user in _SYSTEM_USERS:
        return True
    program = (process.command or "").split(" ", 1)[0]
    return program.rpartition("/")[2] in _SYSTEM_COMMANDS
