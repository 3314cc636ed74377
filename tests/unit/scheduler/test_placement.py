"""Which GPUs a request gets, on the recorded machine and on small ones made by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgetool.scheduler.inventory import Gpu, GpuProcess, Inventory, MigInstance, read_recorded
from edgetool.scheduler.lease_records import Entry, Record, Share
from edgetool.scheduler.ownership import Owners
from edgetool.scheduler.placement import Placement, Request, place, units_of

RECORDED = Path(__file__).parents[2] / "fakes" / "nvml_eight_gpus.json"
GIB = 2**30
NOWHERE = Path("/nowhere")
NO_PROCESS = 2**22 + 1  # larger than any process number


def gpu(
    index: int, used_gib: float = 0, total_gib: float = 24, name: str = "NVIDIA GeForce RTX 4090", **more: object
) -> Gpu:
    made = Gpu(index, f"GPU-{index}", name, name.split()[-1], int(total_gib * GIB), int(used_gib * GIB))
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def process(used_gib: float, command: str = "python", pid: int = NO_PROCESS) -> GpuProcess:
    return GpuProcess(pid, "ml1", command, int(used_gib * GIB))


def lease(identity: str, *gpus: int, gib: float = 0, exclusive: bool = False, within: str | None = None) -> Entry:
    shares = tuple(Share(f"GPU-{index}", int((24 if exclusive else gib) * GIB)) for index in gpus)
    record = Record(identity, NO_PROCESS, 1, 0, "job", 0.0, shares, exclusive, within=within)
    return Entry(record, uid=1000, held=True, inode=(0, 0))


def indices(placement: Placement) -> list[int]:
    return [int(share.uuid.removeprefix("GPU-")) for share in placement.shares]


def placed(
    request: Request, gpus: list[Gpu], leases: list[Entry] | None = None, earlier: list[Request] | None = None
) -> Placement:
    leases = leases or []
    return place(request, units_of(Inventory("1", tuple(gpus)), leases, Owners(leases, NOWHERE)), earlier or [])


@pytest.fixture(scope="module")
def recorded() -> Inventory:
    return read_recorded(RECORDED)


def chosen(recorded: Inventory, request: Request) -> list[str]:
    units = units_of(recorded, [], Owners([], NOWHERE))
    names = {unit.uuid: f"{unit.index}{' mig' if unit.is_mig else ''}" for unit in units}
    return [names[share.uuid] for share in place(request, units).shares]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(1, "4090", 22 * GIB), ["1"]),  # GPU 0 draws a desktop and has a little less free
        (Request(2, "4090", 22 * GIB), ["0", "1"]),
        (Request(3, "4090", 14 * GIB), ["0", "1", "2"]),
        (Request(4, "4090", GIB // 2), ["0", "1", "2", "3"]),
        (Request(3, "4090", 22 * GIB), []),
        (Request(5, "4090", 1), []),  # GPU 5 has ECC errors, GPU 6 is lost
        (Request(1, "H100", 60 * GIB), ["4"]),
        (Request(1, "h100", 60 * GIB), ["4"]),
        (Request(1, "H100", 64 * GIB), []),
        (Request(1, "H100", exclusive=True), []),  # somebody is on it
        (Request(1, "A100", 10 * GIB), ["7 mig"]),
        (Request(1, "A100-MIG"), ["7 mig"]),
        (Request(1, "A100"), []),  # an instance is no A100 unless one says what is needed
        (Request(2, "A100", 10 * GIB), []),  # CUDA takes one instance a process
        (Request(1, None, 30 * GIB), ["4"]),  # whole GPUs before instances
        (Request(1, None, 20 * GIB), ["1"]),  # small GPUs before large
        (Request(2, None, 20 * GIB), ["0", "1"]),  # of one class
        (Request(1, None, exclusive=True), ["1"]),
        (Request(1, "5090"), []),
    ],
)
def test_the_recorded_machine_is_given_out_by_class_and_memory(
    recorded: Inventory, request_: Request, expected: list[str]
) -> None:
    assert chosen(recorded, request_) == expected


def test_the_instance_is_the_smallest_that_fits(recorded: Inventory) -> None:
    units = units_of(recorded, [], Owners([], NOWHERE))
    small, large = (place(Request(1, "A100", size * GIB), units).shares[0].uuid for size in (10, 30))
    assert small.endswith("0002")
    assert large.endswith("0001")


def test_what_can_never_be_is_told_from_what_is_taken(recorded: Inventory) -> None:
    units = units_of(recorded, [], Owners([], NOWHERE))
    for request in (Request(5, "4090", 1), Request(1, "5090"), Request(1, "4090", 25 * GIB), Request(2, "H100")):
        assert place(request, units).never
    for request in (Request(3, "4090", 22 * GIB), Request(1, "H100", 64 * GIB)):
        placement = place(request, units)
        assert placement.refusal
        assert not placement.never


def test_a_refusal_says_who_is_in_the_way(recorded: Inventory) -> None:
    units = units_of(recorded, [], Owners([], NOWHERE))
    (obstacle,) = place(Request(1, "H100", 64 * GIB), units).obstacles
    for part in ("GPU 4", "63.2 GiB free", "16.0 GiB", "ml2", "9000401", "python evaluate.py"):
        assert part in obstacle


def test_free_memory_is_total_less_the_larger_of_used_and_promised() -> None:
    def free_gib(one: Gpu, *leases: Entry) -> float:
        (unit,) = units_of(Inventory("1", (one,)), leases, Owners(leases, NOWHERE))
        return unit.free_bytes / GIB

    assert free_gib(gpu(0)) == 24
    assert free_gib(gpu(0, 9)) == 15
    # a stranger uses 9, a lease reserves 10 and has not begun: 24 - max(9, 9 + 10)
    stranger = (process(9),)
    assert free_gib(gpu(0, 9, processes=stranger), lease("a" * 16, 0, gib=10)) == 5
    # no process to be seen: 24 - max(9, 0 + 10)
    assert free_gib(gpu(0, 9), lease("a" * 16, 0, gib=10)) == 14
    # 24 - max(20, 9 + 10): a lease that takes more than it said
    assert free_gib(gpu(0, 20, processes=stranger), lease("a" * 16, 0, gib=10)) == 4
    assert free_gib(gpu(0), lease("a" * 16, 0, gib=10), lease("b" * 16, 0, gib=10)) == 4
    assert free_gib(gpu(0), lease("a" * 16, 0, exclusive=True)) == 0
    assert free_gib(gpu(0, error="broken")) == 0
    assert free_gib(gpu(0, 23, processes=(process(23),)), lease("a" * 16, 0, gib=10)) == 0


def test_a_lease_that_is_over_reserves_nothing() -> None:
    over = dataclasses.replace(lease("a" * 16, 0, gib=24), held=False)
    assert indices(placed(Request(1, None, 20 * GIB), [gpu(0)], [over])) == [0]


def test_shared_leases_pack_and_an_exclusive_one_shares_with_nobody() -> None:
    shared = lease("a" * 16, 0, gib=10)
    assert indices(placed(Request(1, None, 10 * GIB), [gpu(0)], [shared])) == [0]
    assert indices(placed(Request(1, None, 15 * GIB), [gpu(0)], [shared])) == []
    assert indices(placed(Request(1, exclusive=True), [gpu(0)], [shared])) == []
    assert indices(placed(Request(1), [gpu(0)], [lease("a" * 16, 0, exclusive=True)])) == []


def test_an_exclusive_lease_reserves_the_whole_gpu() -> None:
    assert placed(Request(1, None, GIB, exclusive=True), [gpu(0)]).shares == (Share("GPU-0", 24 * GIB),)
    assert placed(Request(1, None, GIB), [gpu(0)]).shares == (Share("GPU-0", GIB),)


@pytest.mark.parametrize(
    ("one", "fits"),
    [
        (gpu(0, 0.4, processes=(process(0.4, "/usr/lib/xorg/Xorg :0"),)), True),
        (gpu(0, 0.4, processes=(process(0.4, "python"),)), False),
        (gpu(0, 1.5), True),  # what a driver takes
        (gpu(0, 9), False),  # somebody in a container, whose processes are not shown
        (gpu(0, 9, processes=(dataclasses.replace(process(0), used_memory_bytes=None),)), False),
    ],
)
def test_exclusive_means_without_strangers_also_those_who_cannot_be_seen(one: Gpu, fits: bool) -> None:
    assert bool(placed(Request(1, exclusive=True), [one]).shares) is fits


def test_gpus_that_nobody_uses_come_before_those_with_more_memory_free() -> None:
    small_and_idle = gpu(1, total_gib=24)
    large_and_shared = gpu(0, 4, total_gib=48, processes=(process(4),))
    assert indices(placed(Request(1, None, GIB), [large_and_shared, small_and_idle])) == [1]


def test_several_gpus_are_of_one_class() -> None:
    mixed = [gpu(0), gpu(1, name="NVIDIA H100", total_gib=80), gpu(2, name="NVIDIA H100", total_gib=80)]
    assert indices(placed(Request(2, None, GIB), mixed)) == [1, 2]
    assert placed(Request(3, None, GIB), mixed).never


def test_nobody_overtakes_who_has_waited_longer() -> None:
    busy = [lease("a" * 16, 0, exclusive=True)]
    two = [gpu(0), gpu(1)]
    assert indices(placed(Request(1, None, GIB), two, busy)) == [1]
    # both are wanted by one who came before: the idle one is kept
    waiting = [Request(2, exclusive=True)]
    refused = placed(Request(1, None, GIB), two, busy, waiting)
    assert refused.refusal
    assert not refused.never
    assert any("waited longer" in obstacle for obstacle in refused.obstacles)
    # what those before do not need is free
    assert indices(placed(Request(1, None, GIB), [*two, gpu(2)], busy, waiting)) == []
    assert indices(placed(Request(1, None, GIB), [*two, gpu(2), gpu(3)], busy, waiting)) == [3]


def test_who_waits_for_something_else_keeps_nobody_waiting() -> None:
    machine = [gpu(0), gpu(1, name="NVIDIA H100", total_gib=80)]
    busy = [lease("a" * 16, 1, exclusive=True)]
    assert indices(placed(Request(1, "4090", GIB), machine, busy, [Request(1, "H100")])) == [0]
    assert indices(placed(Request(1, "4090", GIB), machine, busy, [Request(1, "B200")])) == [0]
    assert indices(placed(Request(1, "4090", GIB), machine, busy, [Request(ports=1)])) == [0]


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    """One GPU at a time becomes free, and small requests keep coming: the large one gets all that it needs."""
    machine = [gpu(index) for index in range(3)]
    large = Request(3, exclusive=True)
    held = {index: lease(f"{index:016x}", index, exclusive=True) for index in range(3)}
    for index in (2, 0, 1):
        del held[index]
        small = placed(Request(1, None, GIB), machine, list(held.values()), [large])
        assert small.shares == ()
    assert indices(placed(large, machine)) == [0, 1, 2]


def test_no_request_for_gpus_needs_no_gpu() -> None:
    assert placed(Request(ports=2), []) == Placement()
    assert placed(Request(1), []).never


def test_within_a_lease_its_gpus_are_leased_in_parts_and_no_others() -> None:
    outer = lease("a" * 16, 0, 1, exclusive=True)
    inventory = Inventory("1", (gpu(0), gpu(1), gpu(2)))

    def place_within(request: Request, *inner: Entry) -> Placement:
        leases = [outer, *inner]
        return place(request, units_of(inventory, leases, Owners(leases, NOWHERE), outer))

    assert indices(place_within(Request(2, exclusive=True))) == [0, 1]
    assert place_within(Request(3)).never
    taken = lease("b" * 16, 0, exclusive=True, within="a" * 16)
    assert indices(place_within(Request(1, exclusive=True), taken)) == [1]
    assert place_within(Request(2, exclusive=True), taken).refusal
    # and for everybody else a part counts once
    half, part = lease("a" * 16, 0, gib=12), lease("b" * 16, 0, gib=12, within="a" * 16)
    assert indices(placed(Request(1, None, 12 * GIB), [gpu(0)], [half, part])) == [0]
    orphaned_part = [dataclasses.replace(half, held=False), part]
    assert indices(placed(Request(1, None, 24 * GIB), [gpu(0)], orphaned_part)) == []
    stolen = dataclasses.replace(part, uid=1001)  # another user's record that names our lease hides nothing
    assert indices(placed(Request(1, None, 12 * GIB), [gpu(0)], [half, stolen])) == []


def test_instances_of_one_gpu_are_leased_apart() -> None:
    parts = tuple(MigInstance(f"GPU-{number}", 20 * GIB, 0) for number in (10, 11))
    split = [gpu(0, 0.1, 80, "NVIDIA A100", mig=parts)]
    first = placed(Request(1, "A100", 15 * GIB), split)
    second = placed(Request(1, "A100", 15 * GIB), split, [lease("a" * 16, 10, gib=15)])
    assert (indices(first), indices(second)) == ([10], [11])
    both = [lease("a" * 16, 10, gib=15), lease("b" * 16, 11, gib=15)]
    assert placed(Request(1, "A100", 15 * GIB), split, both).refusal


def test_a_request_survives_writing_and_reading_and_strangers_texts_do_not() -> None:
    request = Request(2, "4090", GIB, True, 1, None, "vcu128-0")
    assert Request.from_dict(request.to_dict()) == request
    for text in ({"gpus": "many"}, {"gpus": -1}, {"colour": "red"}, {"min_free_bytes": None}, {"gpus": 1.5}):
        assert Request.from_dict(text) is None
