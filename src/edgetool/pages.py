"""Pages for people: HTML that needs nothing but itself, no script and no link. Standard library only."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def page(title: str, style: str, parts: Iterable[str]) -> str:
    """A whole page; `style` is CSS, `parts` are HTML."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return "".join([head, f"<style>{style}</style>", *parts, "</html>\n"])


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts, which are escaped; without `headers` it has no first row."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
