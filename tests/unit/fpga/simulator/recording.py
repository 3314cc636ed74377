"""What the simulator did, operation by operation, to be compared with an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgetool.fpga.simulator.interfaces import BoundOp, Call


class Recording:
    """A Trace that keeps every result: (part, layer, number) -> list of arrays, one of each call."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int, int], list[np.ndarray]] = {}
        self.kinds: dict[tuple[str, int, int], str] = {}

    def step(self, op: BoundOp, call: Call, result: torch.Tensor | None, seconds: float) -> None:
        assert result is not None and seconds >= 0
        key = (op.part, op.layer, op.number)
        self.kinds[key] = op.kind
        self.calls.setdefault(key, []).append(result.numpy().copy())

    def of_token(self, key: tuple[str, int, int], position: int) -> np.ndarray:
        """The result for the token at `position`: [channels], of scores [heads, keys that it sees]."""
        seen = 0
        for array in self.calls[key]:
            scores = self.kinds[key] in ("QK", "SOFTMAX")
            tokens = array.shape[1] if scores else array.shape[0]
            if position < seen + tokens:
                mine = position - seen
                return array[:, mine, : position + 1] if scores else array[mine]
            seen += tokens
        raise AssertionError(f"{key}: no token {position}")


def bits(values: Any) -> np.ndarray:
    """Bit patterns of fp16 numbers, every NaN the same."""
    array = np.asarray(values, dtype=np.float16)
    return np.where(np.isnan(array), np.uint16(0x7E00), array.view(np.uint16))
