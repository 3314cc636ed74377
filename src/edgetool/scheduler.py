"""Leases for GPUs, ports and boards, shared by all users of one machine.

A lease is a file in one shared directory with an exclusive flock on it. The descriptor of that file is handed down to
every process that works under the lease, so the kernel frees it when the last of them has ended, and not before:
no time stamp to expire, nothing left behind by SIGKILL. Grants are made one at a time, under a lock on the directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetool.inventory import Inventory
from edgetool.progress import NullProgress, Progress

LEASE_VARIABLE = "EDGETOOL_LEASE"
"""Environment variable of every process that works under a lease: the lease's id. How orphans are recognised."""
LEASE_FDS_VARIABLE = "EDGETOOL_LEASE_FDS"
"""The numbers of the inherited descriptors that hold the lease, separated by commas."""


@dataclass(frozen=True)
class Request:
    """What a job needs, all of it or nothing.

    Attributes:
        gpus: number of GPUs, all of one class; or 1 MIG instance.
        gpu_class: such as "4090" or "H100" (see inventory.gpu_class); None takes any.
        min_free_bytes: memory to be reserved for this lease on each GPU.
        exclusive: no other lease and no process of others on these GPUs; the whole memory is reserved.
        ports: number of TCP ports, chosen outside the kernel's ephemeral range.
        port: this very port, in place of `ports`.
        board: name of an FPGA board or of its simulator; always held by one lease alone.
    """

    gpus: int = 0
    gpu_class: str | None = None
    min_free_bytes: int = 0
    exclusive: bool = False
    ports: int = 0
    port: int | None = None
    board: str | None = None


class Lease:
    """Resources that are held until `release` and until the last process that inherited `fds` has ended.

    Start every child with `pass_fds=lease.fds` and `env={**os.environ, **lease.environment()}`.

    Attributes:
        id: 16 lower-case hex digits.
        gpu_uuids: UUIDs of GPUs or of one MIG instance, in the order of their indices.
        ports: TCP ports, ascending.
        board: the board's name, or None.
        fds: descriptors for children to inherit (not inheritable by themselves: pass them on).
    """

    id: str
    gpu_uuids: tuple[str, ...]
    ports: tuple[int, ...]
    board: str | None
    fds: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        """Variables for children: CUDA_VISIBLE_DEVICES by UUID (empty without a GPU), the lease's id, fds and ports."""
        raise NotImplementedError

    def adopt(self, pid: int) -> None:
        """Name a child that leads a session of its own: whoever is in that session belongs to the lease, for all users.

        Other users cannot read the environment of our processes; the record of the lease tells them this way.
        """
        raise NotImplementedError

    def release(self) -> bool:
        """Let go. True when everything is free again; False while a process that inherited `fds` still runs.

        Twice is once. A port counts as in use as long as somebody listens on it, whoever that is.
        """
        raise NotImplementedError

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Scheduler:
    """Grants leases.

    Args:
        lock_dir: the shared directory (see leases.open_directory).
        inventory: reads the GPUs; called before every grant.
        port_range: first and last candidate for `Request.ports`.
        parent: id of the lease that this process itself works under: its GPUs can be leased again, by us alone.
    """

    def __init__(
        self,
        lock_dir: Path,
        inventory: Callable[[], Inventory],
        *,
        port_range: tuple[int, int] = (20_000, 29_999),
        parent: str | None = None,
    ) -> None:
        raise NotImplementedError

    def acquire(self, request: Request, *, command: str, wait_s: float = 0, progress: Progress | None = None) -> Lease:
        """Lease everything that `request` asks for, at once or not at all.

        Waits up to `wait_s` seconds, first come first served among those who compete for the same things, and says
        every 10 s what it waits for and who holds it. `command` is what `edgetool gpus` shows.

        Raises:
            ResourceUnavailable: what was asked for does not exist on this machine, or was not free in time; the
                message says who holds it.
            ConfigError: the lock directory cannot be used.
        """
        _ = progress or NullProgress()
        raise NotImplementedError

    def snapshot(self) -> Mapping[str, Any]:
        """All that `edgetool gpus --json` shows: driver_version, gpus, ports, boards, waiting."""
        raise NotImplementedError


def from_config(config: Any) -> Scheduler:
    """The scheduler of this machine: lock directory, inventory and ports as `config` (edgetool.config.Config) says."""
    raise NotImplementedError
