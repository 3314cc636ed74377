"""A secret that was typed as an option: taken out of the arguments that everybody can read."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def hide_argument(secret: str) -> bool:
    """Overwrite `secret`, where it is an argument or what follows an equals sign, with stars in what `ps` shows.

    The kernel shows the memory that it put them in at the start (proc(5): arg_start, arg_end), so that is written to.
    False where that cannot be done. It was to be seen until now, and stays in the shell's history.
    """
    wanted = secret.encode()
    try:
        # proc(5): fields are counted from the last bracket, since the name before it may hold anything
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
    if not wanted or not 0 < start < end or len(shown) > end - start:
        return False
    hidden = False
    for match in re.finditer(rb"(?<=[\0=])" + re.escape(wanted) + rb"(?=\0|$)", shown):
        ctypes.memmove(start + match.start(), b"*" * len(wanted), len(wanted))
        hidden = True
    return hidden and Path("/proc/self/cmdline").read_bytes() != shown
