"""Text to token ids and back, with the tokenizer that an image carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool.checkpoints.checkpoint import read_json_object
from edgetool.errors import BadInput
from edgetool.models.streamed import tokenizer_at

HALF_A_CHARACTER = "\ufffd"
"""What decoding gives for bytes that are not yet, or never, a character."""

_ROUNDS_FAMILY = "chatglm"


@dataclass(frozen=True)
class GenerationDefaults:
    """The model's own way to draw tokens, and tokens besides the tokenizer's that end an answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    end_ids: tuple[int, ...] = ()


class Tokens:
    """The tokenizer in `directory` (tokenizer files, generation_config.json) of a model of `family`."""

    def __init__(self, directory: Path, family: str) -> None:
        self.tokenizer = tokenizer_at(directory)
        self._directory = directory
        self._by_template = bool(getattr(self.tokenizer, "chat_template", None))
        self._by_rounds = not self._by_template and family == _ROUNDS_FAMILY

    @property
    def chat(self) -> bool:
        """Whether the model has a form for conversations."""
        return self._by_template or self._by_rounds

    def generation_defaults(self) -> GenerationDefaults:
        """What generation_config.json says. Raises BadInput where it cannot be understood."""
        path = self._directory / "generation_config.json"
        if not path.is_file():
            return GenerationDefaults()
        own = read_json_object(path)
        told = own.get("eos_token_id")
        try:
            return GenerationDefaults(
                float(own.get("temperature") or 1.0),
                float(own.get("top_p") or 1.0),
                max(0, int(own.get("top_k") or 0)),
                tuple(int(one) for one in (told if isinstance(told, list) else [told]) if one is not None),
            )
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with what the tokenizer puts before any text."""
        return [int(one) for one in self.tokenizer(text)["input_ids"]]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation in the model's own form, up to where its answer begins. Raises BadInput."""
        if not messages:
            raise BadInput("messages is empty", "give at least one message")
        if self._by_rounds:
            return self.encode(rounds(messages))
        if not self._by_template:
            raise BadInput("the model has no chat template", "use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is the model's own program and may raise anything
            raise BadInput(f"the chat template refuses these messages: {error}") from error
        return [int(one) for one in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text: together they are the text. A character belongs to the last of its tokens."""
        found: list[str] = []
        start = told = 0  # ids[start:told] is the context in which new ids are read
        for end in range(1, len(ids) + 1):
            before = self.decode(ids[start:told])
            now = self.decode(ids[start:end])
            if now.endswith(HALF_A_CHARACTER) and end < len(ids):
                found.append("")
                continue
            found.append(now[len(before) :])
            start, told = told, end
        return found


def rounds(messages: Sequence[Mapping[str, Any]]) -> str:
    """ChatGLM's form of a conversation: `[Round n]`, question and answer; an instruction goes before the next question.

    Raises BadInput for an answer without a question, or where the last message is no question.
    """
    text, asked, number = "", "", 1
    for message in messages:
        content = str(message.get("content") or "")
        if message.get("role") != "assistant":
            asked += f"\n{content}" if asked else content
        elif not asked:
            raise BadInput("an assistant message must follow a question")
        else:
            text += f"{_round(number, asked)}{content}\n\n"
            asked, number = "", number + 1
    if not asked:
        raise BadInput("the last message must be a question")
    return text + _round(number, asked)


def _round(number: int, question: str) -> str:
    return f"[Round {number}]\n\n问：{question}\n\n答："
