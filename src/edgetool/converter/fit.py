"""One quantised linear made to fit another format without changing a single weight, or the reason why it cannot."""

from __future__ import annotations

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import Spec


class Refused(Exception):
    """Why a linear has no lossless form in the target format; the caller adds the module's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def fit(linear: QuantizedLinear, target: str, spec: Spec) -> QuantizedLinear:
    """`linear` as `target` (a name of FORMATS, or gguf) stores it under `spec`, every weight bit-equal.

    Raises Refused with the first reason that stands against it.
    """
    raise NotImplementedError
