"""`edgetool convert`: registered, and not built yet."""

from __future__ import annotations

from edgetool.commands import _options as o
from edgetool.commands._later import not_built


def convert(json: o.Json = None) -> None:
    """Convert a checkpoint to another layout (not built yet).

    Every use answers in one sentence and ends with exit code 5.
    """
    not_built("convert")
