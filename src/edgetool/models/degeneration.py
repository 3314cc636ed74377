"""Whether a generated sequence is language or what broken weights say. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def degenerate(tokens: Sequence[Hashable]) -> str | None:
    """Why a generated sequence is not language, or None. Short sequences are given the benefit of the doubt."""
    if len(tokens) < 8:
        return None
    token, count = Counter(tokens).most_common(1)[0]
    if count > len(tokens) // 2:
        return f"token {token!r} makes up {count} of {len(tokens)} tokens"
    if len(set(tokens)) <= max(3, len(tokens) // 8):
        return f"only {len(set(tokens))} different tokens in {len(tokens)}"
    return None
