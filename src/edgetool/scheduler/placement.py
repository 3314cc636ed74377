"""Which GPUs a request gets: pure rules on what is there, what is leased, and who waits already.

A unit is what can be leased: a GPU, or an instance of a GPU in MIG mode. Nobody overtakes those who have waited longer
for the same units: each of them keeps as many as it needs, those that are nearest to what it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetool.scheduler.inventory import Gpu, GpuProcess, Inventory, same_class
from edgetool.scheduler.lease_records import Entry, Share
from edgetool.scheduler.ownership import Owner, Owners

MIG_SUFFIX = "-MIG"
_UNEXPLAINED_BYTES = 2 << 30
"""Memory in use that no process accounts for: a driver takes less, so more is somebody who cannot be seen."""


@dataclass(frozen=True)
class Request:
    """What a job needs, all of it or nothing.

    Attributes:
        gpus: number of GPUs, all of one class. One that asks for one GPU and says how much memory may get a MIG
            instance, if no whole GPU fits.
        gpu_class: such as "4090" or "H100" (see inventory.gpu_class), "H100-MIG" for instances; None takes any.
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

    def to_dict(self) -> dict[str, Any]:
        """As written down while it waits."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request | None:
        """The reverse; None when another user's file holds something else."""
        try:
            request = cls(**values)
            numbers = (request.gpus, request.min_free_bytes, request.ports, request.port or 0)
            return request if all(isinstance(number, int) and number >= 0 for number in numbers) else None
        except TypeError:
            return None

    def __str__(self) -> str:
        things = []
        if self.gpus:
            of_class = f" of class {self.gpu_class}" if self.gpu_class else ""
            with_memory = f" with {gib(self.min_free_bytes)} free" if self.min_free_bytes else ""
            alone = " used by nobody else" if self.exclusive else ""
            things += [f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}{of_class}{with_memory}{alone}"]
        things += [f"{self.ports} port{'s' if self.ports > 1 else ''}"] if self.ports else []
        things += [f"port {self.port}"] if self.port is not None else []
        things += [f"board {self.board}"] if self.board is not None else []
        return ", ".join(things) or "nothing"


@dataclass(frozen=True)
class Unit:
    """One GPU or MIG instance, with what is known about its use.

    Attributes:
        outside_bytes: used by processes that work under no lease on it.
        reserved_bytes: reserved by leases, whether they use it yet or not.
        leases: those leases.
        strangers: processes that work under no lease on it, the system's left out.
        unexplained: more memory is in use than the processes that can be seen account for.
    """

    uuid: str
    index: int
    unit_class: str
    is_mig: bool
    total_bytes: int
    used_bytes: int
    outside_bytes: int
    reserved_bytes: int
    leases: tuple[Entry, ...] = ()
    strangers: tuple[GpuProcess, ...] = ()
    unexplained: bool = False
    error: str | None = None

    @property
    def free_bytes(self) -> int:
        """What a new lease can still have."""
        if self.error is not None:
            return 0
        return max(0, self.total_bytes - max(self.used_bytes, self.outside_bytes + self.reserved_bytes))

    @property
    def exclusive(self) -> bool:
        """Whether a lease on it shares with nobody."""
        return any(entry.record.exclusive for entry in self.leases)

    @property
    def name(self) -> str:
        """`GPU 3 (4090)`."""
        return f"GPU {self.index} ({self.unit_class})"

    def is_of(self, request: Request) -> bool:
        """Whether this kind of unit can serve the request at all."""
        if not self.is_mig:
            return request.gpu_class is None or same_class(request.gpu_class, self.unit_class)
        if request.gpus > 1:
            return False  # CUDA gives a process one instance (MIG User Guide, "Device Enumeration")
        parent = self.unit_class.removesuffix(MIG_SUFFIX)
        if request.gpu_class is None or same_class(request.gpu_class, parent):
            return request.min_free_bytes > 0
        return same_class(request.gpu_class, self.unit_class)

    def could_ever(self, request: Request) -> bool:
        """Whether it would do if nobody used it."""
        return self.error is None and self.is_of(request) and self.total_bytes >= request.min_free_bytes

    def fits(self, request: Request) -> bool:
        """Whether it does now."""
        if not self.could_ever(request) or self.exclusive or self.free_bytes < request.min_free_bytes:
            return False
        if request.exclusive:
            return not (self.leases or self.strangers or self.unexplained)
        return self.free_bytes > 0

    def share(self, request: Request) -> Share:
        """What a lease reserves of it."""
        return Share(self.uuid, self.total_bytes if request.exclusive else request.min_free_bytes)

    def obstacle(self, request: Request) -> str:
        """In words, who is in the way."""
        if self.error is not None:
            return f"{self.name}: {self.error}"
        if self.total_bytes < request.min_free_bytes:
            return f"{self.name} has {gib(self.total_bytes)} in all"
        holders = [
            f"{'all of it' if entry.record.exclusive else gib(_reserved(entry, self.uuid))} leased by {who(entry)}"
            for entry in self.leases
        ]
        others = [
            f"{gib(process.used_memory_bytes or 0)} used by {process.user or 'an unknown user'}"
            f" (pid {process.pid}{f', {process.command[:60]}' if process.command else ''})"
            for process in self.strangers
        ]
        others += ["memory is in use by processes that cannot be seen"] if self.unexplained else []
        return f"{self.name}: {gib(self.free_bytes)} free" + "".join(f"; {part}" for part in holders + others)


@dataclass(frozen=True)
class Placement:
    """What a request gets, or why it gets nothing. `never`: waiting does not help."""

    shares: tuple[Share, ...] = ()
    refusal: str | None = None
    never: bool = False
    obstacles: tuple[str, ...] = field(default=())


def gib(value_bytes: int) -> str:
    """`22.0 GiB`: memory of GPUs is made and sold in powers of two."""
    return f"{value_bytes / 2**30:.1f} GiB"


def who(entry: Entry) -> str:
    """`ml1 (pid 4711, python train.py, lease 0123...)`."""
    orphan = ", orphaned" if entry.orphaned else ""
    return f"{entry.user} (pid {entry.record.pid}, {entry.record.command[:60]}, lease {entry.record.id}{orphan})"


def units_of(inventory: Inventory, leases: Sequence[Entry], owners: Owners, within: Entry | None = None) -> list[Unit]:
    """What can be leased, in the order of indices.

    `within`: the lease that the asking process itself works under; then only what that lease holds, less what others
    within the same lease have taken of it. Leases within another held lease are a part of it and count only there.
    """
    held = [entry for entry in leases if entry.held]
    users = {entry.record.id: entry.uid for entry in held}
    if within is None or not within.record.gpus:
        counted = [entry for entry in held if users.get(entry.record.within or "") != entry.uid]
        return [unit for gpu in inventory.gpus for unit in _units(gpu, counted, owners)]
    mine = {share.uuid: share.memory_bytes for share in within.record.gpus}
    siblings = [entry for entry in held if entry.record.within == within.record.id and entry.uid == within.uid]
    found = [unit for gpu in inventory.gpus for unit in _units(gpu, siblings, owners) if unit.uuid in mine]
    return [
        Unit(
            unit.uuid,
            unit.index,
            unit.unit_class,
            unit.is_mig,
            mine[unit.uuid],
            0,
            0,
            unit.reserved_bytes,
            unit.leases,
            error=unit.error,
        )
        for unit in found
    ]


def _units(gpu: Gpu, leases: Sequence[Entry], owners: Owners) -> list[Unit]:
    owned = [(process, owners.of(process, gpu)) for process in gpu.processes]
    if not gpu.mig:
        if gpu.uuid is None:
            return []
        return [_unit(gpu, gpu.uuid, gpu.memory_total_bytes, gpu.memory_used_bytes, False, leases, owned)]
    return [
        _unit(gpu, part.uuid, part.memory_total_bytes, part.memory_used_bytes, True, leases, owned) for part in gpu.mig
    ]


def _unit(
    gpu: Gpu,
    uuid: str,
    total_bytes: int,
    used_bytes: int,
    is_mig: bool,
    leases: Sequence[Entry],
    owned: Sequence[tuple[GpuProcess, Owner]],
) -> Unit:
    on_it = tuple(entry for entry in leases if any(share.uuid == uuid for share in entry.record.gpus))
    # a process whose instance is not told may be on any of them
    here = [(process, owner) for process, owner in owned if not is_mig or process.mig_uuid in {None, uuid}]
    known = not is_mig or all(process.mig_uuid for process, _ in here)
    # "orphan" is within a lease as long as the lease is held, and then its memory is the lease's
    holders = {entry.record.id for entry in on_it}
    outside = [(process, owner) for process, owner in here if owner.lease not in holders]
    figures = [process.used_memory_bytes for process, _ in here]
    if known:
        outside_bytes = sum(process.used_memory_bytes or 0 for process, _ in outside)
    else:
        inside = sum(process.used_memory_bytes or 0 for process, owner in here if owner.lease in holders)
        outside_bytes = max(0, used_bytes - inside)
    seen = known and all(figure is not None for figure in figures)
    return Unit(
        uuid,
        gpu.index,
        gpu.gpu_class + MIG_SUFFIX if is_mig else gpu.gpu_class,
        is_mig,
        total_bytes,
        used_bytes,
        outside_bytes,
        sum(_reserved(entry, uuid) for entry in on_it),
        on_it,
        tuple(process for process, owner in outside if owner.kind != "system" and known),
        seen and used_bytes - sum(figure or 0 for figure in figures) > _UNEXPLAINED_BYTES,
        gpu.error,
    )


def _reserved(entry: Entry, uuid: str) -> int:
    return sum(share.memory_bytes for share in entry.record.gpus if share.uuid == uuid)


def place(request: Request, units: Sequence[Unit], earlier: Sequence[Request] = ()) -> Placement:
    """Choose GPUs for a request.

    Units that nobody uses come first, then those with the most free memory, then the lowest index; when no class is
    asked for, the class with the least memory that will do; MIG instances last.

    Args:
        earlier: the requests that have waited longer, first come first.
    """
    if not request.gpus:
        return Placement()
    able = [unit for unit in units if unit.could_ever(request)]
    groups = _groups(able)
    if not any(len(group) >= request.gpus for group in groups):
        return Placement(refusal=_impossible(request, units), never=True)
    kept = _kept(earlier, units)
    for group in groups:
        chosen = _best([unit for unit in group if unit.fits(request) and unit.uuid not in kept], request)
        if chosen:
            return Placement(tuple(unit.share(request) for unit in sorted(chosen, key=lambda unit: unit.index)))
    fitting = max(sum(unit.fits(request) and unit.uuid not in kept for unit in group) for group in groups)
    obstacles = [unit.obstacle(request) for unit in able if not unit.fits(request)]
    if (
        request.exclusive
        and not request.min_free_bytes
        and any(unit.free_bytes > 0 and not unit.exclusive for unit in able)
    ):
        obstacles.append("to share one, say with --min-free how much of it is needed")
    waited = [unit.name for unit in able if unit.fits(request) and unit.uuid in kept]
    obstacles += [f"{', '.join(waited)}: kept for requests that have waited longer"] if waited else []
    only = "none is" if not fitting else f"only {fitting} {'is' if fitting == 1 else 'are'}"
    return Placement(refusal=f"{request} wanted, and {only} to be had", obstacles=tuple(obstacles))


def _groups(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units of one class together; whole GPUs before instances, less memory before more."""
    classes: dict[str, list[Unit]] = {}
    for unit in units:
        classes.setdefault(unit.unit_class, []).append(unit)
    return sorted(classes.values(), key=lambda g: (g[0].is_mig, min(u.total_bytes for u in g), g[0].index))


def _best(units: Sequence[Unit], request: Request) -> list[Unit]:
    if len(units) < request.gpus:
        return []
    # of instances the smallest that fits, since their sizes differ; of GPUs the emptiest
    return sorted(
        units,
        key=lambda u: (bool(u.leases or u.strangers), u.total_bytes if u.is_mig else 0, -u.free_bytes, u.index),
    )[: request.gpus]


def _kept(earlier: Sequence[Request], units: Sequence[Unit]) -> set[str]:
    kept: set[str] = set()
    for request in earlier:
        open_to_it = [unit for unit in units if unit.could_ever(request) and unit.uuid not in kept]
        groups = [group for group in _groups(open_to_it) if len(group) >= request.gpus]
        if not request.gpus or not groups:
            continue
        ready = next(
            (best for group in groups if (best := _best([u for u in group if u.fits(request)], request))), None
        )
        nearest = sorted(groups[0], key=lambda u: (not u.fits(request), u.exclusive, -u.free_bytes, u.index))
        kept |= {unit.uuid for unit in ready or nearest[: request.gpus]}
    return kept


def _impossible(request: Request, units: Sequence[Unit]) -> str:
    if not units:
        return f"{request} wanted, and there is no GPU that can be leased here"
    right = [unit for unit in units if unit.is_of(request)]
    counted: dict[str, int] = {}
    for unit in units:
        counted[unit.unit_class] = counted.get(unit.unit_class, 0) + 1
    listing = ", ".join(f"{count} x {name}" for name, count in counted.items())
    if not right:
        return f"{request} wanted, and there are {listing}"
    unfit = [unit.obstacle(request) for unit in right if not unit.could_ever(request)]
    return f"{request} wanted, and this machine cannot give it ({listing})" + "".join(f"; {text}" for text in unfit)
