"""What a compilation is asked for, as the compiler sees it (config.py checks and explains each value)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class CompileSettings:
    """bits, group_size, desc_act, max_context: None means as the checkpoint has it (max_context: 2048 at most).

    lm_head: rtn4, fp16 or None (then it must be quantised). int4: twos or signmag. requant: sym or None.
    """

    profile: str = "sim"
    max_context: int | None = None
    lm_head: str | None = None
    int4: str = "twos"
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    requant: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
