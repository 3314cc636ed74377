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
from collections.abc import Iterator, Mapping
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
from edgetool.backends.pip_run import Pip
from edgetool.config import EnvsConfig
from edgetool.errors import BadInput, ConfigError, MissingDependency, ResourceUnavailable
from edgetool.progress import Progress
from edgetool.progress_lines import size

_MACHINES = {"x86_64", "AMD64"}
_LOCK_WAIT_S = 10.0


def install(recipe: Recipe, settings: EnvsConfig, *, offline: bool, progress: Progress) -> dict[str, Any]:
    """Make the environment, unless it is there and made from the same list; returns what there is to show.

    Raises:
        ConfigError: it is an interpreter of the user's own, or `--python` or `--find-links` cannot be used.
        MissingDependency: no fitting Python, or not the machine that the list is for.
        ResourceUnavailable: disk full, no network, or another process installs or uses it.
        BackendFailed: pip failed otherwise.
    """
    refuse_yours(recipe, settings, "install")
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise MissingDependency(
            f"{recipe.name} needs Linux on x86_64, and this is {sys.platform} on {platform.machine()}"
        )
    wheels = settings.find_links
    if wheels is not None and not wheels.exists():  # pip would look elsewhere, and speak of versions
        raise ConfigError(
            f"--find-links {wheels}: there is no such directory", "give the directory that has the wheels"
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
    pip = Pip(recipe, settings, place, log, lock, offline=offline)
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


def without_cuda(recipe: Recipe, installed: Mapping[str, str]) -> list[str]:
    """The packages of an environment for GPUs that cannot use them, as `torch 2.13.0+cpu`.

    `installed`: package -> version.
    """
    built = ((name, installed.get(name, "")) for name in recipe.pins()) if recipe.cuda else ()
    return [f"{name} {version}" for name, version in built if version.endswith("+cpu")]
