"""`edgetool gpus`, `gpus run` and `gpus reap` from outside, on the recorded machine and on one without a driver."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgetool.process.tree import alive, identify
from tests.fakes.started import started

RECORDED = Path(__file__).parent.parent / "fakes" / "nvml_eight_gpus.json"
GIB = 2**30
MIB = 2**20
EDGETOOL = [sys.executable, "-m", "edgetool"]
Machine = Any


class Shell:
    """edgetool as a child process, on a copy of the recorded machine that a test may change."""

    def __init__(self, directory: Path) -> None:
        self.fixture = directory / "machine.json"
        self.fixture.write_text(RECORDED.read_text())
        self.leases = directory / "leases"
        self.env = {**os.environ, "EDGETOOL_NVML_FIXTURE": str(self.fixture), "EDGETOOL_LOCK_DIR": str(self.leases)}
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [*EDGETOOL, "gpus", *arguments]
        return subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=120)

    def json(self, *arguments: str, **env: str) -> Any:
        result = self(*arguments, "--json", **env)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def start(self, *arguments: str) -> tuple[subprocess.Popen[str], int, dict[str, str]]:
        """`gpus run ... -- ` a command that tells its number and environment, and goes on until it is ended."""
        script = "import os,json,time; print(json.dumps([os.getpid(), dict(os.environ)]), flush=True); time.sleep(600)"
        command = [*EDGETOOL, "gpus", "run", *arguments, "--", sys.executable, "-c", script]
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line, process.stderr.read()
        pid, environment = json.loads(line)
        return process, pid, environment

    def put(self, uuid: str, pid: int, used_gib: int) -> None:
        """A process appears on a GPU."""
        machine = json.loads(self.fixture.read_text())
        gpu = next(gpu for gpu in machine["gpus"] if gpu["uuid"] == uuid)
        gpu["processes"].append({"pid": pid, "user": "me", "command": "x", "used_memory_bytes": used_gib * GIB})
        gpu["memory_used_bytes"] += used_gib * GIB
        self.fixture.write_text(json.dumps(machine))


@pytest.fixture
def gpus(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    for process in shell.started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
    shell("reap", "--grace", "0")


def held(gpus: Shell) -> list[str]:
    return [lease["id"] for gpu in gpus.json()["gpus"] for lease in gpu["leases"]]


def eventually(condition: Callable[[], bool], limit_s: float = 30) -> bool:
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_the_document_is_as_designed(gpus: Shell) -> None:
    document = gpus.json()
    assert list(document) == ["schema", "ok", "driver_version", "gpus", "ports", "boards"]
    assert (document["schema"], document["ok"], document["driver_version"]) == ("edgetool.gpus/1", True, "580.1")
    assert [gpu["class"] for gpu in document["gpus"]] == [
        "4090",
        "4090",
        "4090",
        "4090",
        "H100",
        "4090",
        "4090",
        "A100",
    ]
    assert {key for gpu in document["gpus"] for key in gpu} == {
        *("index", "uuid", "name", "class", "memory_total_bytes", "memory_used_bytes", "memory_reserved_bytes"),
        *("memory_free_bytes", "utilization_percent", "error", "mig", "processes", "leases"),
    }
    classes = {p["pid"]: p["class"] for gpu in document["gpus"] for p in gpu["processes"]}
    assert classes == {
        9000101: "system",
        9000102: "system",
        9000201: "foreign",
        9000301: "foreign",
        9000302: "foreign",
        9000401: "foreign",
        9000701: "foreign",
    }
    free = {gpu["index"]: gpu["memory_free_bytes"] for gpu in document["gpus"]}
    assert free[1] == (24564 - 18) * MIB
    assert free[3] == 24564 * MIB - 23 * GIB
    assert free[5] == free[6] == 0  # ECC errors; lost
    assert [gpu["error"] is None for gpu in document["gpus"]] == [True] * 5 + [False] * 2 + [True]
    assert [part["memory_free_bytes"] // GIB for part in document["gpus"][7]["mig"]] == [33, 19, 19]


def test_the_table_shows_everything_a_person_looks_for(gpus: Shell) -> None:
    gpus.start("--class", "H100", "--min-free", "40GiB", "--ports", "1")
    text = gpus().stdout
    for part in (
        "driver 580.1",
        "4090",
        "A100-MIG",
        "ECC errors",
        "GPU is lost",
        "ml2",
        "python evaluate.py",
        "40.0 GiB",
    ):
        assert part in text
    assert re.search(r"port 2\d{4} \(nobody listens\)", text)
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_command_gets_its_gpu_by_uuid_and_what_it_prints_and_returns_is_passed_on(gpus: Shell) -> None:
    script = 'echo "$CUDA_VISIBLE_DEVICES"; echo trouble >&2; exit 7'
    result = gpus("run", "--class", "4090", "--count", "1", "--min-free", "22GiB", "-q", "--", "sh", "-c", script)
    assert result.returncode == 7
    assert result.stdout == json.loads(RECORDED.read_text())["gpus"][1]["uuid"] + "\n"
    assert result.stderr == "trouble\n"
    assert held(gpus) == []
    assert list(gpus.leases.iterdir()) == []


def test_the_options_of_the_command_are_its_own_also_without_dashes(gpus: Shell) -> None:
    assert gpus("run", "--count", "0", "echo", "--json", "--class", "x").stdout == "--json --class x\n"


def test_what_is_leased_is_refused_with_exit_code_6_and_the_holder(gpus: Shell) -> None:
    process, _, _ = gpus.start("--class", "4090", "--count", "2", "--min-free", "22GiB")
    result = gpus("run", "--class", "4090", "--min-free", "22GiB", "--json", "--", "true")
    assert result.returncode == 6
    document = json.loads(result.stdout)
    assert (document["ok"], document["type"], document["exit_code"]) == (False, "ResourceUnavailable", 6)
    for part in (str(process.pid), "22.0 GiB leased by", "ml1", "9000201"):
        assert part in document["message"]
    assert "--wait" in document["hint"]
    # what else is there is not affected
    assert gpus("run", "--class", "4090", "--min-free", "10GiB", "--", "true").returncode == 0
    assert gpus("run", "--class", "A100", "--min-free", "10GiB", "--", "true").returncode == 0


@pytest.mark.parametrize(
    "wanted",
    [
        ("--class", "5090"),
        ("--class", "4090", "--count", "5"),
        ("--class", "4090", "--min-free", "30GiB"),
        ("--class", "A100",),
        ("--class", "H100", "--exclusive"),
        ("--class", "H100", "--min-free", "70GiB"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(gpus: Shell, wanted: tuple[str, ...]) -> None:
    result = gpus("run", *wanted, "--", "true")
    assert result.returncode == 6
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_without_a_size_a_gpu_is_nobody_else_s(gpus: Shell) -> None:
    _, _, environment = gpus.start("--class", "4090")
    (lease,) = (lease for gpu in gpus.json()["gpus"] for lease in gpu["leases"])
    assert lease["exclusive"] is True
    assert lease["memory_bytes"] == 24564 * MIB
    uuid = environment["CUDA_VISIBLE_DEVICES"]
    (gpu,) = (gpu for gpu in gpus.json()["gpus"] if gpu["uuid"] == uuid)
    assert gpu["memory_free_bytes"] == 0


def test_a_killed_run_leaves_the_lease_with_its_command_and_both_are_shown_as_they_are(gpus: Shell) -> None:
    process, pid, environment = gpus.start("--class", "4090", "--min-free", "22GiB")
    uuid = environment["CUDA_VISIBLE_DEVICES"]
    gpus.put(uuid, pid, 5)

    def shown() -> tuple[int, int, list[str]]:
        (gpu,) = (gpu for gpu in gpus.json()["gpus"] if gpu["uuid"] == uuid)
        kinds = [p["class"] for p in gpu["processes"] if p["pid"] == pid]
        return gpu["memory_reserved_bytes"], gpu["memory_free_bytes"], kinds

    assert shown() == (22 * GIB, 24564 * MIB - 22 * GIB, ["leased"])
    process.kill()
    process.wait()
    assert shown() == (22 * GIB, 24564 * MIB - 22 * GIB, ["orphan"])
    assert gpus("run", "--class", "4090", "--count", "2", "--min-free", "22GiB", "--", "true").returncode == 6
    dry = gpus.json("reap", "--dry-run")
    assert [item["pid"] for item in dry["plan"]["reaped"]] == [pid]
    assert identify(pid)
    document = gpus.json("reap")
    assert document["schema"] == "edgetool.gpus-reap/1"
    assert [(item["pid"], item["used_memory_bytes"]) for item in document["reaped"]] == [(pid, 5 * GIB)]
    assert identify(pid) is None
    assert list(gpus.leases.iterdir()) == []
    assert gpus.json("reap")["reaped"] == []


def test_reaping_touches_nothing_that_is_leased_or_foreign(gpus: Shell) -> None:
    _, pid, _ = gpus.start("--class", "4090", "--min-free", "22GiB")
    stranger = started(["sleep", "600"])
    gpus.put(json.loads(RECORDED.read_text())["gpus"][1]["uuid"], stranger.pid, 1)
    process = identify(pid)
    assert process
    assert gpus("reap", "--grace", "0").returncode == 0
    assert alive(process)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_command_and_the_lease_ends_with_it(gpus: Shell, number: signal.Signals, code: int) -> None:
    process, pid, _ = gpus.start("--class", "4090")
    process.send_signal(number)
    assert process.wait(timeout=60) in {code, 1}  # python turns SIGINT into an exception
    assert identify(pid) is None
    assert held(gpus) == []


def test_what_the_command_leaves_running_keeps_the_lease_and_is_named(gpus: Shell) -> None:
    script = "sleep 600 >/dev/null 2>&1 & echo $!"
    result = gpus("run", "--class", "4090", "--", "sh", "-c", script)
    assert result.returncode == 0
    assert f"still run and keep the lease: {result.stdout.strip()}" in result.stderr
    assert len(held(gpus)) == 1
    assert gpus("reap", "--grace", "0").returncode == 0
    assert held(gpus) == []


def test_waiting_gets_what_becomes_free_and_says_what_it_waits_for(gpus: Shell) -> None:
    process, _, _ = gpus.start("--class", "H100", "--min-free", "60GiB")
    command = [*EDGETOOL, "gpus", "run", "--class", "H100", "--min-free", "60GiB", "--wait", "2m", "--", "echo", "mine"]
    waiter = subprocess.Popen(command, env=gpus.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    gpus.started.append(waiter)
    assert waiter.stderr
    said = waiter.stderr.readline()
    assert re.search(r"waiting for \d+ of 120 s", said)
    assert str(process.pid) in said
    assert "Waiting" in gpus().stdout
    process.terminate()
    assert waiter.communicate(timeout=60)[0] == "mine\n"
    assert waiter.returncode == 0


def test_interrupted_while_waiting_it_leaves_the_queue(gpus: Shell) -> None:
    gpus.start("--class", "H100", "--min-free", "60GiB")
    command = [*EDGETOOL, "gpus", "run", "--class", "H100", "--min-free", "60GiB", "--wait", "1h", "--", "echo", "mine"]
    waiter = subprocess.Popen(command, env=gpus.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    gpus.started.append(waiter)
    assert eventually(lambda: any(path.name.startswith("wait-") for path in gpus.leases.iterdir()))
    waiter.send_signal(signal.SIGINT)
    assert waiter.wait(timeout=60) == 130
    assert not any(path.name.startswith("wait-") for path in gpus.leases.iterdir())


def test_two_runs_started_at_once_get_different_gpus(gpus: Shell) -> None:
    command = [*EDGETOOL, "gpus", "run", "--class", "4090", "--min-free", "22GiB", "--ports", "2", "-q", "--"]
    script = "echo $CUDA_VISIBLE_DEVICES $EDGETOOL_PORTS; sleep 600"
    both = [
        subprocess.Popen([*command, "sh", "-c", script], env=gpus.env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    gpus.started += both
    answers = [process.stdout.readline().split() for process in both if process.stdout]
    assert answers[0][0] != answers[1][0]
    assert len({*answers[0][1].split(","), *answers[1][1].split(",")}) == 4


def test_without_a_driver_ports_boards_and_cpu_jobs_work(gpus: Shell) -> None:
    none = {"EDGETOOL_NVML_FIXTURE": ""}
    document = gpus.json(**none)
    assert document["driver_version"] is None
    assert document["gpus"] == []
    assert "No NVIDIA driver" in gpus(**none).stdout
    assert gpus("run", "--", "true", **none).returncode == 6
    script = "echo [$CUDA_VISIBLE_DEVICES] $EDGETOOL_PORTS"
    result = gpus("run", "--ports", "1", "--board", "vcu128-0", "--", "sh", "-c", script, **none)
    assert result.returncode == 0
    assert result.stdout.startswith("[] 2")
    gpus.start("--board", "vcu128-0", "--port", "28123")
    document = gpus.json(**none)
    assert [board["board"] for board in document["boards"]] == ["vcu128-0"]
    assert [(port["port"], port["listening"]) for port in document["ports"]] == [(28123, False)]
    assert gpus("run", "--board", "vcu128-0", "--", "true", **none).returncode == 6
    assert gpus("run", "--port", "28123", "--", "true", **none).returncode == 6


def test_edgetool_within_a_run_uses_its_lease(gpus: Shell) -> None:
    inner = [*EDGETOOL, "gpus", "run", "--class", "4090", "-q", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    result = gpus("run", "--class", "4090", "--", *inner)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("GPU-")


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("run",), 2, "needs a command"),
        (("run", "--"), 2, "needs a command"),
        (("run", "--count", "many", "--", "true"), 3, "count 'many'"),
        (("run", "--count", "-1", "--", "true"), 3, "count"),
        (("run", "--min-free", "lots", "--", "true"), 3, "min_free_bytes 'lots' (given by --min-free)"),
        (("run", "--min-free", "22", "--", "true"), 3, "at least 1MiB, such as 22GiB"),  # bytes: GiB were meant
        (("run", "--wait", "soon", "--", "true"), 3, "such as 90, 10m or 2h"),
        (("run", "--port", "70000", "--", "true"), 3, "65535"),
        (("run", "--port", "8000", "--ports", "2", "--", "true"), 3, "exclude each other"),
        (("run", "--count", "0", "--class", "4090", "--", "true"), 3, "asks for no GPU"),
        (("run", "--board", "../x", "--", "true"), 3, "board"),
        (("run", "--count", "0", "--", "no-such-program"), 4, "no such program"),
        (("run", "--count", "0", "--", ""), 4, "no such program"),
        (("rnu",), 2, "No such command"),
        (("--watch", "--json"), 3, "--watch shows tables"),
        (("--interval", "0"), 3, "at least 0.1 s"),
    ],
)
def test_mistakes_are_told_in_one_sentence(gpus: Shell, arguments: tuple[str, ...], code: int, why: str) -> None:
    result = gpus(*arguments)
    assert result.returncode == code
    assert why in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("typed", [("run", "--count", "many", "--", "true"), ("reap", "--grace", "soon")])
def test_the_hint_names_the_help_that_knows_the_option(gpus: Shell, typed: tuple[str, ...]) -> None:
    hint = gpus(*typed).stderr.partition("hint: ")[2].split()
    assert hint[0] == "edgetool"
    helped = subprocess.run([*EDGETOOL, *hint[1:]], env=gpus.env, capture_output=True, text=True, timeout=120)
    assert typed[1] in helped.stdout


def test_a_recording_that_is_broken_or_missing_is_a_configuration_error(gpus: Shell) -> None:
    gpus.fixture.write_text("{")
    assert gpus().returncode == 3
    gpus.fixture.unlink()
    assert gpus().returncode == 3


def test_a_lock_directory_that_cannot_be_used_is_a_configuration_error(gpus: Shell) -> None:
    gpus.leases.symlink_to("/tmp")
    result = gpus("run", "--count", "0", "--", "true")
    assert result.returncode == 3
    assert "a link is refused" in result.stderr


def test_a_plan_is_shown_and_nothing_is_leased(gpus: Shell) -> None:
    document = gpus.json("run", "--class", "4090", "--count", "2", "--min-free", "22GiB", "--ports", "1", "--dry-run")
    assert document["schema"] == "edgetool.gpus-run/1"
    assert len(document["plan"]["gpus"]) == 2
    assert 20_000 <= document["plan"]["ports"][0] <= 29_999
    assert held(gpus) == []


def test_own_classes_and_settings_come_from_the_environment_too(gpus: Shell) -> None:
    own = {"EDGETOOL_SCHEDULER_GPU_CLASSES": "RTX 4090=small, H100=large"}
    assert [gpu["class"] for gpu in gpus.json(**own)["gpus"]][3:5] == ["small", "large"]
    assert gpus("run", "--class", "large", "--min-free", "1GiB", "--", "true", **own).returncode == 0
    assert gpus("run", "--", "true", EDGETOOL_GPUS_GPU_CLASS="5090").returncode == 6
    ports = gpus(
        "run",
        "--ports",
        "1",
        "-q",
        "--",
        "sh",
        "-c",
        "echo $EDGETOOL_PORTS",
        EDGETOOL_SCHEDULER_PORT_RANGE="25000-25010",
    )
    assert 25_000 <= int(ports.stdout) <= 25_010


def test_options_of_the_group_hold_for_its_commands(gpus: Shell) -> None:
    result = subprocess.run(
        [*EDGETOOL, "gpus", "--json", "reap", "--dry-run"], env=gpus.env, capture_output=True, text=True, timeout=60
    )
    assert json.loads(result.stdout)["plan"]["reaped"] == []


def test_watching_repeats_the_table_until_it_is_interrupted(gpus: Shell) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*EDGETOOL, "gpus", "--watch", "--interval", "0.1"], gpus.env)
    seen = b""
    while seen.count(b"driver 580.1") < 3:
        seen += os.read(terminal, 10_000)
    until = time.monotonic() + 60
    os.write(terminal, b"\x03")
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < until
        with suppress(OSError):  # the other end of the terminal is closed
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert b"\x1b[H" in seen


def test_it_answers_without_importing_anything_heavy(gpus: Shell) -> None:
    script = (
        "import sys, atexit\nsys.argv = ['edgetool', 'gpus', '--json']\n"
        "heavy = ['torch', 'transformers', 'rich', 'numpy', 'yaml', 'psutil', 'fastapi', 'httpx', 'pynvml']\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules], file=sys.stderr))\n"
        "from edgetool.__main__ import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], env=gpus.env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "HEAVY []" in result.stderr
