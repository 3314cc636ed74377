"""Usage of hosts that do not count: tokens of prompts and answers, by a tokenizer that the user names."""

from __future__ import annotations

from pathlib import Path

from edgetool.fpga_service.exchange import Ask, Conversation
from edgetool.fpga_service.tokens import Tokens


class TokenCounter:
    """A Counter by the tokenizer in `directory`. Without a chat template it is taken for ChatGLM's."""

    def __init__(self, directory: Path) -> None:
        """Raises BadInput where there is no tokenizer."""
        self._tokens = Tokens(directory, "chatglm")

    def prompt(self, ask: Ask) -> int:
        """Tokens of what is asked. Raises BadInput for a conversation that the template refuses."""
        if isinstance(ask, Conversation):
            return len(self._tokens.encode_chat(ask.messages))
        return len(self._tokens.encode(ask)) if isinstance(ask, str) else len(ask)

    def text(self, text: str) -> int:
        """Tokens of an answer."""
        return len(self._tokens.tokenizer(text, add_special_tokens=False)["input_ids"])
