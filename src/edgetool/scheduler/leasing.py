"""Leases for GPUs, ports and boards, shared by all users of one machine.

A lease is a file in one shared directory (leases.py) with an exclusive flock on it. The descriptor of that file is
handed down to every process that works under the lease, so the kernel frees it when the last of them has ended, and not
before: no time stamp that expires, nothing left behind by SIGKILL. Grants are made one at a time, under a lock on the
directory; which GPUs a request gets is decided by placement.py, on an inventory read just before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgetool.errors import ResourceUnavailable
from edgetool.process.tree import LEASE_VARIABLE, identify
from edgetool.progress import NullProgress, Progress
from edgetool.scheduler import ports as tcp
from edgetool.scheduler.inventory import Inventory, reader
from edgetool.scheduler.lease_records import (
    DIRECTORY_VARIABLE,
    LEASE_FDS_VARIABLE,
    Entry,
    Record,
    lease_ids,
    new_record,
    write_record,
)
from edgetool.scheduler.leases import LeaseDirectory, OpenDirectory, choose_directory
from edgetool.scheduler.look import Look
from edgetool.scheduler.ownership import Owners
from edgetool.scheduler.placement import Request, place, units_of, who

if TYPE_CHECKING:
    from edgetool.config import Config
    from edgetool.scheduler.lease_watch import LeaseWatch

__all__ = ["Lease", "Look", "Request", "Scheduler", "from_config"]

PORTS_VARIABLE = "EDGETOOL_PORTS"
"""The leased ports, separated by commas, for the processes that work under the lease."""

_STALE_S = 1.0
"""How old an inventory may be when a grant is decided on it."""
_LONGEST_PAUSE_S = 0.5
"""Leases that end wake those who wait; that processes of others end has to be looked for."""
_SAY_EVERY_S = 10.0
_SILENT_S = 15.0
"""Who waits and has not looked for so long (stopped with Ctrl-Z, say) is passed by until it looks again."""
_MOST_MEMBERS = 64


class Lease:
    """Resources that are held until `release`, and until the last process that inherited `fds` has ended.

    Start every child with `pass_fds=lease.fds` and `env={**os.environ, **lease.environment()}`.

    Attributes:
        id: 16 lower-case hex digits.
        gpu_uuids: UUIDs of GPUs, or of one MIG instance, in the order of their indices.
        ports: TCP ports, ascending.
        board: the board's name, or None.
        fds: descriptors for children to inherit (close-on-exec here: pass them on).
    """

    def __init__(self, directory: LeaseDirectory, record: Record, descriptor: int, outer: Sequence[str]) -> None:
        self.id = record.id
        self.gpu_uuids = tuple(share.uuid for share in record.gpus)
        self.ports = record.ports
        self.board = record.board
        self.fds: tuple[int, ...] = (descriptor,)
        self._directory = directory
        self._record = record
        self._outer = tuple(outer)
        self._owner_pid = os.getpid()

    def environment(self) -> dict[str, str]:
        """Variables for children.

        CUDA_VISIBLE_DEVICES by UUID (empty without a GPU, so that nobody uses one by accident), EDGETOOL_LEASE,
        EDGETOOL_LEASE_FDS, EDGETOOL_LOCK_DIR, and EDGETOOL_PORTS where there are ports.
        """
        variables = {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpu_uuids),
            LEASE_VARIABLE: ":".join((*self._outer, self.id)),
            LEASE_FDS_VARIABLE: ",".join(str(descriptor) for descriptor in self.fds),
            DIRECTORY_VARIABLE: str(self._directory.path),
        }
        if self.ports:
            variables[PORTS_VARIABLE] = ",".join(str(port) for port in self.ports)
        return variables

    def adopt(self, pid: int) -> None:
        """Name a child: it, all below it, and all in the session that it leads belong to the lease.

        Other users cannot read the environment of our processes; the record tells them. Nothing happens when the child
        has ended or the lease was released.
        """
        process = identify(pid)
        if process is None or not self.fds:
            return
        # of a server that is started again and again only the last are of interest
        self._record = replace(self._record, members=(*self._record.members[1 - _MOST_MEMBERS :], process))
        # without room for it other users see less; that must not end a job
        with contextlib.suppress(OSError):
            write_record(self.fds[0], self._record)

    def release(self) -> bool:
        """Let go. True when everything is free again; False while a process that inherited `fds` still runs.

        Twice is once. What is still running then is an orphan, and its lease goes on until it ends or is reaped. A
        port on which somebody still listens is not granted to anybody, lease or not.
        """
        if self.fds:
            (descriptor,), self.fds = self.fds, ()
            if os.getpid() != self._owner_pid:
                os.close(descriptor)  # a fork gives back its copy, no more
                return False
            with contextlib.suppress(OSError):
                write_record(descriptor, replace(self._record, released=True))
            os.close(descriptor)
        return self._directory.remove_if_free(self.id)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Scheduler:
    """Grants leases.

    Args:
        lock_dir: the shared directory; it is made, open to all users, when it is not there.
        inventory: reads the GPUs; called before every grant.
        port_range: first and last candidate for `Request.ports`.
        within: value of EDGETOOL_LEASE in this process's environment: the lease it works under, whose GPUs it can
            lease in parts.
    """

    def __init__(
        self,
        lock_dir: Path,
        inventory: Callable[[], Inventory],
        *,
        port_range: tuple[int, int] = (20_000, 29_999),
        within: str | None = None,
    ) -> None:
        self.directory = LeaseDirectory(lock_dir)
        self.inventory = inventory
        self._port_range = port_range
        self._outer = lease_ids(within)

    def acquire(self, request: Request, *, command: str, wait_s: float = 0, progress: Progress | None = None) -> Lease:
        """Lease everything that `request` asks for, at once or not at all.

        Waits up to `wait_s` seconds, first come first served among those who compete for the same things, and says
        every 10 s what it waits for and who holds it. `command` is what `edgetool gpus` shows.

        Raises:
            ResourceUnavailable: what was asked for does not exist on this machine, or was not free in time; the
                message says who holds it.
            ConfigError: the lock directory cannot be used.
        """
        waiting = _Waiting(request, command, wait_s, progress or NullProgress())
        try:
            while True:
                inventory = self.inventory()
                seen_s = time.monotonic()
                with self.directory.locked() as directory:
                    if time.monotonic() - seen_s > _STALE_S:
                        continue
                    lease, refusal = self._try(request, command, inventory, directory, waiting)
                    if lease is not None:
                        waiting.leave(directory)
                        return lease
                waiting.pause(refusal)
        finally:
            waiting.close(self.directory)

    def look(self) -> Look:
        """The machine at this moment. Takes no lock."""
        scan = self.directory.scan()
        return Look(self.inventory(), scan, self.directory.path)

    def snapshot(self) -> dict[str, Any]:
        """All that `edgetool gpus --json` shows: driver_version, gpus, ports and boards."""
        return self.look().document()

    def _innermost(self, held: Sequence[Entry]) -> Entry | None:
        """The lease that this process itself works under; another user's id in the environment is none."""
        own = {entry.record.id: entry for entry in held if entry.uid == os.geteuid()}
        return next((own[identity] for identity in reversed(self._outer) if identity in own), None)

    def _try(
        self, request: Request, command: str, inventory: Inventory, directory: OpenDirectory, waiting: _Waiting
    ) -> tuple[Lease | None, _Refusal]:
        scan = directory.scan(clean=True)
        waiting.touch()
        held = [entry for entry in scan.leases if entry.held]
        within = self._innermost(held)
        context = within.record.id if within else None
        earlier = _earlier(scan.waiting, waiting.ticket)
        before = [wanted for entry, wanted in earlier if entry.record.within == context]

        units = units_of(inventory, held, Owners(scan.leases, self.directory.path), within)
        chosen = place(request, units, before)
        problems = [_Refusal("; ".join((chosen.refusal, *chosen.obstacles)), chosen.never)] if chosen.refusal else []
        if problems and inventory.driver_version is None and not inventory.gpus:
            problems = [_Refusal(f"{chosen.refusal}: no NVIDIA driver on this machine", never=True)]
        problems += [
            _Refusal(f"{entry.user} (pid {entry.record.pid}) has waited longer for {thing}")
            for entry, wanted in earlier
            for thing in _same_things(wanted, request)
        ]
        # what the lease holds that this process works under is its own to use
        others = [entry for entry in held if entry.record.id not in self._outer]
        if request.board is not None:
            problems += [
                _Refusal(f"board {request.board} is leased by {who(entry)}")
                for entry in others
                if entry.record.board == request.board
            ]
        ports = self._exact_port(request.port, others) if request.port is not None else ((), None)
        if request.ports and not problems:
            ports = self._free_ports(request.ports, held)
        problems += [ports[1]] if ports[1] else []
        if problems:
            refusal = _Refusal("; ".join(p.reason for p in problems), any(p.never for p in problems))
            if waiting.wants_a_ticket and not refusal.never:
                waiting.queue(directory, context)
            return None, refusal
        record = new_record(
            command,
            gpus=chosen.shares,
            exclusive=request.exclusive and bool(chosen.shares),
            ports=ports[0],
            board=request.board,
            within=context,
        )
        return Lease(self.directory, record, directory.add_lease(record), self._outer), _Refusal("")

    def _exact_port(self, port: int, others: Sequence[Entry]) -> tuple[tuple[int, ...], _Refusal | None]:
        for entry in others:
            if port in entry.record.ports:
                return (), _Refusal(f"port {port} is leased by {who(entry)}")
        trouble = tcp.trouble(port, lingering_is_fine=True)
        return (port,), _Refusal(trouble.why, trouble.lasting) if trouble else None

    def _free_ports(self, count: int, held: Sequence[Entry]) -> tuple[tuple[int, ...], _Refusal | None]:
        first, last = self._port_range
        leased = {port for entry in held for port in entry.record.ports}
        found: list[int] = []
        for port in tcp.candidates(first, last, leased):
            if tcp.trouble(port) is None:
                found.append(port)
                if len(found) == count:
                    return tuple(found), None
        why = f"{count} ports wanted, and {len(found)} of those from {first} to {last} are free"
        return (), _Refusal(why, never=count > last - first + 1)


@dataclass(frozen=True)
class _Refusal:
    reason: str
    never: bool = False


class _Waiting:
    """One request that may have to wait: its place in the queue, its patience, and what it says meanwhile."""

    def __init__(self, request: Request, command: str, wait_s: float, progress: Progress) -> None:
        self.request = request
        self.command = command
        self.wait_s = wait_s
        self.progress = progress
        self.ticket: str | None = None
        self._descriptor = -1
        self._begun_s = time.monotonic()
        self._said_s = -_SAY_EVERY_S
        self._watch: LeaseWatch | None = None

    @property
    def wants_a_ticket(self) -> bool:
        """Whether it is going to wait and does not stand in the queue yet."""
        return self.wait_s > 0 and self.ticket is None

    def queue(self, directory: OpenDirectory, within: str | None) -> None:
        """Stand at the end of the queue."""
        record = new_record(self.command, wanted=self.request.to_dict(), within=within)
        self._descriptor, self.ticket = directory.add_ticket(record)
        from edgetool.scheduler.lease_watch import LeaseWatch

        self._watch = LeaseWatch(directory.path)

    def pause(self, refusal: _Refusal) -> None:
        """Sleep until the next look; raises when there is no sense in it, or no time."""
        left_s = self._begun_s + self.wait_s - time.monotonic()
        if refusal.never:
            raise ResourceUnavailable(refusal.reason, "edgetool gpus shows what is there")
        if left_s <= 0:
            waited = f" (waited {self.wait_s:g} s)" if self.wait_s else ""
            raise ResourceUnavailable(
                refusal.reason + waited, f"wait for it with --wait {'1h' if self.wait_s else '10m'}, or ask for less"
            )
        spent_s = time.monotonic() - self._begun_s
        if spent_s - self._said_s >= _SAY_EVERY_S:
            self._said_s = spent_s
            self.progress.note(f"waiting for {self.wait_s - left_s:.0f} of {self.wait_s:g} s: {refusal.reason}")
        if self._watch is not None:
            self._watch.wait(min(_LONGEST_PAUSE_S, left_s))

    def touch(self) -> None:
        """Show that somebody still waits."""
        if self._descriptor >= 0:
            os.utime(self._descriptor)

    def leave(self, directory: OpenDirectory) -> None:
        """Give up the place in the queue."""
        if self.ticket is not None:
            directory.remove(self.ticket)
            self.ticket = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self, directory: LeaseDirectory) -> None:
        """Leave nothing behind, however the waiting ended."""
        if self._watch is not None:
            self._watch.close()
        if self.ticket is not None:
            with directory.opened() as descriptor:
                self.leave(OpenDirectory(descriptor, directory.path))


def _earlier(waiting: Sequence[Entry], ticket: str | None) -> list[tuple[Entry, Request]]:
    """The requests that wait before the one with this ticket; before one that has none, all of them."""
    identity = ticket.removesuffix(".json").rpartition("-")[2] if ticket else None
    found = []
    for entry in waiting:
        if entry.record.id == identity:
            break
        silent = time.time() - entry.touched_unix_s > _SILENT_S
        if not silent and (wanted := Request.from_dict(entry.record.wanted)):
            found.append((entry, wanted))
    return found


def _same_things(wanted: Request, request: Request) -> list[str]:
    same = []
    if request.board is not None and wanted.board == request.board:
        same.append(f"board {request.board}")
    if request.port is not None and wanted.port == request.port:
        same.append(f"port {request.port}")
    return same


def from_config(config: Config) -> Scheduler:
    """The scheduler of this machine, with the lock directory, GPUs and ports that the configuration says."""
    return Scheduler(
        choose_directory(config.common.lock_dir),
        reader(config.common.nvml_fixture, config.scheduler.gpu_classes),
        port_range=config.scheduler.ports(),
        # no setting: edgetool's own word to the processes that it starts
        within=os.environ.get(LEASE_VARIABLE),
    )
