"""`fast`: the image's model in float32, with neighbouring operations fused and 4-bit products in bfloat16.

Nothing is promised to the bit; `compile-vcu128 --verify-run` measures how far it is from float32 throughout. The cache
is the image's, in fp16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgetool.fpga.simulator.fast_cache import DeviceKvCache
from edgetool.fpga.simulator.fast_fusions import Fusions
from edgetool.fpga.simulator.interfaces import BoundOp, KvStore, NumericsName, Resources, Step
from edgetool.fpga.simulator.kv_cache import KvCache, KvGeometry

_LITTLE_WORK = 1 << 28
"""Products below which one thread is as fast as several."""


class FastNumerics:
    """The `fast` way to compute, for one image. device: "cpu" or "cuda..."."""

    name: NumericsName = "fast"
    logits_dtype = torch.float32

    def __init__(self, geometry: KvGeometry, device: str = "cpu") -> None:
        self._geometry = geometry
        self._device = torch.device(device)
        self._weights = 0

    def new_cache(self) -> KvStore:
        if self._device.type == "cpu":
            return KvCache(self._geometry)
        return DeviceKvCache(self._geometry, self._device)

    def threads(self, tokens: int, available: int) -> int:
        """One for little work: meeting at the end of each short step takes as long as the step."""
        return available if tokens * self._weights > _LITTLE_WORK else 1

    def compile(self, ops: Sequence[BoundOp], resources: Resources, traced: bool) -> list[Step]:
        makes = Fusions(resources, self._device)
        steps: list[Step] = []
        at = 0
        while at < len(ops):
            count, run = (1, makes.single(ops[at])) if traced else makes.fused(ops[at:])
            steps.append(Step(ops[at + count - 1], run))
            at += count
        self._weights += makes.weights
        return steps
