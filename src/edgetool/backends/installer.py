"""Making and removing the environments of backends/environments.py: `python -m venv`, pip, and a stamp at the very end.

An environment is built where it will be used, since its scripts name their interpreter by an absolute path. Until the
stamp is there nobody uses it, and the next installation starts from nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import atomic_write
from edgetool.backends.environments import (
    STAMP_NAME,
    STAMP_SCHEMA,
    Recipe,
    lock_of,
    locked,
    look,
    normal,
    place_errors,
    place_of,
    probe,
    refuse_yours,
)
from edgetool.config import EnvsConfig
from edgetool.errors import BadInput, ConfigError, EdgetoolError, MissingDependency, ResourceUnavailable
from edgetool.process import Child
from edgetool.progress import Progress, Task
from edgetool.progress_lines import size

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_MACHINES = {"x86_64", "AMD64"}
_LOCK_WAIT_S = 10.0
# They would put the packages elsewhere than into the environment, or other packages into it.
_UNWANTED = {
    *("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_REQUIRE_VIRTUALENV", "VIRTUAL_ENV"),
    *("PIP_REQUIREMENT", "PIP_EDITABLE", "PIP_NO_DEPS", "PIP_DRY_RUN", "PIP_REPORT", "PIP_QUIET"),
}
_COLLECTED = re.compile(
    r"(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9][A-Za-z0-9._-]*)|Processing \S*/(\w[\w.]*)-\d"
)
_LOADING = re.compile(r"\s*(?:Downloading|Using cached) (\S+?)-\d\S* ?(\(.*\))?")
_BUILDING = re.compile(r"\s*Building wheel for (\S+)")
_NO_SPACE = re.compile(
    r"No space left on device|Errno 28\]|Disk quota exceeded|Errno 122\]|not enough free disk space", re.I
)
_NO_NETWORK = re.compile(
    r"name resolution|Name or service not known|NewConnectionError|ConnectTimeoutError|ReadTimeout|Max retries exceeded"
    r"|Network is unreachable|ProxyError|Connection refused|Connection reset|RemoteDisconnected|Could not fetch URL"
    r"|IncompleteRead|Connection aborted|Connection broken|SSLError|getaddrinfo failed"
)
_NO_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement (\S+) .*\(from versions: none\)")
_NOT_THERE = re.compile(r"No matching distribution found for (\S+)")


def install(recipe: Recipe, settings: EnvsConfig, *, offline: bool, progress: Progress) -> dict[str, Any]:
    """Make the environment, unless it is there and made from the same list; returns what there is to show.

    Raises:
        ConfigError: it is an interpreter of the user's own, or `--python` cannot be used.
        MissingDependency: no fitting Python, or not the machine that the list is for.
        ResourceUnavailable: disk full, no network, or another process installs or uses it.
        BackendFailed: pip failed otherwise.
    """
    refuse_yours(recipe, settings, "install")
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise MissingDependency(
            f"{recipe.name} needs Linux on x86_64, and this is {sys.platform} on {platform.machine()}"
        )
    place = place_of(recipe, settings)
    with place_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _locked_when_free(recipe, settings, progress) as lock:
        there = look(recipe, settings)
        if there.state == "ready" and settings.build_python is None:
            return {"name": recipe.name, "python": str(there.python), "changed": False, "packages": len(recipe.pins())}
        base = base_python(recipe, settings)
        _refuse_full_disk(recipe, place)
        begun = time.monotonic()
        try:
            _build(recipe, settings, base, place, lock, offline=offline, progress=progress)
        except BaseException:
            progress.note(f"deleting what was installed of {recipe.name}")
            _delete(place)  # it is of no use, and may be what fills the disk
            raise
        seconds = time.monotonic() - begun
    python = str(place / "bin" / "python")
    return {"name": recipe.name, "python": python, "changed": True, "packages": len(recipe.pins()), "seconds": seconds}


def remove(recipe: Recipe, settings: EnvsConfig) -> dict[str, Any]:
    """Delete the environment, installed or half so; returns what there is to show.

    Raises:
        ConfigError: it is an interpreter of the user's own.
        ResourceUnavailable: it is in use.
    """
    refuse_yours(recipe, settings, "remove")
    place = place_of(recipe, settings)
    if not place.exists():
        return {"name": recipe.name, "removed": False}
    with locked(lock_of(recipe, settings), recipe, exclusive=True):
        _delete(place)
        log_of(place).unlink(missing_ok=True)
    if place.exists():
        raise BadInput(f"{place} could not be deleted", "see who owns its files")
    return {"name": recipe.name, "removed": True}


def log_of(place: Path) -> Path:
    """The log of the last installation, which outlives a failed one."""
    return place.with_name(f"{place.name}.log")


def base_python(recipe: Recipe, settings: EnvsConfig) -> Path:
    """The interpreter to build with: `--python`, else ours, else the newest fitting one on PATH.

    Raises:
        ConfigError: `--python` names none, or one of a version that the list is not for.
        MissingDependency: there is no fitting one.
    """
    (low, high), given = recipe.python, settings.build_python
    wanted = f"Python {_dotted(low)}" + (f" to {_dotted(high)}" if high != low else "")
    if given is not None:
        found = shutil.which(f"python{given}" if re.fullmatch(r"3\.\d+", given) else os.path.expanduser(given))  # noqa: PTH111
        if found is None:
            raise ConfigError(f"--python {given}: there is no such interpreter", "give its path")
        try:
            version = probe(Path(found))
        except MissingDependency as error:
            raise ConfigError(f"--python {given}: {error.message}") from error
        if not low <= tuple(version["minor"]) <= high:
            raise ConfigError(f"--python {given} is Python {version['version']}, and {recipe.name} needs {wanted}")
        return Path(found)
    names = [sys.executable, *(f"python3.{minor}" for minor in range(high[1], low[1] - 1, -1)), "python3"]
    for name in names:
        found = shutil.which(name)
        with contextlib.suppress(MissingDependency):
            if found and low <= tuple(probe(Path(found))["minor"]) <= high:
                return Path(found)
    raise MissingDependency(f"{recipe.name} needs {wanted}, and there is none on PATH", "name one with --python")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@contextlib.contextmanager
def _locked_when_free(recipe: Recipe, settings: EnvsConfig, progress: Progress) -> Iterator[int]:
    """The exclusive lock; waits a moment for a pip that is being ended after its edgetool was killed."""
    until = time.monotonic() + _LOCK_WAIT_S
    with contextlib.ExitStack() as held:
        while True:
            try:
                descriptor = held.enter_context(locked(lock_of(recipe, settings), recipe, exclusive=True))
                break
            except ResourceUnavailable as error:
                if time.monotonic() >= until:
                    raise
                if until - time.monotonic() > _LOCK_WAIT_S - 0.1:
                    progress.note(f"{error.message}; waiting {_LOCK_WAIT_S:.0f} s for it")
                time.sleep(0.2)
        yield descriptor


def _refuse_full_disk(recipe: Recipe, place: Path) -> None:
    free = shutil.disk_usage(place.parent).free
    if free < recipe.disk_bytes:
        raise ResourceUnavailable(
            f"{recipe.name} needs about {size(recipe.disk_bytes)} in {place.parent}, and {size(free)} are free",
            "free some space, or choose another --directory",
        )


def _delete(place: Path) -> None:
    (place / STAMP_NAME).unlink(missing_ok=True)  # first, so that a kill half way leaves nothing that looks whole
    shutil.rmtree(place, ignore_errors=True)


def _build(
    recipe: Recipe, settings: EnvsConfig, base: Path, place: Path, lock: int, *, offline: bool, progress: Progress
) -> None:
    _delete(place)
    log = log_of(place)
    log.unlink(missing_ok=True)
    pip = _Pip(recipe, settings, place, log, lock, offline=offline)
    pins = recipe.pins()
    with progress.task(f"install {recipe.name}", len(pins), "package") as task, as_file(recipe.file()) as listed:
        task.advance(0, f"making an environment with {base}")
        pip.run(venv_command(base, place), task)
        wanted = [pin for pin in [recipe.first] if pin in pins]
        for pin in wanted:
            # With its dependencies, for which build of it the index has is not known here; held to the list's versions.
            pip.install([f"{pin}{pip.equals()}{pins[pin]}", "--constraint", listed, *pip.torch_index(progress)], task)
        # Nothing may bring others along: that is how CUDA builds and newer versions get in.
        pip.install(["--no-deps", "--requirement", listed], task)
        task.advance(0, f"importing {recipe.module}")
        pip.run([pip.python, "-I", "-c", f"import {recipe.module}"], task)
        task.advance(len(pins) - len(pip.seen), "done")
    version = probe(pip.python, recipe.module)
    wrong = without_cuda(recipe, {normal(package): number for package, number in version["packages"].items()})
    if wrong:
        raise BadInput(
            f"{recipe.name} needs builds with CUDA, and pip found {', '.join(wrong)}",
            "see which index it is from (pip config list), or name another with --torch-index",
        )
    stamp = {
        "schema": STAMP_SCHEMA,
        "name": recipe.name,
        "list_sha256": recipe.sha256(),
        "abi": version["abi"],
        "python_version": version["version"],
        "made_by": f"edgetool {__version__}",
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    os.sync()  # the stamp must not reach the disk before what it vouches for
    with place_errors(place):
        atomic_write(place / STAMP_NAME, json.dumps(stamp, indent=2).encode() + b"\n")


def venv_command(base: Path, place: Path) -> list[str | Path]:
    """What makes an empty environment."""
    return [base, "-I", "-m", "venv", "--clear", place]


class _Pip:
    """Commands of one installation: their environment, their log, and what their output says."""

    def __init__(
        self, recipe: Recipe, settings: EnvsConfig, place: Path, log: Path, lock: int, *, offline: bool
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        self.python = place / "bin" / "python"
        self.log = log
        self.lock = lock
        self.offline = offline
        self.seen: set[str] = set()
        self._pins = recipe.pins()
        self._lines: list[str] = []

    def install(self, arguments: Sequence[str | Path], task: Task) -> None:
        """`pip install` in the environment."""
        options: list[str | Path] = ["--disable-pip-version-check", "--no-input", "--no-color"]
        source: list[str | Path] = ["--no-index"] if self.offline else []
        if self.settings.find_links is not None:
            source += ["--find-links", self.settings.find_links.absolute()]
        self.run([self.python, "-I", "-m", "pip", *options, "install", *source, *arguments], task)

    def torch_index(self, progress: Progress) -> list[str]:
        """Where torch comes from: PyPI's builds carry CUDA, several GB that a machine without a GPU has no use for."""
        index = self.settings.torch_index
        if index is None and not self.recipe.cuda and not self.offline and not has_nvidia_driver():
            index = TORCH_CPU_INDEX if _answers(f"{TORCH_CPU_INDEX}/torch/") else None
            if index is None:
                progress.note(f"{TORCH_CPU_INDEX} does not answer; torch is taken from the usual index")
        return [] if index is None or self.offline else ["--extra-index-url", index]

    def equals(self) -> str:
        """How torch's version is asked for: builds without CUDA (2.13.0+cpu) count as newer than those with it."""
        return "===" if self.recipe.cuda and self.settings.torch_index is None else "=="

    def run(self, command: Sequence[str | Path], task: Task) -> None:
        """Run a command to its end, under supervision, and read its progress."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _UNWANTED and not name.startswith(("PYTHON", "EDGETOOL_"))
        }
        self._lines.clear()
        with Child.start(command, log=self.log, env=environment, cwd=self.log.parent, pass_fds=[self.lock]) as child:
            code = child.wait(on_line=lambda line: self._read(line, task))
        if code:
            raise self._failure(child)

    def _read(self, line: str, task: Task) -> None:
        self._lines.append(line)
        if found := _COLLECTED.match(line):
            name = normal(found[1] or found[2])
            if name in self._pins and name not in self.seen:
                self.seen.add(name)
                task.advance(1, name)
        elif found := _LOADING.match(line):
            task.advance(0, f"{found[1]} {found[2] or ''}".strip())
        elif found := _BUILDING.match(line):
            task.advance(0, f"building {found[1]}")
        elif line.startswith("Installing collected packages:"):
            task.advance(0, f"unpacking {line.count(',') + 1} packages")

    def _failure(self, child: Child) -> EdgetoolError:
        text = "\n".join(self._lines)
        name, tail = self.recipe.name, "\n".join(self._lines[-5:])
        where = f"; log: {self.log}\n{tail}"
        if _NO_SPACE.search(text):
            return ResourceUnavailable(
                f"the disk is full: {name} could not be installed{where}", "free some space and repeat"
            )
        if "ensurepip" in text:
            return MissingDependency(
                f"this Python cannot make environments: its module ensurepip is missing{where}",
                "install it (Debian, Ubuntu: the package python3-venv), or name another Python with --python",
            )
        if not self.offline and _NO_NETWORK.search(text):
            return ResourceUnavailable(
                f"no network: the package index could not be reached, and {name} not installed{where}",
                "repeat it when there is one, or give a directory of wheels: --find-links DIR --offline",
            )
        if self.offline and (missing := _NOT_THERE.search(text)):
            source = self.settings.find_links
            return ResourceUnavailable(
                f"offline: {missing[1]} is not in {source or 'any directory given by --find-links'}{where}",
                f"where there is a network: pip download --no-deps -r {self.recipe.file()} -d DIR",
            )
        if none := _NO_VERSIONS.search(text):  # pip does not tell an index that is silent from one that is empty
            return ResourceUnavailable(
                f"the package index does not answer, or does not have {none[1]}: {name} could not be installed{where}",
                "look at the network and at pip's settings (pip config list)",
            )
        return child.failure(f"{name} could not be installed")


def without_cuda(recipe: Recipe, installed: Mapping[str, str]) -> list[str]:
    """The packages of an environment for GPUs that cannot use them, as `torch 2.13.0+cpu`.

    `installed`: package -> version.
    """
    built = ((name, installed.get(name, "")) for name in recipe.pins()) if recipe.cuda else ()
    return [f"{name} {version}" for name, version in built if version.endswith("+cpu")]


def has_nvidia_driver() -> bool:
    """Whether a driver of NVIDIA GPUs runs on this machine."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _answers(address: str) -> bool:
    import httpx

    try:
        return httpx.head(address, timeout=5.0, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False
