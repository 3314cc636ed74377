"""What no limit of the kernel counts for a whole tree of processes: looked at again and again, from outside.

Memory by resident pages, which misses what lies in no process (pipes, files in memory): hence also the machine's own,
so that a run is ended before the machine suffers.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from edgetool.process.tree import descendants

_INTERVAL_S = 0.1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MOST_FILES = 10_000


class Watch:
    """Looks at the tree below process `root`; scratch: directory whose size counts, None where the kernel limits it."""

    def __init__(self, root: int, memory_bytes: int, disk_bytes: int, scratch: Path | None) -> None:
        self._root = root
        self._disk_bytes = disk_bytes
        self._scratch = scratch
        self._next = time.monotonic() + _INTERVAL_S
        total, available = machine_memory_bytes()
        # this tree meets its own limit before it can bring the machine to that of the machine
        self._memory_bytes = min(memory_bytes, available * 3 // 4)
        self._least_available_bytes = min(total // 20, 512 << 20, available // 8)

    def broken(self) -> str | None:
        """What is broken: "memory" or "disk" by this tree, "machine" whose memory others use up; or None.

        Looks some ten times a second.
        """
        if time.monotonic() < self._next:
            return None
        try:
            if sum(resident_bytes(process.pid) for process in descendants(self._root)) > self._memory_bytes:
                return "memory"
            if machine_memory_bytes()[1] < self._least_available_bytes:
                return "machine"
            if self._scratch is not None and _disk_bytes(self._scratch) > self._disk_bytes:
                return "disk"
        finally:
            self._next = time.monotonic() + _INTERVAL_S
        return None


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: pages shared with files do not count. 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES + _shared_memory_bytes(pid)


def _shared_memory_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, _, rest = text.partition("RssShmem:")
    return int(rest.split()[0]) * 1024 if rest else 0


def machine_memory_bytes() -> tuple[int, int]:
    """Total and available memory of the machine; read here, so that a bare interpreter can run the sandbox."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0]) * 1024
    return found["MemTotal"], found.get("MemAvailable", found["MemFree"])


def _disk_bytes(directory: Path) -> int:
    """Blocks below `directory`; as good as endless where there are more files than can be looked at."""
    total = count = 0
    for place, directories, files in os.walk(directory):
        count += len(directories) + len(files)
        if count > _MOST_FILES:
            return 1 << 62
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118  a hot loop
            except OSError:
                continue
    return total
