"""The eval profile: everything that decides a score but the model, hashed, so that only like is compared with like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetool.errors import BadInput
from edgetool.ledger import first_difference


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


def refuse_other_profile(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise BadInput where two profiles (`Profile.to_dict`) differ, naming the first thing that does."""
    one, other = ({key: value for key, value in profile.items() if key != "hash"} for profile in (first, second))
    found = first_difference(one, other)
    if found is not None or first.get("hash") != second.get("hash"):
        name, before, after = found or ("hash", first.get("hash"), second.get("hash"))
        raise BadInput(
            f"{names[0]} and {names[1]} were measured with different profiles: {name} is {_short(before)} and "
            f"{_short(after)}",
            "measure both with the same options and data, or in one run with --against",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
