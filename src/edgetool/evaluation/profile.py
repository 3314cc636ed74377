"""The eval profile: everything that decides a score but the model, hashed, so that only like is compared with like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Profile:
    """What both sides are asked, and how. `content` holds JSON values only."""

    content: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 (64 hex digits) of the content as canonical JSON."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The content and its hash, for results.json."""
        return {"hash": self.hash, **self.content}
