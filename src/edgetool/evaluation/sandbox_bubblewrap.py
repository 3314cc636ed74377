"""bubblewrap's command line for the world that sandbox_launcher.py builds itself where it may.

Some systems give namespaces to ordinary users by bwrap only: a set-user-id bwrap, or an AppArmor profile for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgetool.evaluation.sandbox_launcher import DEVICES, FACTS, INNER_UID, SYSTEM, SYSTEM_FILES


def words(program: str, readable: Sequence[str], scratch_bytes: int) -> list[str]:
    """The command up to the one that it is to run; needs bubblewrap 0.6 or later."""
    found = [program, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    found += ["--uid", str(INNER_UID), "--gid", str(INNER_UID), "--cap-drop", "ALL", "--die-with-parent"]
    found += ["--size", str(scratch_bytes), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]  # noqa: S108
    shown: list[str] = []
    for path in dict.fromkeys([*SYSTEM, *SYSTEM_FILES, *readable]):
        place = Path(path)
        if place.is_symlink() and path.count("/") == 1:
            found += ["--symlink", str(place.readlink()), path]
        elif place.exists() and not any(place.is_relative_to(other) for other in shown):
            found += ["--ro-bind", path, path]
            shown.append(path)
    for path in FACTS:
        found += ["--ro-bind-try", path, path]
    for path in DEVICES:
        found += ["--dev-bind-try", path, path]
    return [*found, "--remount-ro", "/", "--chdir", "/tmp", "--"]  # noqa: S108
