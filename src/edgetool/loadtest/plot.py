"""The figures of a run as one SVG: tokens per second and time to first token over concurrency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

_COLOURS = ("#0b6e99", "#c4552d")
_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL = 760, 330, 60, 50, 300


def svg(document: dict[str, Any]) -> str:
    """An SVG picture of a `report`; each endpoint has its colour."""
    results: Sequence[dict[str, Any]] = document["results"]
    endpoints = list(dict.fromkeys((found["endpoint"], found["model"]) for found in results))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("output tokens/s", lambda found: found["output_tokens_per_s"]),
        ("time to first token (p50), ms", lambda found: 1000 * (found["ttft_s"]["p50"] or 0.0)),
    )
    for number, (title, value) in enumerate(panels):
        left = _LEFT + number * (_PANEL + 80)
        series = [
            [(found["concurrency"], value(found)) for found in results if (found["endpoint"], found["model"]) == name]
            for name in endpoints
        ]
        parts += _panel(left, title, series)
    for number, (url, model) in enumerate(endpoints):
        parts.append(
            f'<text x="{_LEFT}" y="{_HEIGHT - 8 - 16 * (len(endpoints) - 1 - number)}" fill="{_COLOURS[number % 2]}">'
            f"{escape(f'{model} at {url}')}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, title: str, series: list[list[tuple[int, float]]]) -> list[str]:
    height = 190
    levels = sorted({level for line in series for level, _ in line})
    highest = max((value for line in series for _, value in line), default=0.0) or 1.0
    bottom = _TOP + height

    def x(level: int) -> float:
        # levels are steps, not a scale: 1, 2, 4, 8 lie equally far apart
        return left + _PANEL * (levels.index(level) + 0.5) / len(levels)

    def y(value: float) -> float:
        return bottom - 0.92 * height * value / highest

    parts = [
        f'<text x="{left}" y="{_TOP - 18}" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{left} {_TOP}V{bottom}H{left + _PANEL}" fill="none" stroke="#888"/>',
        f'<text x="{left - 6}" y="{y(highest) + 4:.1f}" text-anchor="end">{highest:.3g}</text>',
        f'<text x="{left - 6}" y="{bottom + 4}" text-anchor="end">0</text>',
        f'<text x="{left + _PANEL}" y="{bottom + 32}" text-anchor="end">requests at once</text>',
    ]
    parts += [f'<text x="{x(level):.1f}" y="{bottom + 16}" text-anchor="middle">{level}</text>' for level in levels]
    for number, line in enumerate(series):
        points = " ".join(f"{x(level):.1f},{y(value):.1f}" for level, value in line)
        colour = _COLOURS[number % 2]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(level):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for level, v in line]
    return parts
