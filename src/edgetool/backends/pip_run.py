"""pip and other commands of one installation: what they inherit, what their output says, what their failure means."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from edgetool.backends.environments import Recipe, normal
from edgetool.config import EnvsConfig
from edgetool.errors import EdgetoolError, MissingDependency, ResourceUnavailable
from edgetool.process.child import Child
from edgetool.progress import Progress, Task

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

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


class Pip:
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


def has_nvidia_driver() -> bool:
    """Whether a driver of NVIDIA GPUs runs on this machine."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _answers(address: str) -> bool:
    import httpx

    try:
        return httpx.head(address, timeout=5.0, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False
