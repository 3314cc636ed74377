"""Cutting a text: upstream's rolling windows where they exist, and what every cut has to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows

from edgetool.errors import BadInput
from edgetool.evaluation.windows import cut, read_text


class Characters:
    """A tokenizer with a token for each character."""

    def __init__(self, begin: int | None = 1, end: int | None = 2, adds_begin: bool = False) -> None:
        self.bos_token_id = begin
        self.eos_token_id = end
        self._adds_begin = adds_begin

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        tokens = [ord(character) for character in text]
        return {"input_ids": [self.bos_token_id or 0, *tokens] if add_special_tokens and self._adds_begin else tokens}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(map(chr, tokens))


TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom."


@given(st.text("ab c", min_size=1, max_size=70), st.integers(1, 20), st.data())
@settings(max_examples=150, deadline=None)
def test_windows_are_upstreams_rolling_ones(text: str, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    found = cut(text, Characters(), context, stride)
    tokens = [ord(character) for character in text]
    expected = list(get_rolling_token_windows(tokens, 1, context, context - stride + 1))
    assert [(list(one.tokens[:-1]), list(one.tokens[-one.predicted :])) for one in found.windows] == expected


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (8, 8), (8, 3), (30, 1), (200, 100)])
@pytest.mark.parametrize("adds_begin", [False, True])
def test_every_token_is_predicted_once_and_sees_at_most_the_context(
    context: int, stride: int, adds_begin: bool
) -> None:
    found = cut(TEXT, Characters(adds_begin=adds_begin), context, stride)
    assert "".join(chr(token) for one in found.windows for token in one.tokens[-one.predicted :]) == TEXT
    assert all(one.predicted < len(one.tokens) <= context + 1 for one in found.windows)
    assert all(one.predicted <= stride for one in found.windows[1:])
    begins = [one.tokens[0] == 1 for one in found.windows]
    assert begins == [True, *[adds_begin] * (len(begins) - 1)]
    assert found.prefix == ("every window" if adds_begin else "first window")
    assert (found.words, found.text_bytes) == (len(TEXT.split()), len(TEXT))


def test_a_model_without_a_beginning_of_text_begins_with_its_end_of_text() -> None:
    assert cut(TEXT, Characters(begin=None), 8, 4).windows[0].tokens[0] == 2
    with pytest.raises(BadInput, match="neither"):
        cut(TEXT, Characters(begin=None, end=None), 8, 4)


def test_a_limit_counts_windows_and_the_words_and_bytes_of_what_is_left() -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den Deich."
    found = cut(text, Characters(), 8, 4, limit=3)
    assert len(found.windows) == 3 and found.predicted == 16
    assert found.words == 2 and found.text_bytes == len("Zwölf Boxkämpfer".encode())
    assert (
        found.text_sha256 == cut("Zwölf Boxkämpfer jagen Viktor quer über den Deich.", Characters(), 8, 4).text_sha256
    )


def test_a_context_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(BadInput, match="--context 4096 is more than the 2048 tokens"):
        cut(TEXT, Characters(), 4096, 64, longest=2048)
    cut(TEXT, Characters(), 2048, 64, longest=2048)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "no text"), (b" \n\t", "no text"), (b"caf\xe9", "not UTF-8"), (None, "No such file")],
)
def test_a_file_without_text_is_one_clear_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_text(path)


def test_a_text_is_read_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo ä\n".encode())
    assert read_text(path) == "one\r\ntwo ä\n"
