"""Which sandbox is taken where, and what is said when there is none."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetool.errors import BackendFailed, BadInput
from edgetool.evaluation import sandbox_kernel as kernel
from edgetool.evaluation.sandbox import KINDS, Limits, Sandbox
from edgetool.evaluation.sandbox_choice import open_sandbox
from edgetool.evaluation.sandbox_watch import machine_memory_bytes, resident_bytes
from tests.fakes.other_user import as_root, in_a_child

LIMITS = Limits(wall_s=20)


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    path = tmp_path / "trial.py"
    path.write_text("")
    return path


def _with_closed_namespaces() -> None:
    kernel.no_new_privileges()
    kernel.filter_system_calls()  # denies unshare and mount, as a container's own filter does


def test_the_strongest_that_works_is_taken(trial: Path) -> None:
    found = {}
    for kind in KINDS:
        with contextlib.suppress(BackendFailed, BadInput):
            found[kind] = open_sandbox(trial, limits=LIMITS, kinds=[kind])
    assert found, "nothing works on this machine"
    best = next(iter(found))
    assert open_sandbox(trial, limits=LIMITS).kind == best
    if best in ("namespaces", "bubblewrap"):
        assert open_sandbox(trial, limits=LIMITS).warnings == ()


def test_a_trial_that_fails_is_the_reason_that_is_given(tmp_path: Path) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text("import a_module_that_is_not_there")
    with pytest.raises((BackendFailed, BadInput), match="No module named 'a_module_that_is_not_there'"):
        open_sandbox(trial, limits=LIMITS)


@as_root
def test_root_is_refused_where_namespaces_are_closed_and_told_why(trial: Path) -> None:
    def act() -> object:
        _with_closed_namespaces()
        return open_sandbox(trial, limits=LIMITS, kinds=("namespaces", "limits"))

    answer = in_a_child(act)
    assert answer.startswith("BadInput: as root, generated code is run in isolation only")
    assert "unshare of the mount namespace: Operation not permitted" in answer


@as_root
def test_root_may_take_the_risk_and_is_warned(trial: Path) -> None:
    def act() -> object:
        _with_closed_namespaces()
        sandbox = open_sandbox(trial, limits=LIMITS, kinds=("namespaces", "limits"), unsafe=True)
        return sandbox.kind, sandbox.warnings, sandbox.run(trial).returncode

    answer = in_a_child(act)
    assert answer.startswith("('limits', ('generated code runs with limits but without isolation")
    assert answer.endswith(", 0)")


def test_an_ordinary_user_with_closed_namespaces_gets_the_next_best_with_a_warning(trial: Path) -> None:
    from tests.unit.evaluation.test_sandbox_escapes import NOBODY, python_of_anybody

    python = python_of_anybody()
    if python is None:
        pytest.skip("no Python of 3.11 or later that an ordinary user may run")
    program = f"""
import sys; sys.path.insert(0, {str(Path(kernel.__file__).parents[2])!r})
from pathlib import Path
from types import SimpleNamespace
from edgetool.evaluation import sandbox_kernel as kernel
from edgetool.evaluation.sandbox_choice import open_sandbox
kernel.no_new_privileges(); kernel.filter_system_calls()
Path("trial.py").write_text("")
for kinds in (("namespaces", "bubblewrap", "landlock", "limits"), ("namespaces", "limits")):
    sandbox = open_sandbox(Path("trial.py"), kinds=kinds)
    print(sandbox.kind, sandbox.run(Path("trial.py")).returncode, *sandbox.warnings)
"""
    place = Path("/tmp") / f"closed-{os.getpid()}"
    place.mkdir()
    place.chmod(0o777)
    try:
        done = subprocess.run(
            [python, "-c", program], cwd=place, capture_output=True, text=True,
            **({"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}),
        )  # fmt: skip
    finally:
        shutil.rmtree(place)
    assert done.returncode == 0, done.stderr
    best, weakest = done.stdout.splitlines()
    assert best.startswith(("landlock 0", "limits 0"))
    assert weakest.startswith("limits 0 generated code runs with limits but without isolation")
    assert "namespaces: unshare of the user namespace: Operation not permitted" in weakest


def test_a_run_can_be_stopped(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time; print('begun', flush=True); time.sleep(60)")
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    sandbox = open_sandbox(_empty(tmp_path), limits=LIMITS)
    outcome = sandbox.run(program, stopped=stop.is_set)
    assert outcome.ended_by == "stopped"
    assert outcome.seconds < 30


def test_input_larger_than_a_pipe_arrives_and_input_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print(len(sys.stdin.buffer.read()) if len(sys.argv) == 1 else 'no')")
    sandbox = open_sandbox(_empty(tmp_path), limits=LIMITS)
    assert sandbox.run(program, stdin=bytes(3 << 20)).output == b"3145728\n"
    assert sandbox.run(program, ["-"], stdin=bytes(3 << 20)).output == b"no\n"


def test_several_threads_may_run_programs_at_once_without_mixing_them_up(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print(sys.stdin.read() * 2)")
    sandbox = open_sandbox(_empty(tmp_path), limits=LIMITS)
    found: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: sandbox.run(program, stdin=b"%d;" % n).output}))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: b"%d;%d;\n" % (n, n) for n in range(6)}


def test_no_descriptor_is_lost(tmp_path: Path) -> None:
    sandbox = open_sandbox(_empty(tmp_path), limits=LIMITS)
    sandbox.run(_empty(tmp_path))
    before = _descriptors()
    for _ in range(3):
        sandbox.run(_empty(tmp_path))
        with contextlib.suppress(BackendFailed):
            Sandbox("no such kind", (), LIMITS).run(tmp_path / "absent.py")
    assert _descriptors() == before


@pytest.mark.parametrize(
    ("release", "by_namespace"),
    [
        ("6.18.44-fc-v657", True),
        ("5.14.0-503.el9", True),
        ("5.13.19", False),
        ("4.18.0-553.el8", False),
        ("6.1+", True),
    ],
)
def test_an_older_kernel_is_told_that_other_programs_of_the_user_count_too(
    release: str, by_namespace: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    sandbox = Sandbox("namespaces", (), Limits(processes=10), change_user=False)
    order = sandbox._order(tmp_path / "p.py", [], sandbox.limits, None, None, "")
    assert (order["rlimits"]["NPROC"][0] == 10) == by_namespace
    assert order["rlimits"]["NPROC"][0] >= 10


def test_memory_is_read_as_the_kernel_counts_it() -> None:
    held = bytearray(os.urandom(1)) * (64 << 20)
    with_it = resident_bytes(os.getpid())
    del held
    assert 60 << 20 < with_it - resident_bytes(os.getpid()) < 68 << 20
    total, available = machine_memory_bytes()
    assert 0 < available < total
    assert total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _empty(directory: Path) -> Path:
    path = directory / "empty.py"
    path.write_text("")
    return path


def _descriptors() -> set[str]:
    gc.collect()  # what tests before this one have left to it
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize(("which", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_the_numbers_of_system_calls_are_those_of_the_kernels_headers(which: int, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"no {path} (linux-libc-dev)")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", path.read_text()))
    numbers = kernel._DENIED | {"clone": kernel._CLONE, "clone3": kernel._CLONE3, "prlimit64": kernel._PRLIMIT}
    wrong = {name: known.get(name) for name, both in numbers.items() if known.get(name) not in (None, str(both[which]))}
    assert wrong == {}
    assert len([name for name in numbers if name in known]) > 35


def test_libraries_of_this_python_are_found_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (libraries / "one.so").write_text("x")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{libraries}:relative::/not/there")
    program = tmp_path / "program.py"
    program.write_text("import os; print(os.environ['LD_LIBRARY_PATH'], os.listdir(os.environ['LD_LIBRARY_PATH']))")
    outcome = open_sandbox(_empty(tmp_path), limits=LIMITS).run(program)
    assert outcome.output.decode() == f"{libraries} ['one.so']\n"
