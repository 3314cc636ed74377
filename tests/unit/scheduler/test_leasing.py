"""Leases for GPUs, ports and boards: what is granted, how long it is held, who waits for whom."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetool.errors import ResourceUnavailable
from edgetool.process.tree import LEASE_VARIABLE
from edgetool.progress import RecordingProgress
from edgetool.scheduler import leasing as module
from edgetool.scheduler.inventory import Inventory, read_recorded
from edgetool.scheduler.lease_records import LEASE_FDS_VARIABLE
from edgetool.scheduler.lease_watch import LeaseWatch
from edgetool.scheduler.leasing import Lease, Request, Scheduler
from edgetool.scheduler.ports import Trouble, candidates, ephemeral_range, listener, trouble
from tests.fakes.other_user import NOBODY, as_root, in_a_child
from tests.fakes.started import started
from tests.fakes.worker_ports import worker_ports

RECORDED_PATH = Path(__file__).parents[2] / "fakes" / "nvml_eight_gpus.json"
RECORDED = read_recorded(RECORDED_PATH)
UNPRIVILEGED_START = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
GIB = 2**30
BIG = Request(1, "4090", 22 * GIB)  # two of the recorded GPUs have room for it
Make = Callable[..., Scheduler]
PORTS = worker_ports(28_000, 100, 10)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def scheduler(
        inventory: Inventory = RECORDED, port_range: tuple[int, int] = PORTS, within: str | None = None
    ) -> Scheduler:
        return Scheduler(tmp_path / "leases", lambda: inventory, port_range=port_range, within=within)

    return scheduler


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()


def refused(scheduler: Scheduler, request: Request, **options: object) -> str:
    with pytest.raises(ResourceUnavailable) as caught:
        scheduler.acquire(request, command="another", **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value.message


def eventually(condition: Callable[[], bool], limit_s: float = 60) -> bool:
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_what_is_granted_is_gone_for_others_until_it_is_released(make: Make) -> None:
    first = make().acquire(BIG, command="python train.py")
    second = make().acquire(BIG, command="python train.py")
    assert {*first.gpu_uuids, *second.gpu_uuids} == {RECORDED.gpus[0].uuid, RECORDED.gpus[1].uuid}
    message = refused(make(), BIG)
    for part in (first.id, second.id, "python train.py", str(os.getpid()), "22.0 GiB"):
        assert part in message
    assert first.release()
    with make().acquire(BIG, command="third") as third:
        assert third.gpu_uuids == first.gpu_uuids
    assert second.release()
    assert list(make().directory.path.iterdir()) == []


def test_releasing_twice_is_releasing_once(make: Make) -> None:
    lease = make().acquire(BIG, command="x")
    assert lease.release()
    assert lease.release()
    assert lease.fds == ()


def test_children_are_told_their_gpus_by_uuid_and_the_lease(make: Make) -> None:
    with make().acquire(Request(2, "4090", GIB, ports=2), command="x") as lease:
        environment = lease.environment()
        assert environment["CUDA_VISIBLE_DEVICES"] == ",".join(lease.gpu_uuids)
        assert all(uuid.startswith("GPU-") for uuid in lease.gpu_uuids)
        assert environment[LEASE_VARIABLE] == lease.id
        assert environment[LEASE_FDS_VARIABLE] == str(lease.fds[0])
        assert environment["EDGETOOL_PORTS"] == ",".join(str(port) for port in lease.ports)
        assert environment["EDGETOOL_LOCK_DIR"] == str(make().directory.path)
    with make().acquire(Request(ports=1), command="x") as lease:
        assert lease.environment()["CUDA_VISIBLE_DEVICES"] == ""  # a CPU job sees no GPU


def test_a_lease_lasts_as_long_as_the_last_process_that_inherited_it(
    make: Make, children: list[subprocess.Popen[bytes]]
) -> None:
    """The facts of naive flocks: its owner killed, children by exec and by fork go on."""
    script = (
        "import sys, os, subprocess, time\n"
        "from pathlib import Path\n"
        "from edgetool.scheduler.inventory import read_recorded\n"
        "from edgetool.scheduler.leasing import Request, Scheduler\n"
        f"recorded = read_recorded(Path({str(RECORDED_PATH)!r}))\n"
        f"lease = Scheduler(Path({str(make().directory.path)!r}), lambda: recorded).acquire(\n"
        "    Request(1, 'H100', 40 << 30), command='serve')\n"
        "forked = os.fork()\n"
        "if forked == 0: time.sleep(600)\n"
        "child = subprocess.Popen(['sleep', '600'], pass_fds=lease.fds, env={**os.environ, **lease.environment()})\n"
        "print(forked, child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    forked, executed = (int(pid) for pid in owner.stdout.readline().split())
    request = Request(1, "H100", 40 * GIB)
    assert not make().look().held[0].orphaned
    owner.kill()
    owner.wait()
    assert "orphaned" in refused(make(), request)
    os.kill(forked, signal.SIGKILL)
    assert "orphaned" in refused(make(), request)
    os.kill(executed, signal.SIGKILL)
    with make().acquire(request, command="next", wait_s=120) as lease:
        assert lease.gpu_uuids == (RECORDED.gpus[4].uuid,)


def test_releasing_while_a_child_goes_on_leaves_the_lease_with_the_child(
    make: Make, children: list[subprocess.Popen[bytes]]
) -> None:
    lease = make().acquire(Request(1, "H100", 40 * GIB), command="serve")
    children.append(started(["sleep", "600"], pass_fds=lease.fds, env={**os.environ, **lease.environment()}))
    assert not lease.release()
    (entry,) = make().look().held
    assert entry.orphaned
    assert "orphaned" in refused(make(), Request(1, "H100", 40 * GIB))
    children[0].kill()
    children[0].wait()
    assert lease.release()


def test_a_fork_that_ends_does_not_give_back_what_its_parent_holds(make: Make) -> None:
    lease = make().acquire(BIG, command="x")
    child = os.fork()
    if child == 0:
        lease.release()
        os._exit(0)
    os.waitpid(child, 0)
    (entry,) = make().look().held
    assert not entry.orphaned
    assert lease.release()


def test_a_number_that_belongs_to_another_process_now_is_not_the_owner(make: Make) -> None:
    """PID reuse: the process with the owner's number started at another time."""
    lease = make().acquire(BIG, command="x")
    record = dataclasses.replace(lease._record, start_ticks=lease._record.start_ticks - 1)
    module.write_record(lease.fds[0], record)
    assert make().look().held[0].orphaned
    lease.release()


def test_memory_can_be_shared_up_to_what_is_free(make: Make) -> None:
    """On the H100 63.2 GiB are free: three leases of 20 GiB, not four."""
    third = Request(1, "H100", 20 * GIB)
    held = [make().acquire(third, command="x") for _ in range(3)]
    assert "60.0 GiB" not in refused(make(), third)
    gpu = make().snapshot()["gpus"][4]
    assert gpu["memory_reserved_bytes"] == 60 * GIB
    assert gpu["memory_free_bytes"] == gpu["memory_total_bytes"] - (16 + 60) * GIB  # a stranger's process has 16
    for lease in held:
        lease.release()


def test_an_inventory_is_read_before_every_grant(make: Make, tmp_path: Path) -> None:
    busy = dataclasses.replace(RECORDED.gpus[4], memory_used_bytes=RECORDED.gpus[4].memory_total_bytes)
    seen = [dataclasses.replace(RECORDED, gpus=(busy,)), dataclasses.replace(RECORDED, gpus=(RECORDED.gpus[4],))]
    scheduler = Scheduler(tmp_path / "leases", lambda: seen.pop(0))
    refused(scheduler, Request(1, "H100", GIB))
    scheduler.acquire(Request(1, "H100", GIB), command="x").release()


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request(1, "5090"), "6 x 4090"),
        (Request(1, "4090", 25 * GIB), "24.0 GiB in all"),
        (Request(5, "4090", GIB), "ECC"),
        (Request(port=1, gpus=1, gpu_class="5090"), "5090"),
        (Request(ports=20_000), "20000 ports wanted"),
    ],
)
def test_what_this_machine_can_never_give_is_refused_at_once(make: Make, request_: Request, why: str) -> None:
    with pytest.raises(ResourceUnavailable, match=why):
        make(port_range=(20_000, 20_003)).acquire(request_, command="x", wait_s=3600)
    assert list(make().directory.path.iterdir()) == []


def test_without_a_driver_ports_and_boards_are_leased_and_gpus_are_not(make: Make) -> None:
    none = Inventory()
    with pytest.raises(ResourceUnavailable, match="no NVIDIA driver"):
        make(none).acquire(Request(1), command="x", wait_s=3600)
    with make(none).acquire(Request(ports=1, board="vcu128-0"), command="x") as lease:
        assert len(lease.ports) == 1
        snapshot = make(none).snapshot()
        assert snapshot["driver_version"] is None
        assert snapshot["gpus"] == []
        assert [port["port"] for port in snapshot["ports"]] == list(lease.ports)
        assert [board["board"] for board in snapshot["boards"]] == ["vcu128-0"]
        assert "board vcu128-0 is leased by" in refused(make(none), Request(board="vcu128-0"))
        make(none).acquire(Request(board="vcu128-1"), command="x").release()


# ports


def test_ports_lie_outside_the_ephemeral_range_and_are_different(make: Make) -> None:
    low, high = ephemeral_range()
    with make().acquire(Request(ports=20), command="a") as one, make().acquire(Request(ports=20), command="b") as other:
        ports = {*one.ports, *other.ports}
        assert len(ports) == 40
        assert all(not low <= port <= high for port in ports)


def test_where_all_candidates_are_ephemeral_they_are_taken_all_the_same() -> None:
    low, high = ephemeral_range()
    assert list(candidates(low, low + 2, {low + 1})) == [low, low + 2]
    assert list(candidates(low - 2, low + 2, ())) == [low - 2, low - 1]
    assert list(candidates(high, high + 1, ())) == [high + 1]


@pytest.fixture
def free_port() -> int:
    first, last = worker_ports(29_000, 100, 10)
    return next(port for port in range(first, last + 1) if trouble(port) is None)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_on_which_a_stranger_listens_is_not_granted(
    make: Make, free_port: int, family: socket.AddressFamily, reuse: bool
) -> None:
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        server.bind(("127.0.0.1" if family == socket.AF_INET else "::1", free_port))
        server.listen()
        assert "in use: a process of" in refused(make(), Request(port=free_port))
        assert listener(free_port)
        with make(port_range=(free_port, free_port + 20)).acquire(Request(ports=1), command="x") as lease:
            assert free_port not in lease.ports
    make().acquire(Request(port=free_port), command="x").release()


def test_a_leased_port_is_refused_also_before_anybody_listens(make: Make, free_port: int) -> None:
    with make().acquire(Request(port=free_port), command="serve") as lease:
        assert lease.ports == (free_port,)
        assert f"port {free_port} is leased by" in refused(make(), Request(port=free_port))


def test_a_port_stays_taken_as_long_as_somebody_listens_on_it_lease_or_not(
    make: Make, free_port: int, children: list[subprocess.Popen[bytes]]
) -> None:
    lease = make().acquire(Request(port=free_port), command="serve")
    script = (
        f"import socket,time; s=socket.create_server(('127.0.0.1',{free_port})); print(1,flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)  # without the lease's descriptor
    children.append(child)
    assert child.stdout
    child.stdout.readline()
    assert make().snapshot()["ports"][0]["listening"] is True
    assert lease.release()
    assert "in use" in refused(make(), Request(port=free_port))
    child.kill()
    make().acquire(Request(port=free_port), command="next", wait_s=120).release()


def test_a_server_may_start_again_while_connections_of_the_last_one_are_being_closed(
    make: Make, free_port: int
) -> None:
    with socket.create_server(("127.0.0.1", free_port)) as server:
        client = socket.create_connection(("127.0.0.1", free_port))
        server.accept()[0].close()  # the side that closes first keeps TIME_WAIT
        client.close()
    assert trouble(free_port) is not None
    make().acquire(Request(port=free_port), command="again").release()


@as_root
@pytest.mark.skipif(not UNPRIVILEGED_START.exists() or int(UNPRIVILEGED_START.read_text()) < 2, reason="no such ports")
def test_a_port_for_privileged_users_is_refused_at_once() -> None:
    assert in_a_child(lambda: trouble(1), NOBODY) == repr(Trouble("port 1 is for privileged users only", lasting=True))


# waiting


class Waiter(threading.Thread):
    """Waits in a thread of its own; every acquire has its own file descriptions, as another process has."""

    def __init__(self, scheduler: Scheduler, request: Request, wait_s: float = 120) -> None:
        super().__init__(daemon=True)
        self.scheduler, self.request, self.wait_s = scheduler, request, wait_s
        self.progress = RecordingProgress()
        self.lease: Lease | None = None
        self.error: ResourceUnavailable | None = None
        waiting = len(scheduler.directory.scan().waiting)
        self.start()
        assert eventually(lambda: len(scheduler.directory.scan().waiting) > waiting or self.lease is not None)

    def run(self) -> None:
        try:
            self.lease = self.scheduler.acquire(
                self.request, command="waiter", wait_s=self.wait_s, progress=self.progress
            )
        except ResourceUnavailable as error:
            self.error = error


H100 = Request(1, "H100", 60 * GIB)


def test_who_came_first_gets_it_first(make: Make) -> None:
    lease = make().acquire(H100, command="x")
    waiters = [Waiter(make(), H100) for _ in range(4)]
    for position, waiter in enumerate(waiters):
        lease.release()
        waiter.join(timeout=120)
        assert waiter.lease is not None
        assert [later.lease for later in waiters[position + 1 :]] == [None] * (3 - position)
        lease = waiter.lease
    lease.release()
    assert list(make().directory.path.iterdir()) == []


def test_who_does_not_wait_overtakes_nobody_who_does(make: Make) -> None:
    lease = make().acquire(H100, command="x")
    waiter = Waiter(make(), H100)
    lease.release()
    with pytest.raises(ResourceUnavailable, match=r"waited longer|leased by"):
        make().acquire(H100, command="in a hurry")
    make().acquire(BIG, command="something else").release()
    waiter.join(timeout=120)
    assert waiter.lease
    waiter.lease.release()


def test_boards_and_ports_are_given_in_turn_too(make: Make, free_port: int) -> None:
    for request in (Request(board="vcu128-0"), Request(port=free_port)):
        lease = make().acquire(request, command="x")
        waiter = Waiter(make(), request)
        lease.release()
        with pytest.raises(ResourceUnavailable, match=r"waited longer|leased by"):
            make().acquire(request, command="in a hurry")
        waiter.join(timeout=120)
        assert waiter.lease
        waiter.lease.release()


def test_one_who_waits_and_is_killed_keeps_nobody_waiting(make: Make) -> None:
    lease = make().acquire(H100, command="x")
    script = (
        "from pathlib import Path\n"
        "from edgetool.scheduler.inventory import read_recorded\n"
        "from edgetool.scheduler.leasing import Request, Scheduler\n"
        f"recorded = read_recorded(Path({str(RECORDED_PATH)!r}))\n"
        f"Scheduler(Path({str(make().directory.path)!r}), lambda: recorded).acquire(\n"
        "    Request(1, 'H100', 60 << 30), command='x', wait_s=600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script])
    assert eventually(lambda: len(make().directory.scan().waiting) == 1)
    second = Waiter(make(), H100)
    first.kill()
    first.wait()
    lease.release()
    second.join(timeout=120)
    assert second.lease
    second.lease.release()


def test_one_who_waits_and_is_stopped_is_passed_by_until_it_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z while it waits must not keep GPUs idle for hours."""
    lease = make().acquire(H100, command="x")
    stopped, goes_on = threading.Event(), threading.Event()
    watch = LeaseWatch.wait

    def stop(self: LeaseWatch, longest_s: float) -> None:
        stopped.set()
        goes_on.wait()
        watch(self, longest_s)

    monkeypatch.setattr(LeaseWatch, "wait", stop)
    waiter = Waiter(make(), H100)
    assert stopped.wait(60)
    (ticket,) = make().directory.path.glob("wait-*")
    lease.release()
    refused(make(), H100)  # it waits, as far as anybody can see
    os.utime(ticket, (time.time(), time.time() - module._SILENT_S - 1))
    second = make().acquire(H100, command="in a hurry")
    goes_on.set()
    assert eventually(lambda: time.time() - ticket.stat().st_mtime < 10)
    second.release()
    waiter.join(timeout=120)
    assert waiter.lease
    waiter.lease.release()


def test_a_lease_stays_readable_however_often_its_server_starts_again(make: Make) -> None:
    lease = make().acquire(BIG, command="x" * 1000)
    for _ in range(300):
        lease.adopt(os.getpid())
    (entry,) = make().look().held
    assert len(entry.record.members) == 64
    lease.release()


def test_waiting_has_an_end_and_says_who_held_it(make: Make) -> None:
    lease = make().acquire(H100, command="python serve.py")
    message = refused(make(), H100, wait_s=0.2)
    assert "python serve.py" in message
    assert "waited 0.2 s" in message
    assert [path.name for path in make().directory.path.iterdir()] == [f"lease-{lease.id}.json"]
    lease.release()


def test_while_it_waits_it_says_for_what_and_who_holds_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """Time passes only where it is waited."""

        def __init__(self) -> None:
            self.now_s = 1000.0

        def wait(self, _watch: LeaseWatch, longest_s: float) -> None:
            self.now_s += longest_s

    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s, time=time.time))
    monkeypatch.setattr(LeaseWatch, "wait", lambda watch, longest_s: clock.wait(watch, longest_s))
    lease = make().acquire(H100, command="python serve.py")
    progress = RecordingProgress()
    refused(make(), H100, wait_s=60, progress=progress)
    notes = [text for kind, text, _ in progress.events if kind == "note"]
    assert [note.split(" of ")[0] for note in notes] == [f"waiting for {10 * n}" for n in range(6)]
    for part in ("waiting for", "H100", "python serve.py", lease.id):
        assert all(part in note for note in notes)
    lease.release()


def test_an_interrupted_wait_gives_up_its_place(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = make().acquire(H100, command="x")

    def interrupted(_watch: LeaseWatch, _longest_s: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LeaseWatch, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make().acquire(H100, command="x", wait_s=600)
    assert make().directory.scan().waiting == ()
    lease.release()


# leases within leases


def test_a_command_under_a_lease_leases_parts_of_it(make: Make, free_port: int) -> None:
    with make().acquire(Request(2, "4090", 22 * GIB, port=free_port), command="gpus run") as outer:
        within = outer.environment()[LEASE_VARIABLE]
        with make(within=within).acquire(Request(1, "4090", 20 * GIB, port=free_port), command="serve-gpu") as inner:
            assert inner.gpu_uuids[0] in outer.gpu_uuids
            assert inner.environment()[LEASE_VARIABLE] == f"{outer.id}:{inner.id}"
            assert inner.ports == (free_port,)
            with make(within=within).acquire(Request(1, "4090", 20 * GIB), command="serve-gpu") as second:
                assert {*inner.gpu_uuids, *second.gpu_uuids} == {*outer.gpu_uuids}
                refused(make(within=within), Request(1, "4090", 20 * GIB))
            assert make().snapshot()["gpus"][0]["memory_reserved_bytes"] == 22 * GIB
        refused(make(), Request(1, "4090", 20 * GIB))
    # a variable that survived its lease means nothing
    make(within=within).acquire(H100, command="x").release()
    make(within="no:lease:at all").acquire(H100, command="x").release()


def test_who_waits_is_woken_by_the_end_of_a_lease_and_by_the_death_of_its_holder(tmp_path: Path) -> None:
    """By the kernel's word, and not by looking again and again: the wait is a minute, and no test takes that long."""
    for end in ("release", "death"):
        watch = LeaseWatch(tmp_path)
        path = tmp_path / "lease"
        holder = subprocess.Popen(
            [sys.executable, "-c", f"f=open({str(path)!r},'w'); print(1,flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout and holder.stdin
        holder.stdout.readline()
        with path.open():  # who only looks wakes nobody
            pass
        threading.Timer(0.2, holder.kill if end == "death" else holder.stdin.close).start()
        begun_s = time.monotonic()
        watch.wait(60)
        assert time.monotonic() - begun_s < 50
        holder.wait()
        watch.close()
        watch.close()


def test_without_a_watch_waiting_is_sleeping(tmp_path: Path) -> None:
    watch = LeaseWatch(tmp_path / "not there")
    watch.wait(0.01)
    watch.close()
