"""Numbers into fp16, the board's only floating-point format in memory: what cannot be held is refused or counted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.tensor_file import to_float32
from edgetool.errors import BadInput

Array = npt.NDArray[Any]

_LARGEST = float(np.finfo(np.float16).max)


@dataclass
class Loss:
    """What fp16 could not hold of one tensor: values that rounding changed, made zero, and by how much at most."""

    changed: int = 0
    to_zero: int = 0
    values: int = 0
    largest_relative: float = 0.0


@dataclass
class Losses:
    """Losses by tensor; shared by the threads of a run."""

    by_tensor: dict[str, Loss] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, wide: Array, half: Array) -> None:
        """Compare float32 `wide` with its fp16 rounding `half`."""
        back = half.astype(np.float32)
        changed = back != wide
        count = int(np.count_nonzero(changed))
        with self._lock:
            loss = self.by_tensor.setdefault(name, Loss())
            loss.values += wide.size
            if count:
                before, after = wide[changed], back[changed]
                loss.changed += count
                loss.to_zero += int(np.count_nonzero(after == 0))
                relative = float(np.max(np.abs((after - before) / before)))
                loss.largest_relative = max(loss.largest_relative, relative)

    def merge(self, other: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the losses of one matrix, as `to_dict` gives them."""
        with self._lock:
            for name, part in other.items():
                loss = self.by_tensor.setdefault(name, Loss())
                loss.changed += part["changed"]
                loss.to_zero += part["to_zero"]
                loss.values += part["values"]
                loss.largest_relative = max(loss.largest_relative, part["largest_relative"])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For the ledger of a run."""
        return {name: asdict(loss) for name, loss in sorted(self.by_tensor.items())}

    def to_list(self) -> list[dict[str, Any]]:
        """One record for each tensor that lost something, sorted by name."""
        return [
            {
                "tensor": name,
                "values": loss.values,
                "changed": loss.changed,
                "became_zero": loss.to_zero,
                "largest_relative_change": loss.largest_relative,
            }
            for name, loss in sorted(self.by_tensor.items())
            if loss.changed
        ]


def to_half(stored: Array, dtype: str, name: str, losses: Losses) -> Array:
    """float16 of an array of safetensors dtype `dtype` (BF16 as uint16), any shape.

    Raises BadInput, naming `name`, for NaN, infinity and values beyond fp16's 65504; what is rounded goes to `losses`.
    """
    if dtype == "F16":
        refuse_not_finite(stored, name)
        return stored.astype(np.float16, copy=False)
    wide = to_float32(stored, dtype)
    refuse_not_finite(wide, name)
    largest = float(np.max(np.abs(wide), initial=0.0))
    with np.errstate(over="ignore", under="ignore"):
        half = wide.astype(np.float16)
    if not bool(np.isfinite(half).all()):
        count = int(np.count_nonzero(~np.isfinite(half)))
        raise BadInput(f"{name}: {count} values are beyond fp16's largest, {_LARGEST:g} (the largest is {largest:g})")
    losses.add(name, wide, half)
    return half


def refuse_not_finite(values: Array, name: str) -> None:
    """Raise BadInput with a count where `values` hold NaN or infinity."""
    finite = np.isfinite(values)
    if not bool(finite.all()):
        raise BadInput(f"{name}: {int(np.count_nonzero(~finite))} of {values.size} values are NaN or infinite")
