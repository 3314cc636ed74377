"""What using a simulated board can meet."""

from __future__ import annotations

from edgetool.errors import BadInput


class ContextFull(BadInput):
    """More tokens than the image's KV cache has room for. details: position, new_tokens, max_context_tokens."""

    def __init__(self, position: int, new_tokens: int, max_context_tokens: int) -> None:
        super().__init__(
            f"{position} + {new_tokens} tokens do not fit into the image's context of {max_context_tokens}",
            "shorten the prompt, or compile again with a larger --max-context",
            {"position": position, "new_tokens": new_tokens, "max_context_tokens": max_context_tokens},
        )
