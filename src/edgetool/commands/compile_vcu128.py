"""`edgetool compile-vcu128`: registered, and not built yet."""

from __future__ import annotations

from edgetool.commands import _options as o
from edgetool.commands._later import not_built


def compile_vcu128(json: o.Json = None) -> None:
    """Compile a checkpoint for a VCU128 board (not built yet).

    Every use answers in one sentence and ends with exit code 5.
    """
    not_built("compile-vcu128")
