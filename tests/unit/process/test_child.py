"""Supervised trees end as a whole, whoever of them is killed. All processes here are real."""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetool.errors import BackendFailed, BadInput, MissingDependency
from edgetool.process.child import Child, LogRules, Restarts
from edgetool.process.log import older
from edgetool.process.tree import TREE_VARIABLE, alive, carriers, descendants, identify, reap
from tests.fakes.supervisor import FAMILY

SUPERVISOR = FAMILY.with_name("supervisor.py")
ENOUGH_S = 30.0
"""Longer than anything here may take on a busy machine; no test is about speed."""


def wait_until(true: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + ENOUGH_S
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def script(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", text]


def start_family(tmp_path: Path, kind: str, *arguments: Any) -> Child:
    seen: list[str] = []
    child = Child.start([sys.executable, FAMILY, kind, *map(str, arguments)], log=tmp_path / "log")
    child.wait_ready(lambda: "ready" in seen, ENOUGH_S, seen.append)
    return child


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every process of a test, guards too, carries this token, and none may outlive it."""
    token = f"test-{secrets.token_hex(8)}"
    monkeypatch.setenv(TREE_VARIABLE, token)
    yield token
    assert reap(token, grace_s=0.0).seen == ()


@pytest.mark.parametrize(("kind", "processes"), [("plain", 1), ("deep", 4), ("faceless", 4), ("stubborn", 4)])
def test_stop_ends_the_whole_tree_and_proves_it(tmp_path: Path, kind: str, processes: int) -> None:
    child = start_family(tmp_path, kind)
    members = descendants(child._guard.pid)
    assert len(members) == processes
    ended = child.stop(grace_s=1.0 if kind == "stubborn" else ENOUGH_S)
    assert set(ended.seen) == members
    assert ended.left == ()
    assert set(ended.killed) == (members if kind == "stubborn" else set())
    assert ended.returncode == (-signal.SIGKILL if kind == "stubborn" else -signal.SIGTERM)
    assert not any(alive(process) for process in members)
    assert child.stop() == ended


def test_a_tree_that_forks_all_the_time_is_ended(tmp_path: Path) -> None:
    child = start_family(tmp_path, "forking")
    assert child.stop(grace_s=0.5).left == ()
    assert carriers(child.token) == set()


def test_a_stopped_process_is_ended(tmp_path: Path) -> None:
    child = start_family(tmp_path, "plain")
    os.kill(child.pid, signal.SIGSTOP)
    ended = child.stop(ENOUGH_S)
    assert (ended.returncode, ended.killed) == (-signal.SIGTERM, ())


def test_the_main_process_is_asked_first_and_the_others_when_it_is_gone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    ended = start_family(tmp_path, "orderly", mark).stop(ENOUGH_S)
    assert (ended.returncode, ended.killed, mark.read_text()) == (3, (), "main child ")


@pytest.mark.parametrize("killed", ["main", "guard", "nobody"])
def test_shared_memory_of_a_tree_that_is_killed_is_freed(tmp_path: Path, killed: str) -> None:
    child = start_family(tmp_path, "sharing", tmp_path / "name")
    memory = Path("/dev/shm") / (tmp_path / "name").read_text().lstrip("/")
    assert memory.exists()
    if killed != "nobody":
        os.kill(child.pid if killed == "main" else child._guard.pid, signal.SIGKILL)
    assert child.stop(grace_s=0.2).left == ()
    assert not memory.exists()


def test_a_second_stop_shortens_the_grace_of_the_first(tmp_path: Path) -> None:
    child = start_family(tmp_path, "stubborn")
    patient = threading.Thread(target=child.stop, args=(3600.0,))
    patient.start()
    ended = child.stop(0.0)
    patient.join(ENOUGH_S)
    assert not patient.is_alive()
    assert len(ended.killed) == 4


def test_when_the_main_process_is_killed_what_it_leaves_behind_is_ended(tmp_path: Path) -> None:
    child = start_family(tmp_path, "deep")
    members = descendants(child._guard.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(ENOUGH_S) == -signal.SIGKILL
    assert child.ended is not None and child.ended.left == ()
    assert not any(alive(process) for process in members)


def test_when_the_guard_is_killed_a_look_ends_the_rest(tmp_path: Path) -> None:
    child = start_family(tmp_path, "stubborn")
    members = descendants(child._guard.pid)
    os.kill(child._guard.pid, signal.SIGKILL)
    assert child.wait(ENOUGH_S) == -signal.SIGKILL
    assert child.ended is not None
    assert child.ended.guard_lost and child.ended.left == ()
    assert not any(alive(process) for process in members)


def supervise(tmp_path: Path, kind: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, SUPERVISOR, tmp_path / "log", kind], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process, json.loads(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["faceless", "stubborn"])
def test_when_edgetool_is_killed_the_guard_ends_the_tree(tmp_path: Path, kind: str, number: int) -> None:
    supervisor, told = supervise(tmp_path, kind)
    members = descendants(told["guard"]) | {identify(told["guard"])}
    assert len(members) == 5
    supervisor.send_signal(number)
    supervisor.communicate(timeout=ENOUGH_S)
    wait_until(lambda: not any(alive(process) for process in members if process), "something is left")


def test_when_edgetool_and_the_guard_are_killed_reap_finds_the_rest_by_the_token(tmp_path: Path) -> None:
    supervisor, told = supervise(tmp_path, "stubborn")
    members = descendants(told["guard"])
    os.kill(told["guard"], signal.SIGSTOP)  # so that it cannot act between the two
    supervisor.kill()
    os.kill(told["guard"], signal.SIGKILL)
    supervisor.communicate(timeout=ENOUGH_S)
    wait_until(lambda: told["main"] not in {p.pid for p in carriers(told["token"])}, "the main process lives")
    left = carriers(told["token"])
    assert left and left < members
    end = reap(told["token"], grace_s=0.1)
    assert set(end.killed) == left and end.left == ()


def test_edgetool_may_be_killed_at_any_moment_of_a_start(tmp_path: Path, mark: str) -> None:
    draw = random.Random(4)
    for number in range(12):
        log = tmp_path / str(number)
        process = subprocess.Popen([sys.executable, SUPERVISOR, log, "deep"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # its imports are done: what follows is the start
        time.sleep(draw.uniform(0.0, 0.25))
        process.kill()
        process.communicate()
        wait_until(lambda: not carriers(mark), f"something is left of {number}")


@pytest.mark.parametrize(
    ("code", "returned"), [("exit(0)", 0), ("exit(7)", 7), ("import os; os.kill(os.getpid(), 6)", -6)]
)
def test_the_return_code_is_that_of_the_main_process(tmp_path: Path, code: str, returned: int) -> None:
    with Child.start(script(code), log=tmp_path / "log") as child:
        assert child.wait(ENOUGH_S) == returned
        assert child.poll() == returned


def test_waiting_gives_every_line_and_the_unfinished_last_one(tmp_path: Path) -> None:
    seen: list[str] = []
    lines = "import sys; print('one'); sys.stderr.write('50%\\r100%\\n'); sys.stdout.write('end')"
    with Child.start(script(lines), log=tmp_path / "log") as child:
        assert child.wait(ENOUGH_S, seen.append) == 0
    assert seen == ["one", "50%", "100%", "end"]
    assert child.tail(2) == "100%\nend"


def test_a_log_is_limited_in_size_and_read_to_its_end(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", []
    rules = LogRules(limit_bytes=10_000, keep=2)
    with Child.start(script("for n in range(20000): print('line', n)"), log=log, log_rules=rules) as child:
        assert child.wait(ENOUGH_S) == 0
    assert sorted(tmp_path.iterdir()) == [log, older(log, 1), older(log, 2)]
    assert all(path.stat().st_size <= 10_000 + 65_536 for path in tmp_path.iterdir())  # a pipe's content at once
    assert log.read_text().endswith("line 19999\n")
    assert seen == []


def test_a_disk_without_room_for_the_log_does_not_end_the_child(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.symlink_to("/dev/full")
    with Child.start(script("for n in range(20000): print('line', n)"), log=log) as child:
        assert child.wait(ENOUGH_S) == 0


def test_without_a_log_it_writes_where_its_parent_writes(tmp_path: Path) -> None:
    program = (
        "import sys; from edgetool.process.child import Child\n"
        "child = Child.start(['sh', '-c', 'cat; echo out; echo err >&2; exit 4'], log=None, stdin=0)\n"
        "sys.exit(child.wait())"
    )
    done = subprocess.run(script(program), input="in ", capture_output=True, text=True, timeout=ENOUGH_S)
    assert (done.returncode, done.stdout, done.stderr) == (4, "in out\n", "err\n")


def test_ready_is_what_the_check_says(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with Child.start(script(f"import time; open({str(flag)!r}, 'w'); time.sleep(600)"), log=tmp_path / "log") as child:
        assert child.wait_ready(flag.exists, ENOUGH_S) >= 0.0


def test_a_child_that_ends_before_it_is_ready_is_shown_with_its_last_lines(tmp_path: Path) -> None:
    child = Child.start(script("print('no such model'); exit(3)"), log=tmp_path / "log")
    with pytest.raises(BackendFailed, match=r"exit code 3") as failure:
        child.wait_ready(lambda: False, ENOUGH_S)
    assert str(tmp_path / "log") in failure.value.message
    assert failure.value.message.endswith("no such model")


@pytest.mark.parametrize("limit_bytes", [1 << 20, 40])
def test_last_lines_are_of_this_child_and_not_of_an_earlier_one(tmp_path: Path, limit_bytes: int) -> None:
    log = tmp_path / "log"
    with Child.start(script("print('earlier trouble')"), log=log) as child:
        assert child.wait(ENOUGH_S) == 0
    rules = LogRules(limit_bytes=limit_bytes, keep=1)
    child = Child.start(script("print('trouble of my own, and a lot of it'); exit(3)"), log=log, log_rules=rules)
    with pytest.raises(BackendFailed) as failure:
        child.wait_ready(lambda: False, ENOUGH_S)
    assert failure.value.message.endswith("trouble of my own, and a lot of it")
    assert "earlier" not in failure.value.message


def test_a_child_that_is_not_ready_in_time_still_runs(tmp_path: Path) -> None:
    with start_family(tmp_path, "plain") as child:
        with pytest.raises(BackendFailed, match="not ready after"):
            child.wait_ready(lambda: False, 0.0)
        assert child.poll() is None


def test_signals_go_to_the_main_process_alone(tmp_path: Path) -> None:
    child = start_family(tmp_path, "plain")
    child.send_signal(signal.SIGINT)
    assert child.wait(ENOUGH_S) == -signal.SIGINT
    child.send_signal(signal.SIGINT)


def test_a_lock_is_held_until_the_last_of_the_tree_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    held = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    child = Child.start([sys.executable, FAMILY, "deep"], log=tmp_path / "log", pass_fds=[held])
    seen: list[str] = []
    child.wait_ready(lambda: "ready" in seen, ENOUGH_S, seen.append)
    os.close(held)
    with path.open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.stop(ENOUGH_S)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_environment_is_the_given_one_and_the_token(tmp_path: Path, mark: str) -> None:
    with Child.start(["/usr/bin/env"], log=tmp_path / "log", env={"A": "b", "PATH": "/x"}) as child:
        child.wait(ENOUGH_S)
    known = dict(line.split("=", 1) for line in (tmp_path / "log").read_text().splitlines())
    assert known.pop("SPT_NOENV") == "1"
    assert known == {"A": "b", "PATH": "/x", TREE_VARIABLE: f"{mark}:{child.token}"}


def test_nothing_secret_is_on_the_command_line_or_in_the_environment_of_the_guard(tmp_path: Path) -> None:
    environment = {**os.environ, "EDGETOOL_API_KEY": "s3cret", "VLLM_API_KEY": "s3cret"}
    with Child.start(["sleep", "600"], log=tmp_path / "log", env=environment) as child:
        for name in ("cmdline", "environ"):
            assert b"s3cret" not in Path(f"/proc/{child._guard.pid}/{name}").read_bytes()


def test_a_tree_inside_a_tree_belongs_to_both(tmp_path: Path, mark: str) -> None:
    with Child.start(["sleep", "600"], log=tmp_path / "log") as child:
        # exec shows the environment of the new program a moment after it has ended the old one
        wait_until(lambda: child.main in carriers(mark), "its environment is not to be seen")
        assert {p.pid for p in carriers(mark)} == {child.pid, child._guard.pid}
        assert child.tree() == {child.main}


def test_what_cannot_be_started_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="no such program"):
        Child.start(["no-such-program-here"], log=tmp_path / "log")
    with pytest.raises(BadInput, match="not a directory"):
        Child.start(["true"], log=tmp_path / "log", cwd=tmp_path / "absent")
    with pytest.raises(BadInput, match="Permission denied"):
        Child.start([tmp_path / "log"], log=tmp_path / "log")
    with pytest.raises(BadInput, match="cannot write the log"):
        Child.start(["true"], log=tmp_path)
    with pytest.raises(BadInput, match="cannot write the log"):
        Child.start(["true"], log=tmp_path / "log" / "x")


def test_pauses_grow_up_to_a_limit_until_a_backend_is_given_up() -> None:
    restarts = Restarts(limit=5, backoff_s=1.0, backoff_limit_s=6.0)
    assert [restarts.pause_after(0.0) for _ in range(7)] == [1.0, 2.0, 4.0, 6.0, 6.0, None, None]
    assert restarts.count == 5


def test_a_good_stretch_makes_the_next_failure_the_first() -> None:
    restarts = Restarts(limit=2, good_after_s=600.0)
    assert [restarts.pause_after(ran_s) for ran_s in (1.0, 599.0, 600.0, 1.0, 1.0)] == [1.0, 2.0, 1.0, 2.0, None]


def test_without_restarts_the_first_failure_is_the_end() -> None:
    assert Restarts(limit=0).pause_after(1e9) is None


def test_a_backend_that_fails_at_first_is_kept_running(tmp_path: Path) -> None:
    count, restarts = tmp_path / "count", Restarts(limit=3, backoff_s=0.01)
    text = (
        f"import pathlib, sys; p = pathlib.Path({str(count)!r}); n = p.read_text() if p.exists() else ''\n"
        "p.write_text(n + 'x'); sys.exit(5 if len(n) < 3 else 0)"
    )
    codes = []
    while True:
        with Child.start(script(text), log=tmp_path / "log") as child:
            codes.append(child.wait(ENOUGH_S))
        pause_s = restarts.pause_after(0.0) if codes[-1] else None
        if pause_s is None:
            break
        time.sleep(pause_s)
    assert codes == [5, 5, 5, 0]


def test_output_can_go_apart_from_the_log(tmp_path: Path) -> None:
    descriptor = os.memfd_create("output")
    try:
        text = "import sys\nprint('a result')\nprint('a word', file=sys.stderr)"
        with Child.start(script(text), log=tmp_path / "log", stdout=descriptor) as child:
            assert child.wait(ENOUGH_S) == 0
        assert os.pread(descriptor, 100, 0) == b"a result\n"
        assert (tmp_path / "log").read_text() == "a word\n"
    finally:
        os.close(descriptor)
