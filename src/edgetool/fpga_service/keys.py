"""The keys of clients: one given as a setting, or many with names in a file."""

from __future__ import annotations

import re
from pathlib import Path

from edgetool.errors import BadInput

_KEY = re.compile(r"[\x21-\x7e]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_READABLE_BY_OTHERS = 0o077


def read_keys(path: Path) -> dict[str, str]:
    """Name -> key, of a file with a line `NAME KEY` for each; empty lines and lines that begin with # count nothing.

    Raises BadInput: it cannot be read, others than its owner may read it, a line is not of that form, or a name or a
    key is there twice. No message holds a key.
    """
    try:
        open_to_others = path.stat().st_mode & _READABLE_BY_OTHERS
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadInput(f"cannot read the keys of {path}: {why}", "a line NAME KEY for each client") from error
    if open_to_others:
        raise BadInput(f"{path} holds keys and can be read or written by others", f"chmod 600 {path}")
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = line.strip().partition(" ")
        key = key.strip()
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise BadInput(
                f"{path}, line {number}: a name, a space and a key of printable ASCII were expected",
                "for instance: alice et-MbqF1kYtQy0",
            )
        if name in keys or key in keys.values():
            raise BadInput(f"{path}, line {number}: {name} or its key is there twice", "give each client its own")
        keys[name] = key
    if not keys:
        raise BadInput(f"{path} holds no key", "a line NAME KEY for each client")
    return keys
