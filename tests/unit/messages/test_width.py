"""Lines are counted in cells of the terminal, and end where Chinese typesetting lets them."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from edgetool.messages.width import cells, wrapped

TEXT = (
    "每个 scale 对应的权重数：32、64、128，或 -1 表示全部（见 docs/quantize.md）[默认：128]。"
    "`edgetool quantize demo` 试一试。"
)


@pytest.mark.parametrize("text", ["", "plain", TEXT, "é（）…", "e\u0301", "－１"])
def test_cells_are_those_that_rich_counts(text: str) -> None:
    assert cells(text) == cell_len(text)


@pytest.mark.parametrize("width", [20, 33, 47, 60, 200])
def test_no_line_is_too_wide_and_nothing_is_lost(width: int) -> None:
    lines = wrapped(TEXT, width)
    assert "".join(lines).replace(" ", "") == TEXT.replace(" ", "")
    for line in lines:
        assert cells(line) <= width or " " not in line.strip()
        assert line[0] not in "，。：、）]" and line[-1] not in "（["


def test_random_text_is_never_lost() -> None:
    draw = random.Random(5)
    for _ in range(300):
        text = "".join(draw.choice("量化，。（）ab -[]: 校") for _ in range(draw.randrange(60))).strip()
        lines = wrapped(text, draw.randrange(4, 30))
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(line.strip() for line in lines)
