"""Programs that try to get out of the sandbox, in every kind of it that this machine has, as root and as a user.

Each is bounded by itself too, so that one that gets out does the machine no harm: forks, bytes and seconds are counted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.other_user import NOBODY

HELPER = Path(__file__).parents[2] / "fakes" / "sandboxed.py"
ISOLATED = ("namespaces", "bubblewrap", "landlock")
SMALL = {"wall_s": 20, "cpu_s": 20, "address_space_bytes": 1 << 30, "memory_bytes": 1 << 28, "disk_bytes": 1 << 22}
CALL = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)"


def python_of_anybody() -> str | None:
    """A Python of 3.11 or later that an ordinary user may run: this one, or the system's."""
    look = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", look], user=NOBODY if os.geteuid() == 0 else None, capture_output=True)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


@dataclass
class Found:
    """What a run printed (one JSON value) and how it ended."""

    said: Any
    returncode: int | None
    ended_by: str | None
    errors: str
    seconds: float
    warnings: list[str]


@dataclass
class Prison:
    """One kind of sandbox, and who runs edgetool in it: one process for all programs."""

    kind: str
    user: int | None
    python: str
    place: Path
    helper: subprocess.Popen[str] | None = None

    def __call__(self, program: str, **limits: Any) -> Found:
        """Run `program`; what it prints has to be JSON, if anything."""
        if self.helper is None or self.helper.poll() is not None:
            self.helper = self.new_helper()
        self.order(self.helper, program, **limits)
        assert self.helper.stdout is not None
        found = json.loads(self.helper.stdout.readline())
        if "refused" in found:
            pytest.skip(f"{self.kind}: {found['refused']}")
        said = found.pop("output")
        said = json.loads(said) if said.startswith(("[", "{", '"')) else said
        return Found(said, **found)

    def order(self, helper: subprocess.Popen[str], program: str, **limits: Any) -> None:
        source = self.place / "program.py"
        source.write_text(textwrap.dedent(program))
        assert helper.stdin is not None
        helper.stdin.write(json.dumps({"program": str(source), "limits": SMALL | limits}) + "\n")
        helper.stdin.flush()

    def new_helper(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, str(HELPER), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "SECRET_OF_MINE": "hunter2", "TMPDIR": str(self.place)},
            **({} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}),
        )

    def close(self) -> None:
        if self.helper is not None:
            with self.helper:
                self.helper.kill()
        shutil.rmtree(self.place, ignore_errors=True)


def _prisons() -> Iterator[Any]:
    for kind in (*ISOLATED, "limits"):
        if kind == "bubblewrap" and shutil.which("bwrap") is None:
            continue
        if os.geteuid() == 0 and kind == "namespaces":
            yield pytest.param((kind, None), id="namespaces-root")
        yield pytest.param((kind, NOBODY if os.geteuid() == 0 else None), id=f"{kind}-user")


def _open(kind: str, user: int | None) -> Prison:
    python = sys.executable if user is None else python_of_anybody()
    if python is None:
        pytest.skip("no Python of 3.11 or later that an ordinary user may run")
    place = Path(tempfile.mkdtemp(prefix="escape-"))  # pytest's own directories are closed to other users
    place.chmod(0o777)
    return Prison(kind, user, python, place)


@pytest.fixture(scope="module", params=_prisons())
def prison(request: pytest.FixtureRequest) -> Iterator[Prison]:
    """Every kind, also the one that only limits."""
    opened = _open(*request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=[one for one in _prisons() if not one.id.startswith("limits")])
def isolation(request: pytest.FixtureRequest) -> Iterator[Prison]:
    """Every kind that isolates."""
    opened = _open(*request.param)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def strongest() -> Iterator[Prison]:
    """Namespaces, as whoever runs the tests."""
    opened = _open("namespaces", None)
    yield opened
    opened.close()


@pytest.fixture
def bystander(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user as the one who runs edgetool, which nothing in the sandbox may touch."""
    prison = request.getfixturevalue("isolation" if "isolation" in request.fixturenames else "prison")
    user = {} if prison.user is None else {"user": prison.user, "group": prison.user, "extra_groups": []}
    with subprocess.Popen(["sleep", "120"], **user) as process:
        yield process
        process.kill()


def _still_there(marker: str) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                command = (directory / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in command and b"sandboxed.py" not in command:
                found.append(int(directory.name))
    return found


def _none_left(marker: str) -> bool:
    until = time.monotonic() + 20
    while _still_there(marker):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_program_that_does_no_harm_runs_and_answers(prison: Prison) -> None:
    found = prison("import json, sys; print(json.dumps([sum(range(10)), sys.stdin.read()]))")
    assert found.said == [45, ""]
    assert found.returncode == 0 and found.ended_by is None


def test_threads_processes_and_an_event_loop_work(prison: Prison) -> None:
    found = prison("""
        import asyncio, json, os, threading
        said = []
        thread = threading.Thread(target=said.append, args=(1,))
        thread.start()
        thread.join()
        async def two():
            await asyncio.sleep(0)
            said.append(2)
        asyncio.run(two())
        if os.fork() == 0:
            os._exit(3)
        said.append(os.waitstatus_to_exitcode(os.wait()[1]))
        print(json.dumps(said))
    """)
    assert found.said == [1, 2, 3]


def test_a_secret_file_cannot_be_read(isolation: Prison) -> None:
    secret = isolation.place / "secret.txt"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    found = isolation(f"""
        import json
        try:
            print(json.dumps(open({str(secret)!r}).read()))
        except OSError as error:
            print(json.dumps(type(error).__name__))
    """)
    assert found.said in ("FileNotFoundError", "PermissionError")


def test_without_isolation_a_secret_file_is_readable_and_a_warning_says_so() -> None:
    prison = _open("limits", NOBODY if os.geteuid() == 0 else None)
    (prison.place / "secret.txt").write_text("hunter2")
    found = prison(f"import json; print(json.dumps(open({str(prison.place / 'secret.txt')!r}).read()))")
    prison.close()
    assert found.said == "hunter2"
    assert len(found.warnings) == 1 and "it reads what this user may read" in found.warnings[0]


def test_the_environment_is_empty(prison: Prison) -> None:
    found = prison("import json, os; print(json.dumps(dict(os.environ)))")
    assert "hunter2" not in json.dumps(found.said)
    assert set(found.said) <= {"HOME", "TMPDIR", "LANG", "OPENBLAS_NUM_THREADS", "EDGETOOL_TREE", "LC_CTYPE", "PWD"}


def test_no_open_file_of_edgetool_is_left_to_it(prison: Prison) -> None:
    found = prison("""
        import json, os
        found = []
        for number in range(4096):
            try:
                os.fstat(number)
                found.append(number)
            except OSError:
                pass
        print(json.dumps(found))
    """)
    assert found.said == [0, 1, 2]


def test_nothing_can_be_written_outside(isolation: Prison) -> None:
    (isolation.place / "open").mkdir()
    (isolation.place / "open").chmod(0o777)
    places = [
        str(isolation.place / "open"),
        "/",
        "/usr",
        "/etc",
        "/dev",
        "/var/tmp",
        str(Path(isolation.python).parent),
    ]
    found = isolation(f"""
        import json, os
        written = []
        for place in {places!r} + [os.path.dirname(os.__file__)]:
            try:
                with open(place + "/escaped.txt", "w") as stream:
                    stream.write("x")
                written.append(place)
            except OSError:
                pass
        print(json.dumps(written))
    """)
    assert found.said == []
    assert list((isolation.place / "open").iterdir()) == []


def test_a_directory_to_write_in_is_there_and_gone_afterwards(prison: Prison) -> None:
    found = prison("""
        import json, os, tempfile
        with open("here.txt", "w") as stream:
            stream.write("x")
        os.mkdir("closed"); os.symlink("/usr", "closed/link"); os.chmod("closed", 0)
        print(json.dumps([os.getcwd(), tempfile.gettempdir()]))
    """)
    place, temporary = found.said
    assert place == temporary
    assert not Path(place, "here.txt").exists()
    assert Path("/usr").is_dir()


def test_a_server_on_this_machine_cannot_be_reached(prison: Prison) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = prison(f"""
            import json, socket
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 5)
                print(json.dumps("connected"))
            except OSError as error:
                print(json.dumps(str(error)))
        """)
    assert found.said != "connected"


def test_an_abstract_unix_socket_cannot_be_reached(prison: Prison) -> None:
    name = f"\0edgetool-escape-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        found = prison(f"""
            import json, socket
            try:
                socket.socket(socket.AF_UNIX).connect({name!r})
                print(json.dumps("connected"))
            except OSError as error:
                print(json.dumps(str(error)))
        """)
    assert found.said != "connected"


def test_a_network_is_missing_also_where_calls_are_not_filtered(strongest: Prison) -> None:
    from edgetool.evaluation.sandbox import Limits, Sandbox

    source = strongest.place / "unfiltered.py"
    with socket.create_server(("127.0.0.1", 0)) as server:
        source.write_text(f"""
import socket, sys
sys.exit(7 if socket.socket().connect_ex(("127.0.0.1", {server.getsockname()[1]})) else 0)
""")
        places = (sys.prefix, sys.base_prefix)
        outcome = Sandbox("namespaces", places, Limits(), filtered=False).run(source)
    assert outcome.returncode == 7, outcome


def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left(prison: Prison) -> None:
    marker = f"bomb{time.monotonic_ns()}"
    found = prison(
        f"""
        import json, os, sys, time
        if len(sys.argv) == 1:  # so that every process can be told by its command line
            os.execv(sys.executable, [sys.executable, "-I", __file__, {marker!r}])
        first, made = os.getpid(), 0
        try:
            while made < 2000:
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(30)
                    os._exit(0)
                made += 1
        except OSError:
            pass
        print(json.dumps([made]), flush=True)
        os.abort()
        """,
        processes=40,
    )
    assert 10 < found.said[0] < 200
    assert _none_left(marker)


def test_memory_of_one_process_is_bounded(prison: Prison) -> None:
    found = prison(
        """
        import json
        held = []
        try:
            while len(held) < 48:
                held.append(bytearray(64 << 20))
        except MemoryError:
            pass
        print(json.dumps([len(held)]))
    """,
        memory_bytes=8 << 30,
    )
    assert found.said[0] < 17


def test_memory_of_many_processes_together_is_bounded(prison: Prison) -> None:
    found = prison("""
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                held = bytearray(os.urandom(1 << 20)) * 128
                time.sleep(30)
                os._exit(0)
        time.sleep(30)
    """)
    assert found.ended_by == "memory"
    assert found.seconds < 20


def test_memory_that_no_process_shows_cannot_be_had(prison: Prison) -> None:
    found = prison("""
        import json, os, ctypes
        libc = ctypes.CDLL(None)
        had = []
        try:
            os.memfd_create("x"); had.append("memfd")
        except OSError:
            pass
        if libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600) >= 0: had.append("shm")
        print(json.dumps(had))
    """)
    assert found.said == []


def test_the_disk_cannot_be_filled(prison: Prison) -> None:
    found = prison("""
        import json, os
        written = 0
        try:
            for number in range(64):
                with open(f"file{number}", "wb") as stream:
                    for _ in range(4):
                        written += stream.write(os.urandom(1 << 20))
                        stream.flush()
                        os.fsync(stream.fileno())
        except OSError:
            pass
        print(json.dumps([written]), flush=True)
        if written == 256 << 20:
            import time
            time.sleep(30)
    """)
    assert found.ended_by == "disk" or found.said[0] <= 5 << 20


def test_a_file_beyond_the_limit_cannot_be_written(prison: Prison) -> None:
    found = prison("""
        import json, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with open("large", "wb") as stream:
                for _ in range(64):
                    stream.write(bytes(1 << 20))
            print(json.dumps("written"))
        except OSError as error:
            print(json.dumps(error.strerror))
    """)
    assert found.said in ("File too large", "No space left on device")


def test_a_million_files_cannot_be_made(isolation: Prison) -> None:
    if isolation.kind == "bubblewrap":
        pytest.skip("bwrap has no such limit; the machine's memory is watched")
    found = isolation("""
        import json, time
        made = 0
        try:
            for number in range(40000):
                open(f"f{number}", "w").close()
                made += 1
        except OSError:
            pass
        print(json.dumps([made]), flush=True)
        if made == 40000:
            time.sleep(30)
    """)
    assert found.ended_by == "disk" or found.said[0] < 11_000


def test_a_process_outside_cannot_be_killed(isolation: Prison, bystander: subprocess.Popen[bytes]) -> None:
    found = isolation(f"""
        import json, os, signal
        failed = []
        for number in ({bystander.pid}, {os.getpid()}):
            try:
                os.kill(number, 0 if number == {os.getpid()} else signal.SIGKILL)
            except OSError as error:
                failed.append(type(error).__name__)
        print(json.dumps(failed))
    """)
    if not found.warnings:
        assert len(found.said) == 2
        assert bystander.poll() is None


def test_killing_everything_it_sees_ends_only_the_program_itself(isolation: Prison, bystander: Any) -> None:
    if isolation.kind == "landlock":
        pytest.skip("sees the processes of the same user; the test before tries the signal")
    found = isolation(
        "import os, signal; os.kill(-1, signal.SIGKILL); os.kill(1, signal.SIGKILL); os.kill(os.getppid(), 9)"
    )
    assert found.ended_by is None
    assert bystander.poll() is None


def test_a_process_outside_cannot_be_traced(prison: Prison, bystander: subprocess.Popen[bytes]) -> None:
    found = prison(f"""
        import json
        {CALL}
        print(json.dumps([libc.ptrace(16, n, 0, 0) for n in ({bystander.pid}, os.getppid(), 1)]))
    """)
    assert found.said == [-1, -1, -1]


def test_limits_and_priority_of_a_process_outside_cannot_be_changed(
    prison: Prison, bystander: subprocess.Popen[bytes]
) -> None:
    def settings() -> tuple[str, int]:
        return Path(f"/proc/{bystander.pid}/limits").read_text(), os.getpriority(os.PRIO_PROCESS, bystander.pid)

    before = settings()
    found = prison(f"""
        import json, os, resource
        failed = 0
        for change in (
            lambda: resource.prlimit({bystander.pid}, resource.RLIMIT_NOFILE, (9, 9)),
            lambda: os.setpriority(os.PRIO_PROCESS, {bystander.pid}, 19),
        ):
            try:
                change()
            except OSError:
                failed += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))  # its own it may
        print(json.dumps([failed, resource.getrlimit(resource.RLIMIT_NOFILE)]))
    """)
    assert found.said == [2, [99, 99]]
    assert settings() == before


def test_it_has_no_power_and_can_gain_none(prison: Prison) -> None:
    found = prison(f"""
        import json
        {CALL}
        status = libc.prctl(39, 0, 0, 0, 0)  # PR_GET_NO_NEW_PRIVS
        capabilities = ctypes.create_string_buffer(24)
        libc.capget(b"\\x22\\x05\\x08\\x20" + bytes(4), capabilities)
        new = [libc.unshare(0x10000000), libc.syscall(56, 0x10000011, 0, 0, 0, 0)]
        new.append(libc.mount(b"x", b"/", b"tmpfs", 0, 0))
        print(json.dumps([os.getuid(), status, capabilities.raw.hex(), new]))
    """)
    uid, no_new_privileges, capabilities, new = found.said
    assert uid != 0
    assert no_new_privileges == 1
    assert set(capabilities) == {"0"}
    assert new == [-1, -1, -1]


def test_only_its_own_world_is_seen(isolation: Prison) -> None:
    if isolation.kind == "landlock":
        pytest.skip("hides what is in files, not their names")
    found = isolation("import json, os; print(json.dumps([os.listdir('/'), os.listdir('/proc'), os.listdir('/tmp')]))")
    top, proc, temporary = found.said
    # but for the way to the interpreter and to what it runs, wherever this checkout lies
    needed = {Path(place).parts[1] for place in (isolation.place, HELPER, sys.prefix, sys.base_prefix)}
    assert not {"home", "root", "var", "sys", "mnt", "run", "old"} & (set(top) - needed)
    assert set(proc) <= {"meminfo", "stat", "cpuinfo"}
    assert set(temporary) <= {
        Path(place).parts[2] for place in (isolation.place, HELPER, sys.prefix) if "/tmp" in str(place)
    }


def test_a_program_that_hangs_is_ended_with_all_its_children(prison: Prison) -> None:
    marker = f"hang{time.monotonic_ns()}"
    begun = time.monotonic()
    found = prison(
        f"""
        import os, signal, sys, time
        if len(sys.argv) == 1:
            os.execv(sys.executable, [sys.executable, "-I", __file__, {marker!r}])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
        time.sleep(60)
        """,
        wall_s=1,
    )
    assert found.ended_by == "time"
    assert time.monotonic() - begun < 40
    assert _none_left(marker)


def test_children_left_behind_end_with_the_program(prison: Prison) -> None:
    marker = f"left{time.monotonic_ns()}"
    found = prison(f"""
        import os, sys, time
        if len(sys.argv) == 1:
            os.execv(sys.executable, [sys.executable, "-I", __file__, {marker!r}])
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
    """)
    assert found.returncode == 0
    assert found.seconds < 20
    assert _none_left(marker)


def test_processor_time_is_bounded(prison: Prison) -> None:
    found = prison("while True: pass", cpu_s=1, wall_s=120)  # a busy machine takes long to give it its second
    assert found.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_flood_of_output_ends_it_and_is_not_kept(prison: Prison) -> None:
    found = prison(
        """
        import sys
        for _ in range(1 << 14):
            sys.stdout.write("y" * 65536)
    """,
        output_bytes=1 << 16,
    )
    assert found.ended_by == "output"
    assert len(found.said) == 1 << 16


def test_a_flood_of_errors_is_not_kept(prison: Prison) -> None:
    found = prison("""
        import sys
        for _ in range(1 << 8):
            sys.stderr.write("y" * 65536)
        sys.stderr.write("the end")
    """)
    assert found.returncode == 0
    assert found.errors.endswith("the end") and len(found.errors) == 4096


@pytest.mark.parametrize(
    ("program", "returncode"),
    [
        ("import os; os._exit(3)", 3),
        ("raise SystemExit(4)", 4),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("import os; os.close(0); os.close(1); os.close(2); os._exit(5)", 5),
        ("import os; os.closerange(0, 256); os.execv('/bin/true', ['true'])", 0),
    ],
)
def test_every_way_to_end_is_told_apart(strongest: Prison, program: str, returncode: int) -> None:
    found = strongest(program)
    assert (found.returncode, found.ended_by) == (returncode, None)


def test_it_ends_when_edgetool_is_killed(prison: Prison) -> None:
    marker = f"orphan{time.monotonic_ns()}"
    program = f"""
        import os, sys, time
        if len(sys.argv) == 1:
            os.execv(sys.executable, [sys.executable, "-I", __file__, {marker!r}])
        time.sleep(60)
    """
    with prison.new_helper() as process:
        prison.order(process, program)
        until = time.monotonic() + 30
        while not _still_there(marker):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert _none_left(marker)


def test_a_program_that_is_not_there_is_an_error_and_no_outcome(strongest: Prison) -> None:
    from edgetool.errors import BackendFailed
    from edgetool.evaluation.sandbox import Limits, Sandbox

    nowhere = Sandbox("namespaces", (), Limits())  # a world without this Python
    if Path(sys.prefix).is_relative_to("/usr"):
        pytest.skip("this Python is part of the system")
    with pytest.raises(BackendFailed, match=r"could not be set up: .*No such file"):
        nowhere.run(HELPER)
