"""A process is known by number and start time, and a tree by a token in the environment of its members."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetool.process import tree as process_tree
from edgetool.process.tree import ProcessId, alive, carriers, descendants, end_tree, entry, identify, reap, send
from tests.fakes.started import started

TOKEN = secrets.token_hex(8)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with started(["sleep", "600"], env={**os.environ, "EDGETOOL_TREE": f"{TOKEN}-outer:{TOKEN}"}) as process:
        yield process
        process.kill()


def test_a_name_that_looks_like_fields_is_read_as_a_name(tmp_path: Path) -> None:
    strange = tmp_path / "x) R 1 1 1"
    strange.symlink_to("/bin/sleep")
    with started([str(strange), "600"]) as process:
        found = entry(process.pid)
        assert found is not None
        assert (found.id.pid, found.parent) == (process.pid, os.getpid())
        process.kill()


def test_the_same_number_with_another_start_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    there = identify(sleeper.pid)
    assert there is not None
    earlier = ProcessId(there.pid, there.start_ticks - 1)
    assert alive(there)
    assert not alive(earlier)
    assert not send(earlier, signal.SIGKILL)
    assert sleeper.poll() is None
    assert send(there, signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL


def test_signals_reach_a_process_without_pidfds(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_pid: int) -> int:
        raise OSError(1, "seccomp")

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    there = identify(sleeper.pid)
    assert there is not None and send(there, signal.SIGTERM)
    assert sleeper.wait() == -signal.SIGTERM


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{pid}").exists()
    assert identify(pid) is None
    os.waitpid(pid, 0)


def test_each_token_of_the_list_is_carried_and_no_part_of_one(sleeper: subprocess.Popen[bytes]) -> None:
    there = identify(sleeper.pid)
    assert carriers(TOKEN) == carriers(f"{TOKEN}-outer") == {there}
    assert carriers(TOKEN[:-1]) == carriers(f"{TOKEN}-outer:{TOKEN}") == set()
    assert there in descendants(os.getpid())


def test_reap_spares_itself_and_what_is_above_it() -> None:
    script = f"from edgetool.process.tree import reap; print(len(reap('{TOKEN}').seen), 'ended')"
    with_token = {**os.environ, "EDGETOOL_TREE": TOKEN}
    seen = "until grep -qz 600 /proc/$!/cmdline; do :; done"  # exec shows the new environment a moment later
    shell = f'sleep 600 & {seen}; {sys.executable} -c "{script}"; echo shell lives; wait'
    done = subprocess.run(["sh", "-c", shell], env=with_token, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 ended\nshell lives\n"


def test_reap_by_another_variable(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(
        ["sleep", "600"], env={**os.environ, process_tree.LEASE_VARIABLE: f"{TOKEN}-lease"}
    ) as leased:
        while not carriers(f"{TOKEN}-lease", process_tree.LEASE_VARIABLE):
            time.sleep(0.01)
        end = reap(f"{TOKEN}-lease", process_tree.LEASE_VARIABLE)
        assert [process.pid for process in end.seen] == [leased.pid]
        assert end.left == end.killed == ()
        assert leased.wait() == -signal.SIGTERM
    assert sleeper.poll() is None


def test_what_cannot_be_ended_is_said(monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]) -> None:
    monkeypatch.setattr(process_tree, "KILL_LIMIT_S", 0.1)
    monkeypatch.setattr(process_tree, "send", lambda *_: False)  # as a process that hangs in the kernel
    there = identify(sleeper.pid)
    assert there is not None
    end = end_tree(lambda: {p for p in [there] if alive(p)}, there, lambda: 0.0)
    assert end.left == end.killed == (there,)


def test_a_resource_tracker_has_time_to_tidy_up_though_the_others_take_seconds_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed with them it would leave their shared memory taken until the next boot."""
    now_s = 0.0
    words = [sys.executable, "-c", "import time; time.sleep(600)", "multiprocessing.resource_tracker"]
    monkeypatch.setattr(process_tree, "time", SimpleNamespace(monotonic=lambda: now_s))
    with started(words) as tracker:
        there = identify(tracker.pid)
        assert there is not None

        def wait(pause_s: float) -> None:
            nonlocal now_s
            now_s += pause_s
            if now_s > 4:
                tracker.terminate()
                tracker.wait()

        end = end_tree(lambda: {p for p in [there] if alive(p)}, None, lambda: 0.0, wait)
    assert (end.seen, end.killed, end.left) == ((there,), (), ())


def test_a_look_that_misses_a_process_is_not_believed(sleeper: subprocess.Popen[bytes]) -> None:
    there = identify(sleeper.pid)
    assert there is not None
    looks = iter([set(), {there}, set(), set(), {there}])
    end = end_tree(lambda: next(looks, {p for p in [there] if alive(p)}), None, lambda: 0.0)
    assert (end.seen, end.left) == ((there,), ())
    assert sleeper.wait() == -signal.SIGKILL


def test_who_knows_for_certain_is_believed_at_once(sleeper: subprocess.Popen[bytes]) -> None:
    answers = iter([False, True])
    assert end_tree(set, None, lambda: 0.0, gone=lambda: next(answers)).seen == ()
    assert list(answers) == []
