"""Whose a process is, and which processes are ended: real ones, with a driver that is played."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgetool.errors import VerificationFailed
from edgetool.process.tree import LEASE_VARIABLE, entry, identify
from edgetool.progress import RecordingProgress
from edgetool.scheduler import reaping
from edgetool.scheduler.inventory import Gpu, GpuProcess, Inventory
from edgetool.scheduler.leasing import Lease, Request, Scheduler
from edgetool.scheduler.ownership import orphans
from edgetool.scheduler.reaping import reap
from tests.fakes.other_user import NOBODY, as_root, become, in_a_child
from tests.fakes.started import started

GIB = 2**30


class Driver:
    """Shows the processes that it was told to be on GPU 0, for as long as they live."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.slow: list[int] = []

    def __call__(self) -> Inventory:
        shown = [pid for pid in self.pids if identify(pid) or pid in self.slow]
        processes = tuple(GpuProcess(pid, "root", "python", GIB) for pid in shown)
        return Inventory("1", (Gpu(0, "GPU-0", "NVIDIA L4", "L4", 24 * GIB, len(shown) * GIB, processes=processes),))


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def scheduler(tmp_path: Path, driver: Driver) -> Scheduler:
    return Scheduler(tmp_path / "leases", driver)


@pytest.fixture
def start() -> Iterator[Callable[..., int]]:
    """Starts `sleep` under a lease, or under none, and ends what is left of them."""
    running: list[subprocess.Popen[bytes]] = []

    def sleep(lease: Lease | None = None, *, inherit: bool = True, environment: bool = True, **more: object) -> int:
        env = dict(os.environ)
        if lease and environment:
            env |= lease.environment()
        fds = lease.fds if lease and inherit else ()
        running.append(started(["sleep", "600"], pass_fds=fds, env=env, **more))
        return running[-1].pid

    yield sleep
    for process in running:
        process.kill()
        process.wait()


def lost_owner(
    scheduler: Scheduler, request: Request, command: list[str], keep: str = "all", **more: object
) -> tuple[int, int]:
    """A lease whose owner was killed while its child lives: numbers of the owner and of the child."""
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        signal.alarm(120)
        try:
            os.setsid()
            lease = scheduler.acquire(request, command="serve")
            env = {**os.environ, **(lease.environment() if keep != "descriptor" else {})}
            fds = lease.fds if keep != "environment" else ()
            child = started(command, pass_fds=fds, env=env, **more)
            os.write(writing, f"{child.pid}".encode())
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        child = int(os.read(stream.fileno(), 16))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    return owner, child


def classes(scheduler: Scheduler) -> dict[int, str]:
    return {process["pid"]: process["class"] for process in scheduler.snapshot()["gpus"][0]["processes"]}


ONE = Request(1, min_free_bytes=4 * GIB)


def test_processes_on_a_gpu_are_leased_orphaned_or_foreign(
    scheduler: Scheduler, driver: Driver, start: Callable[..., int]
) -> None:
    lease = scheduler.acquire(ONE, command="x")
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    leased, foreign = start(lease), start()
    stray = start(lease, inherit=False)
    elsewhere = Scheduler(scheduler.directory.path.with_name("other"), driver).acquire(ONE, command="x")
    theirs = start(elsewhere)
    try:
        unseen = 2**22 + 1  # in a container, say: the driver knows it and /proc does not
        driver.pids, driver.slow = [leased, foreign, orphan, stray, theirs, unseen], [unseen]
        seen = classes(scheduler)
        assert (seen[leased], seen[stray], seen[orphan], seen[unseen]) == ("leased", "leased", "orphan", "foreign")
        # whoever is below the owner of a lease works under it, and all of these are below this process
        assert seen[foreign] == "leased"
        lease.release()  # and `leased` goes on
        seen = classes(scheduler)
        assert (seen[leased], seen[stray], seen[orphan]) == ("orphan", "orphan", "orphan")
        assert (seen[foreign], seen[theirs]) == ("foreign", "foreign")
    finally:
        os.kill(orphan, signal.SIGKILL)
        elsewhere.release()


def test_memory_of_an_orphan_stays_reserved_and_is_not_counted_twice(scheduler: Scheduler, driver: Driver) -> None:
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    driver.pids = [orphan]
    gpu = scheduler.snapshot()["gpus"][0]
    assert gpu["memory_reserved_bytes"] == 4 * GIB
    assert gpu["memory_free_bytes"] == 20 * GIB
    os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("keep", ["all", "environment", "descriptor"])
def test_orphans_are_found_by_environment_or_by_descriptor_and_ended(
    scheduler: Scheduler, driver: Driver, keep: str
) -> None:
    """`multiprocessing` with spawn loses the descriptor; a program may clean its environment."""
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"], keep)
    driver.pids = [orphan]
    result = reap(scheduler.directory, driver)
    assert [item["pid"] for item in result["reaped"]] == [orphan]
    assert result["reaped"][0]["used_memory_bytes"] == result["memory_freed_bytes"] == GIB
    assert result["memory_verified"] is True
    assert identify(orphan) is None
    assert list(scheduler.directory.path.iterdir()) == []
    assert reap(scheduler.directory, driver)["reaped"] == []


def test_an_orphan_that_ignores_the_request_is_killed(scheduler: Scheduler, driver: Driver) -> None:
    script = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf','w').close(); time.sleep(600)"
    )
    deaf = scheduler.directory.path.with_name("deaf")
    code = script.replace("'deaf'", repr(str(deaf)))
    _, orphan = lost_owner(scheduler, ONE, [sys.executable, "-c", code])
    while not deaf.exists():
        time.sleep(0.01)
    (item,) = reap(scheduler.directory, driver, grace_s=0.3)["reaped"]
    assert (item["pid"], item["killed"]) == (orphan, True)


def test_whole_trees_are_ended_also_what_they_start_meanwhile(scheduler: Scheduler, driver: Driver) -> None:
    script = "trap '' TERM; while :; do sleep 600 & sleep 0.02; done"
    _, orphan = lost_owner(scheduler, ONE, ["sh", "-c", script], start_new_session=True)
    until = time.monotonic() + 60
    while len(orphans(scheduler.directory.scan().leases, scheduler.directory.path, os.geteuid())) < 6:
        assert time.monotonic() < until
        time.sleep(0.01)
    result = reap(scheduler.directory, driver, grace_s=0.1)
    assert orphan in [item["pid"] for item in result["reaped"]]
    assert len(result["reaped"]) > 3
    assert all(identify(item["pid"]) is None for item in result["reaped"])


def test_nothing_but_orphans_of_leases_is_ended(
    scheduler: Scheduler, driver: Driver, start: Callable[..., int]
) -> None:
    lease = scheduler.acquire(ONE, command="x")
    elsewhere = Scheduler(scheduler.directory.path.with_name("other"), driver).acquire(ONE, command="x")
    safe = [start(), start(lease), start(lease, inherit=False), start(elsewhere), start(elsewhere, inherit=False)]
    # texts that look like a lease and are none
    for text in ("0123456789abcdef", "", "no lease", lease.id + "0", ":"):
        env = {"EDGETOOL_LOCK_DIR": "/somewhere/else", LEASE_VARIABLE: text}
        safe.append(started(["sleep", "600"], env=env).pid)
    driver.pids = safe
    assert elsewhere.release() is False
    result = reap(scheduler.directory, driver, grace_s=0)
    assert result["reaped"] == []
    assert all(identify(pid) for pid in safe)
    lease.release()
    for pid in safe[-5:]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@as_root
def test_processes_of_other_users_are_never_ended_and_others_cannot_pass_for_ours(
    scheduler: Scheduler, driver: Driver
) -> None:
    """Root could. A lease of root is lost, and a process of another user claims to work under it."""
    scheduler.directory.path.parent.chmod(0o755)
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    (entry,) = scheduler.look().held

    def pretend() -> int:
        env = {LEASE_VARIABLE: entry.record.id, "EDGETOOL_LOCK_DIR": str(scheduler.directory.path)}
        return started(["sleep", "600"], env=env).pid

    pretender = int(in_a_child(pretend, NOBODY))
    driver.pids = [orphan, pretender]
    assert classes(scheduler) == {orphan: "orphan", pretender: "foreign"}
    result = reap(scheduler.directory, driver, grace_s=0)
    assert [item["pid"] for item in result["reaped"]] == [orphan]
    assert identify(pretender)
    os.kill(pretender, signal.SIGKILL)


def _above(pid: int) -> list[int]:
    found = [pid]
    while this := entry(found[-1]):
        found.append(this.parent)
    return found


@pytest.fixture
def open_scheduler(driver: Driver) -> Iterator[Scheduler]:
    """In a directory that other users can enter."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Scheduler(Path(made) / "leases", driver)


@as_root
def test_other_users_see_which_processes_are_leased_without_reading_environments(
    open_scheduler: Scheduler, driver: Driver
) -> None:
    """By their parents, and when those have ended by the sessions that the lease has named."""
    with open_scheduler.acquire(ONE, command="x") as lease:
        leader = subprocess.Popen(
            ["sh", "-c", "(sh -c 'sleep 600 & echo $!'); exec sleep 600"],
            pass_fds=lease.fds,
            env={**os.environ, **lease.environment()},
            start_new_session=True,
            stdout=subprocess.PIPE,
        )
        assert leader.stdout
        left_alone = int(leader.stdout.readline())
        driver.pids = [leader.pid, left_alone]
        until = time.monotonic() + 60
        while leader.pid in _above(left_alone) and time.monotonic() < until:  # its parent is just ending
            time.sleep(0.01)
        seen = in_a_child(lambda: classes(open_scheduler), NOBODY)
        assert seen == repr({leader.pid: "leased", left_alone: "foreign"})
        lease.adopt(leader.pid)
        seen = in_a_child(lambda: classes(open_scheduler), NOBODY)
        assert seen == repr({leader.pid: "leased", left_alone: "leased"})
        assert classes(open_scheduler) == {leader.pid: "leased", left_alone: "leased"}
        leader.kill()
        leader.wait()
        assert in_a_child(lambda: classes(open_scheduler), NOBODY) == repr({left_alone: "leased"})
        os.kill(left_alone, signal.SIGKILL)


@as_root
def test_each_user_reaps_for_himself(open_scheduler: Scheduler, driver: Driver) -> None:
    _, ours = lost_owner(open_scheduler, Request(board="a"), ["sleep", "600"])
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        signal.alarm(120)
        become(NOBODY)
        os.write(writing, str(lost_owner(open_scheduler, Request(board="b"), ["sleep", "600"])[1]).encode())
        os._exit(0)
    os.close(writing)
    theirs = int(os.read(reading, 16))
    os.close(reading)
    os.waitpid(middle, 0)
    assert [item["pid"] for item in reap(open_scheduler.directory, driver, grace_s=0)["reaped"]] == [ours]
    assert identify(theirs)
    answer = in_a_child(lambda: [i["pid"] for i in reap(open_scheduler.directory, driver, grace_s=0)["reaped"]], NOBODY)
    assert answer == repr([theirs])


def test_a_dry_run_says_what_it_would_end_and_ends_nothing(scheduler: Scheduler, driver: Driver) -> None:
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    result = reap(scheduler.directory, driver, dry_run=True)
    assert [item["pid"] for item in result["plan"]["reaped"]] == [orphan]
    assert identify(orphan)
    os.kill(orphan, signal.SIGKILL)


def test_who_runs_below_an_orphan_spares_it(scheduler: Scheduler, driver: Driver) -> None:
    """`edgetool gpus reap` typed into a shell that is itself an orphan."""
    result = scheduler.directory.path.with_name("result")
    script = (
        "import time\nfrom pathlib import Path\nfrom edgetool.scheduler.inventory import Inventory\n"
        "from edgetool.scheduler.leases import LeaseDirectory\nfrom edgetool.scheduler.reaping import reap\n"
        f"where = LeaseDirectory(Path({str(scheduler.directory.path)!r}))\n"
        "while not where.scan().leases[0].orphaned: time.sleep(0.01)\n"
        f"Path({str(result)!r} + '.new').write_text(repr(reap(where, Inventory, grace_s=0)['spared'][0]['pid']))\n"
        f"Path({str(result)!r} + '.new').rename({str(result)!r})\n"
        "time.sleep(600)\n"
    )
    _, orphan = lost_owner(scheduler, ONE, [sys.executable, "-c", script])
    until = time.monotonic() + 60
    while not result.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert int(result.read_text()) == orphan
    progress = RecordingProgress()
    reap(scheduler.directory, driver, grace_s=0, progress=progress)
    assert identify(orphan) is None


def test_memory_that_the_driver_does_not_give_back_is_a_failed_proof(
    scheduler: Scheduler, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaping, "_DRIVER_LIMIT_S", 0.5)
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    driver.pids = driver.slow = [orphan]
    with pytest.raises(VerificationFailed, match=f"NVML still shows memory of pid {orphan} on GPU 0"):
        reap(scheduler.directory, driver, grace_s=0)


def test_memory_that_comes_back_late_is_waited_for(scheduler: Scheduler, driver: Driver) -> None:
    _, orphan = lost_owner(scheduler, ONE, ["sleep", "600"])
    driver.pids, driver.slow = [orphan], [orphan]
    looks = [0]

    def late() -> Inventory:
        looks[0] += 1
        if looks[0] > 3:
            driver.slow = []
        return driver()

    assert reap(scheduler.directory, late, grace_s=0)["memory_verified"] is True
    assert looks[0] == 4


def test_a_recorded_machine_proves_nothing_about_memory(scheduler: Scheduler) -> None:
    _, orphan = lost_owner(scheduler, Request(board="simulator"), ["sleep", "600"])
    result = reap(scheduler.directory, lambda: Inventory("1", recorded=True), grace_s=0)
    assert result["memory_verified"] is None
    assert result["leases_freed"]
    assert identify(orphan) is None
