"""Memory for large arrays that is used again: fresh memory has to be cleared by the kernel first, page by page.

That costs more than moving packed words from one layout into another. The C library keeps small pieces for the next
array of the kind, but gives everything above 32 MiB back at once.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scratch:
    """Arrays by purpose. Each thread has one of a purpose at a time; the next one takes its place."""

    def __init__(self) -> None:
        self._own = threading.local()

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """As np.empty, in the memory that the thread's last array for `purpose` had."""
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        held: Array | None = getattr(self._own, purpose, None)
        if held is None or held.nbytes < needed:
            held = np.empty(needed, dtype=np.uint8)
            setattr(self._own, purpose, held)
        return held[:needed].view(dtype).reshape(shape)
