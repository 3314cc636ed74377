"""The report as one HTML page without scripts or links: memory map of HBM as SVG, memory, estimate with its terms."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from edgetool.fpga.hardware import VCU128
from edgetool.pages import page, table

_COLOURS = {
    "q": "#4c78a8",
    "k": "#72b7b2",
    "v": "#54a24b",
    "o": "#eeca3b",
    "gate": "#f58518",
    "up": "#e45756",
    "down": "#b279a2",
    "lm_head": "#9d755d",
    "KV cache": "#bab0ac",
    "free": "#f4f4f4",
}
_WIDTH, _ROW, _LEFT = 960, 14, 60
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em .2em 0;text-align:left;"
    "border-bottom:1px solid #ddd}td.n{text-align:right}code{background:#f4f4f4}small{color:#666}"
)


def hbm_map(manifest: Mapping[str, Any]) -> str:
    """An SVG: one bar a pseudo-channel, from address 0 to 256 MiB; every matrix, the KV cache and what is free."""
    spans = _spans(manifest)
    scale = (_WIDTH - _LEFT) / VCU128.pc_bytes
    height = VCU128.pseudo_channels * _ROW + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-size="10"'
        ' font-family="system-ui,sans-serif"><title>HBM map, one bar a pseudo-channel</title><defs><g id="pc">'
    ]
    for label, role, start, size in spans:
        x, width = start * scale, size * scale
        parts.append(
            f'<rect x="{x:.3f}" width="{width:.3f}" height="{_ROW - 3}" fill="{_COLOURS[role]}">'
            f"<title>{html.escape(label)}: {start:#x}, {size:,} B</title></rect>"
        )
    parts.append("</g></defs>")
    for pc in range(VCU128.pseudo_channels):
        y = pc * _ROW
        parts.append(f'<text x="0" y="{y + 9}">PC {pc:02d}</text><use href="#pc" x="{_LEFT}" y="{y}"/>')
    base = VCU128.pseudo_channels * _ROW
    for quarter in range(5):
        x = _LEFT + quarter * (_WIDTH - _LEFT) / 4
        anchor = "start" if quarter < 4 else "end"
        parts.append(f'<text x="{x:.0f}" y="{base + 10}" text-anchor="{anchor}">{quarter * 64} MiB</text>')
    for number, (role, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + number * 88
        parts.append(f'<rect x="{x}" y="{base + 22}" width="10" height="10" fill="{colour}" stroke="#ccc"/>')
        parts.append(f'<text x="{x + 14}" y="{base + 31}">{role}</text>')
    return "".join([*parts, "</svg>"])


def report_page(manifest: Mapping[str, Any]) -> str:
    """The whole page; the same manifest gives the same bytes."""
    memory, estimate, model = manifest["memory"], manifest["estimate"], manifest["model"]
    low, high = estimate["decode_tokens_per_s"]
    facts = {
        "profile": manifest["profile"],
        "model": f"{model['model_type']}, {model['layers']} layers, hidden {model['hidden']}",
        "context": f"{manifest['kv']['max_ctx']:,} tokens (largest that fits: {memory['largest_context']:,})",
        "decode, estimated": f"{low:g} to {high:g} tokens/s",
        "prefill, estimated": f"{estimate['prefill_tokens_per_s']:g} tokens/s",
    }
    sizes = {
        "weights": memory["weights_bytes_per_pc"],
        "KV cache": memory["kv_bytes_per_pc"],
        "free": memory["free_bytes_per_pc"],
        "all of a pseudo-channel": VCU128.pc_bytes,
    }
    share = [[name, f"{size:,}", f"{100 * size / VCU128.pc_bytes:.1f} %"] for name, size in sizes.items()]
    contexts = [
        [f"{row['context_tokens']:,}", *(f"{rate:g}" for rate in row["decode_tokens_per_s"])]
        for row in estimate["by_context"]
    ]
    terms = [[name.replace("_", " "), _shown(value)] for name, value in estimate["terms"].items()]
    formulas = "".join(f"<p><code>{html.escape(text)}</code></p>" for text in estimate["formulas"].values())
    return page(
        "edgetool compile-vcu128",
        _STYLE,
        [
            "<h1>Compiled for the VCU128</h1>",
            table([], [[name, value] for name, value in facts.items()]),
            "<h2>HBM</h2>",
            hbm_map(manifest),
            table(["each pseudo-channel", "bytes", "share"], share),
            f"<h2>Speed</h2><p><small>{html.escape(estimate['label'])}</small></p>",
            table(["context, tokens", "decode tokens/s, low", "high"], contexts),
            formulas,
            table(["term", "value"], terms),
            "<h2>Bytes read for one token, by matrix of a layer</h2>",
            table(["matrix", "N", "K", "bytes in all PCs"], operation_rows(manifest)),
        ],
    )


def operation_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """Name, N, K and bytes read by one product, for the matrices of layer 0 and lm_head."""
    return [
        [
            record["name"].removeprefix("layers.0."),
            str(record["N"]),
            str(record["K"]),
            f"{record['bytes_per_pc'] * VCU128.pseudo_channels:,}",
        ]
        for record in manifest["tensors"]
        if record["name"].startswith("layers.0.") or record["name"] == "lm_head"
    ]


def _spans(manifest: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    spans = [(one["name"], one["role"], one["addr"], one["bytes_per_pc"]) for one in manifest["tensors"]]
    kv, memory = manifest["kv"], manifest["memory"]
    spans.append(("KV cache", "KV cache", kv["base"], memory["kv_bytes_per_pc"]))
    used = kv["base"] + memory["kv_bytes_per_pc"]
    spans.append(("free", "free", used, VCU128.pc_bytes - used))
    return spans


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(item) for item in value)
    return f"{value:,.0f}" if isinstance(value, int | float) and abs(value) >= 1000 else f"{value:g}"
