"""The key of a server: given, or made here; one that was typed as an option is taken out of what everybody can read."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from edgetool.config import Config
from edgetool.config_sources import COMMAND_LINE
from edgetool.errors import ConfigError
from edgetool.progress import Progress
from edgetool.serving.auth import new_key


@dataclass(frozen=True)
class Key:
    """The key of the servers; `generated` here, so that it has to be told to the user."""

    text: str
    generated: bool


def choose_key(config: Config, progress: Progress) -> Key:
    """The key that was given, or a new one. Raises as `given_key`."""
    given = given_key(config, progress)
    return Key(new_key(), True) if given is None else Key(given, False)


def given_key(config: Config, progress: Progress) -> str | None:
    """The key that was given, None without one. One given as an option is taken out of what `ps` shows.

    Raises ConfigError for a key that no client could send.
    """
    given = config.common.server_key()
    if given is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", given):
        raise ConfigError("api_key must be printable ASCII without spaces, and at least one character")
    if config.origins.get("common.api_key") == COMMAND_LINE:
        hidden = hide_argument(given)
        state = "it is hidden now, but was to be seen at first" if hidden else "everybody on this machine can read it"
        progress.warn(f"--api-key stands in the arguments: {state}; set EDGETOOL_API_KEY instead")
    return given


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
