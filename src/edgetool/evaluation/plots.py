"""Plots of an evaluation as SVG: bars with their intervals, and differences around zero.

Colours are classes (model, against, rule, zero, whisker) that the page defines, for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _TOP = 960, 230, 190, 26
_PLOT = _WIDTH - _LEFT - _RIGHT
_BAR, _GAP, _ROW = 13, 12, 20
_LABEL = 32


@dataclass(frozen=True)
class Bar:
    """One bar: style is its class, interval its whiskers, said what stands behind it; values on the axis' scale."""

    style: str
    value: float | None
    interval: tuple[float, float] | None
    said: str


@dataclass(frozen=True)
class Range:
    """One row around zero: value and interval on the axis' scale, said what stands behind it."""

    label: str
    value: float
    interval: tuple[float, float] | None
    said: str


def bars(title: str, rows: Sequence[tuple[str, Sequence[Bar]]], unit: str, highest: float | None = None) -> str:
    """Bars from 0 to `highest` (by default what the largest needs), those of a row below each other."""
    reached = [bar.interval[1] if bar.interval else bar.value or 0.0 for _, group in rows for bar in group]
    top = highest or _round_up(max([*reached, 1e-9]))
    parts = []
    y = float(_TOP)
    for label, group in rows:
        height = _BAR * len(group)
        parts.append(_text(_LEFT - 10, y + height / 2 + 4, _short(label), "end", label))
        for bar in group:
            parts += _bar(bar, y, top)
            y += _BAR
        y += _GAP
    axis = [(_LEFT + _PLOT * step / 4, f"{top * step / 4:.3g}{unit}") for step in range(5)]
    return _svg(title, y + 4, _axis(axis, y - _GAP / 2), parts)


def ranges(title: str, rows: Sequence[Range], unit: str) -> str:
    """A row a value: its interval as a line, the value as a dot, zero in the middle."""
    ends = [abs(end) for row in rows for end in (row.value, *(row.interval or ()))]
    reach = _round_up(max([*ends, 1e-9]))
    middle, scale = _LEFT + _PLOT / 2, _PLOT / 2 / reach
    parts = []
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        style = "against" if row.interval and row.interval[1] < 0 else "model" if _above(row) else "rule"
        parts.append(_text(_LEFT - 10, y + 4, _short(row.label), "end", row.label))
        if row.interval:
            low, high = (middle + scale * end for end in row.interval)
            parts.append(f'<path class="{style} line" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
        parts.append(f'<circle class="{style}" cx="{middle + scale * row.value:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(_text(_LEFT + _PLOT + 10, y + 4, row.said, "start"))
    bottom = _TOP + _ROW * len(rows)
    axis = [(middle + scale * reach * step / 2, f"{reach * step / 2:+.3g}{unit}") for step in (-2, -1, 1, 2)]
    zero = f'<path class="zero" d="M{middle:.1f} {_TOP - 4}V{bottom + 4}"/>' + _text(middle, 14, "0", "middle")
    return _svg(title, bottom + 8, _axis(axis, bottom), [zero, *parts])


def _round_up(value: float) -> float:
    """The next larger number whose quarters are short."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if value <= factor * power)


def _above(row: Range) -> bool:
    return row.interval is not None and row.interval[0] > 0


def _bar(bar: Bar, y: float, top: float) -> list[str]:
    parts = []
    end = float(_LEFT)
    if bar.value is not None:
        width = _PLOT * min(max(bar.value, 0.0), top) / top
        parts.append(
            f'<rect class="{bar.style}" x="{_LEFT}" y="{y + 1:.1f}" width="{width:.1f}" height="{_BAR - 2}">'
            f"<title>{escape(bar.said)}</title></rect>"
        )
        end += width
    if bar.interval is not None:
        low, high = (_LEFT + _PLOT * min(max(value, 0.0), top) / top for value in bar.interval)
        middle = y + _BAR / 2
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6'
            f'M{high:.1f} {middle - 3:.1f}v6"/>'
        )
        end = max(end, high)
    parts.append(_text(max(end + 6, _LEFT + 6), y + _BAR - 3, bar.said, "start"))
    return parts


def _axis(ticks: Sequence[tuple[float, str]], bottom: float) -> str:
    lines = "".join(f"M{x:.1f} {_TOP - 4}V{bottom:.1f}" for x, _ in ticks)
    return f'<path class="rule" d="{lines}"/>' + "".join(_text(x, 14, label, "middle") for x, label in ticks)


def _svg(title: str, height: float, axis: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" font-size="11"'
        f' font-family="system-ui,sans-serif"><title>{escape(title)}</title>{axis}{"".join(parts)}</svg>'
    )


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, full: str | None = None) -> str:
    title = f"<title>{escape(full)}</title>" if full is not None and full != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{title}</text>'
