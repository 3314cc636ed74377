"""What stands in the way of an environment: of using it, or of installing it on this machine."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from edgetool.backends.environments import RECIPES, Environment, Recipe, look, normal, place_of, probe, recipe_of
from edgetool.backends.installer import base_python, without_cuda
from edgetool.backends.pip_run import has_nvidia_driver
from edgetool.config import EnvsConfig
from edgetool.errors import EdgetoolError, MissingDependency
from edgetool.progress_lines import size

_DRIVERS = {"12": 525, "13": 580}
"""Major version of CUDA -> the first driver it runs on (CUDA Compatibility guide, minor version compatibility)."""


class Check(NamedTuple):
    """One thing that was looked at."""

    check: str
    ok: bool
    found: str


def examine(recipe: Recipe, settings: EnvsConfig) -> dict[str, Any]:
    """Look at one environment and at what it needs of the machine.

    Returns:
        name, state, usable (ready, and nothing found against it), installable (None when it is there), and
        checks (check, ok, found).
    """
    there = look(recipe, settings)
    needs = _machine(recipe)
    if there.state == "ready":
        checks = [*needs, Check("environment is ready", True, "ready"), *_contents(there)]
        installable = None
    else:
        install = [] if there.yours else [*_python(recipe, settings), *_disk(recipe, settings)]
        checks = [*needs, Check("environment is ready", False, str(there.why)), *install]
        # A driver is for using it: machines that share a disk may install where there is none.
        installable = not there.yours and all(check.ok for check in (needs[0], *install))
    return {
        "name": recipe.name,
        "purpose": recipe.purpose,
        "state": there.state,
        "yours": there.yours,
        "python": str(there.python),
        "usable": there.state == "ready" and all(check.ok for check in checks),
        "installable": installable,
        "checks": [check._asdict() for check in checks],
    }


def examine_all(settings: EnvsConfig) -> list[dict[str, Any]]:
    """`examine` for the environment that the settings name, or for all of them."""
    return [examine(recipe, settings) for recipe in ([recipe_of(settings.name)] if settings.name else RECIPES.values())]


def refuse_unusable(found: dict[str, Any]) -> None:
    """Raise MissingDependency when `examine` found something against an environment."""
    if not found["usable"]:
        wrong = "; ".join(f"{check['check']}: {check['found']}" for check in found["checks"] if not check["ok"])
        hint = f"edgetool envs install {found['name']}" if found["installable"] else None
        raise MissingDependency(f"the environment {found['name']} cannot be used: {wrong}", hint)


def overview(settings: EnvsConfig) -> list[dict[str, Any]]:
    """A row for each environment: what it is for, and whether it is there."""
    rows = []
    for recipe in RECIPES.values():
        there = look(recipe, settings)
        rows.append(
            {
                "name": recipe.name,
                "purpose": recipe.purpose,
                "state": "yours" if there.yours and there.state == "ready" else there.state,
                "python_version": there.python_version,
                "python": str(there.python) if there.state == "ready" else None,
                "made_at": there.made_at,
                "why": there.why if there.state not in ("ready", "absent") else None,
            }
        )
    return rows


def _machine(recipe: Recipe) -> list[Check]:
    machine = f"{sys.platform} on {platform.machine()}"
    checks = [Check("Linux on x86_64", machine == "linux on x86_64", machine)]
    if recipe.cuda:
        checks.append(_driver(recipe.cuda, driver_version() if has_nvidia_driver() else None))
    elif recipe.name == "vllm-cpu":
        flags = _cpu_flags()
        best = next((name for name in ("avx512f", "avx2") if name in flags), "neither")
        checks.append(Check("AVX2 or AVX512", best != "neither", best))
    return checks


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the NVIDIA driver, such as 580.65.06; empty where the driver does not say."""
    # e.g. "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  ..."
    found = re.search(r"Kernel Module(?:\s+for\s+\S+)?\s+(\d[\d.]*)", file.read_text()) if file.exists() else None
    return found[1] if found else ""


def _driver(cuda: str, version: str | None) -> Check:
    """`version`: None without a driver, empty for one of an unknown version."""
    least = _DRIVERS[cuda.partition(".")[0]]
    name = f"NVIDIA driver {least} or newer (CUDA {cuda})"
    if version is None:
        return Check(name, False, "no driver on this machine")
    return Check(name, not version or int(version.partition(".")[0]) >= least, version or "of unknown version")


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _python(recipe: Recipe, settings: EnvsConfig) -> list[Check]:
    low, high = (".".join(map(str, version)) for version in recipe.python)
    wanted = f"Python {low}" + (f" to {high}" if high != low else "")
    try:
        return [Check(wanted, True, str(base_python(recipe, settings)))]
    except EdgetoolError as error:
        return [Check(wanted, False, error.message)]


def _disk(recipe: Recipe, settings: EnvsConfig) -> list[Check]:
    place = place_of(recipe, settings)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return [Check(f"{size(recipe.disk_bytes)} of disk", free >= recipe.disk_bytes, f"{size(free)} free in {place}")]


def _contents(there: Environment) -> list[Check]:
    """The packages that are there beside those of the list, by their metadata: nothing of them is imported."""
    recipe = there.recipe
    told = probe(there.python, recipe.module)
    installed = {normal(name): version for name, version in told["packages"].items()}
    differences = [
        f"{name} {installed.get(name, 'missing')} (list: {pin})"
        for name, pin in recipe.pins().items()
        # a build's local label (2.13.0+cpu) names how it was built, not another release
        if installed.get(name, "").partition("+")[0] != pin.partition("+")[0]
    ]
    wrong = without_cuda(recipe, installed)
    build = Check("builds with CUDA", not wrong, ", ".join(wrong) or f"torch {installed.get('torch', 'missing')}")
    shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
    return [
        Check("interpreter", True, f"Python {told['version']}, {there.python}"),
        Check(f"module {recipe.module}", bool(told["found"]), "found" if told["found"] else "not found"),
        # in an interpreter of the user's own other versions are a choice
        Check("versions of the list", there.yours or not differences, shown or f"all {len(recipe.pins())} as listed"),
        *([build] if recipe.cuda else []),
    ]
