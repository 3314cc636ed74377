"""Shared memory that killed processes leave behind: the kernel keeps a named segment until somebody removes it.

vLLM passes messages through segments of Python's multiprocessing, whose names are drawn at random. Which belong to a
server is therefore written down while it runs, and they are removed when its processes have ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_DIRECTORY = Path("/dev/shm")  # noqa: S108
_PREFIXES = ("psm_", "sem.mp-")


def segments(pids: Iterable[int]) -> list[str]:
    """Names of the segments that these processes have mapped, in order."""
    found: set[str] = set()
    for pid in pids:
        found |= _mapped(pid)
    return sorted(found)


def remove(names: Iterable[str]) -> list[str]:
    """Remove those of `names` that are ours and that no process maps any more; returns what was removed."""
    wanted = {name for name in names if name.startswith(_PREFIXES) and "/" not in name}
    left = {name for name in wanted if _is_ours(_DIRECTORY / name)}
    if not left:
        return []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            left -= _mapped(int(path.name))
    for name in left:
        (_DIRECTORY / name).unlink(missing_ok=True)
    return sorted(left)


def _mapped(pid: int) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    paths = (line.partition(f"{_DIRECTORY}/")[2] for line in lines)
    return {path.removesuffix(" (deleted)") for path in paths if path.startswith(_PREFIXES)}


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False
