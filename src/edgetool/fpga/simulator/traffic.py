"""Bytes read from each pseudo-channel, counted where they are read, and the manifest's plan to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.errors import VerificationFailed

Array = npt.NDArray[Any]

PORTS = 32
KV = "kv"


@dataclass
class Traffic:
    """by_role: role of a matrix, or `kv` -> int64 [32] bytes. tokens, calls: what was fed meanwhile."""

    by_role: dict[str, Array] = field(default_factory=dict)
    tokens: int = 0
    calls: int = 0

    def read(self, role: str, bytes_per_pc: Array) -> None:
        """Count bytes [32] that an operation has read."""
        if role in self.by_role:
            self.by_role[role] += bytes_per_pc
        else:
            self.by_role[role] = bytes_per_pc.astype(np.int64)

    @property
    def per_pc(self) -> Array:
        """int64 [32], all roles together."""
        return sum(self.by_role.values(), np.zeros(PORTS, dtype=np.int64))

    @property
    def weight_bytes(self) -> int:
        return sum(int(count.sum()) for role, count in self.by_role.items() if role != KV)

    @property
    def kv_bytes(self) -> int:
        return int(self.by_role[KV].sum()) if KV in self.by_role else 0

    def reset(self) -> None:
        """Count from 0 again."""
        self.by_role, self.tokens, self.calls = {}, 0, 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "calls": self.calls,
            "bytes_per_pc": [int(count) for count in self.per_pc],
            "bytes_by_role": {role: int(count.sum()) for role, count in sorted(self.by_role.items())},
        }


def expected_decode_bytes(memory: Mapping[str, Any], context_tokens: int) -> dict[str, int]:
    """Role -> bytes of one decoded token by the manifest's plan. context_tokens: with the token itself."""
    plan = {str(role): int(count) for role, count in memory["read_bytes_by_role"].items()}
    return plan | {KV: int(memory["kv_bytes_per_token"]) * context_tokens}


def check_plan(where: str, found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Raises VerificationFailed naming the first role whose bytes are not those of the plan."""
    for role in sorted({*found, *expected}):
        if found.get(role, 0) != expected.get(role, 0):
            raise VerificationFailed(
                f"{where}: the plan says {expected.get(role, 0):,} B a token for {role};"
                f" reading took {found.get(role, 0):,} B",
                "compile the checkpoint again: manifest.json does not belong to these weights",
            )
