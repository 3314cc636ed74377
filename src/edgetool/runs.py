"""What every long run needs around its work: a place that is not its input, an orderly stop, facts for its report."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from edgetool import __version__
from edgetool.artifacts import OutputDirectory, sha256_file
from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable
from edgetool.messages import translated
from edgetool.progress_lines import size

_CGROUP = Path("/sys/fs/cgroup")


def refuse_overlap(out: OutputDirectory, inputs: list[Path]) -> None:
    """Raise BadInput where writing the output could touch what is read: one inside the other, or both the same."""
    for path in inputs:
        if not path.exists():
            continue
        model = path.resolve()
        for place in (out.output.resolve(), out.partial.resolve()):
            if place == model or model in place.parents or place in model.parents:
                raise BadInput(f"output {out.output} and {path} must not lie in one another", "choose another --output")


def free_disk_bytes(output: Path, needed_bytes: int, what: str) -> int:
    """Bytes free on the disk that will hold `output`; raise ResourceUnavailable where `what` needs more."""
    place = existing_parent(output)
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise ResourceUnavailable(
            f"{what} needs about {size(needed_bytes)} of disk, {place} has {size(free_bytes)} free",
            "choose an --output on a larger disk",
        )
    return free_bytes


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal acts as usual. Only the main thread can catch signals."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    words = translated("stopping after the step at hand; again to stop at once")
    said = f"{words}\n".encode(sys.stderr.encoding or "utf-8", "replace")

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[number])
        os.write(2, said)  # print() is not reentrant

    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FileHashes:
    """SHA-256 of files, taken in threads beside the work."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "sha256")
        self._found: dict[Path, Future[str]] = {}

    def add(self, path: Path) -> None:
        """Hash `path`, which no longer changes."""
        self._found[path] = self._pool.submit(sha256_file, path)

    def of(self, paths: Iterable[Path]) -> dict[str, str]:
        """File name -> hash; waits for those that are not ready."""
        return {path.name: self._found[path].result() for path in paths}

    def one(self, path: Path) -> str:
        """The hash of a file that was added; waits for it."""
        return self._found[path].result()

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def memory_peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def need_packages(who: str, extra: str, *names: str) -> None:
    """Raise MissingDependency for the first of `names` that is not installed; none is imported, which costs seconds.

    who: what needs them. extra: of edgetool's own, which brings them.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(f"{who} needs {name}, which is not installed", f"pip install 'edgetool[{extra}]'")


def available_memory_bytes() -> int:
    """Memory that can be had now: what is free on this machine, or less where a control group limits it.

    Cached file pages count as free in both (Linux: MemAvailable; cgroup v2: memory.current less inactive_file).
    """
    free = int(psutil.virtual_memory().available)
    try:
        used = int((_CGROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, max(0, int((_CGROUP / "memory.max").read_text()) - used + int(kept["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no such group, or "max": no limit
        return free


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions of edgetool, Python and those of `packages` that are installed."""
    versions = {"edgetool": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
