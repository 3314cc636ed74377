"""report.html: an evaluation as one page for people, without scripts and links, light or dark as the reader has it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgetool.evaluation.gate import PERPLEXITY
from edgetool.evaluation.plots import Bar, Range, bars, ranges
from edgetool.pages import page, table

_STYLE = (
    ":root{color-scheme:light dark;--text:#222;--faint:#666;--line:#ddd;--back:#fff;--box:#f4f4f4;"
    "--model:#c4552d;--against:#0b6e99;--good:#2e7d32;--bad:#b3261e}"
    "@media(prefers-color-scheme:dark){:root{--text:#ddd;--faint:#999;--line:#444;--back:#161616;--box:#242424;"
    "--model:#e58a66;--against:#5bb3d8;--good:#7bc67f;--bad:#f28b82}}"
    "body{font:14px system-ui,sans-serif;margin:2em auto;padding:0 1em;max-width:70em;color:var(--text);"
    "background:var(--back)}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .9em .2em 0;text-align:left;"
    "border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}"
    "small,summary{color:var(--faint)}pre{background:var(--box);padding:1em;overflow:auto;white-space:pre-wrap}"
    ".gate{border-left:.4em solid var(--good);background:var(--box);padding:.6em 1em}"
    ".gate.failed{border-color:var(--bad)}"
    "svg{width:100%;height:auto}svg text{fill:var(--text)}svg .model{fill:var(--model);stroke:none}"
    "svg .against{fill:var(--against);stroke:none}svg .rule{stroke:var(--line);fill:var(--faint)}"
    "svg .zero{stroke:var(--faint)}svg .whisker{stroke:var(--text);fill:none}svg .line{fill:none;stroke-width:2}"
    "svg .model.line{stroke:var(--model)}svg .against.line{stroke:var(--against)}"
    "svg .rule.line{stroke:var(--faint)}svg circle.rule{stroke:none}"
    ".key.model{color:var(--model)}.key.against{color:var(--against)}"
)
_POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
_IDS_SHOWN = 200


def report_page(found: Mapping[str, Any]) -> str:
    """The page of a `results.document`; the same document gives the same bytes."""
    scores = {name: entry for name, entry in found["tasks"].items() if name != PERPLEXITY}
    compared = found.get("against") is not None
    parts = [
        _POLICY,
        '<meta name="viewport" content="width=device-width">',
        f"<h1>{_escaped(_title(found))}</h1>",
        _key(found),
        _gate(found.get("gate")),
    ]
    if scores:
        parts += _scores(scores, compared)
    if PERPLEXITY in found["tasks"]:
        parts += _perplexity(found["tasks"][PERPLEXITY])
    for name, entry in scores.items():
        if entry.get("groups"):
            parts += _groups(name, entry["groups"], compared)
    parts += [_flips(scores), _profile(found)]
    return page(_title(found), _STYLE, [part for part in parts if part])


def _title(found: Mapping[str, Any]) -> str:
    against = found.get("against")
    return f"{_name(found['model'])}" + (f" against {_name(against)}" if against else "")


def _key(found: Mapping[str, Any]) -> str:
    keys = f'<span class="key model">&#9632;</span> {_escaped(_name(found["model"]))}'
    if found.get("against"):
        keys += f' &nbsp; <span class="key against">&#9632;</span> {_escaped(_name(found["against"]))} (original)'
    return (
        f"<p>{keys}<br><small>Intervals are at 95 %. Profile {_escaped(str(found['profile'].get('hash')))}</small></p>"
    )


def _gate(gate: Mapping[str, Any] | None) -> str:
    if gate is None:
        return ""
    reasons = "".join(
        f"<li>{'holds' if verdict['passed'] else '<strong>fails</strong>'}: {_escaped(verdict['reason'])}</li>"
        for verdict in gate["verdicts"]
    )
    passed = gate["passed"]
    return (
        f'<div class="gate{"" if passed else " failed"}"><strong>Gate {"passed" if passed else "failed"}</strong>: '
        f"<code>{_escaped(gate['expression'])}</code><ul>{reasons}</ul></div>"
    )


def _scores(scores: Mapping[str, Any], compared: bool) -> list[str]:
    rows = [(name, _bars(entry)) for name, entry in scores.items()]
    parts = ["<h2>Scores</h2>", bars("scores by task", rows, " %", 100.0)]
    if not compared:
        cells = [
            [name, entry["metric"], str(entry["n"]), _percent(entry["score"]), _ends(entry["sides"]["model"]["ci95"])]
            for name, entry in scores.items()
        ]
        return [*parts, table(["task", "metric", "n", "score", "interval, %"], cells)]
    better = (
        "<p><small>Quantised less original, in the colour of the better model where that is beyond doubt.</small></p>"
    )
    parts += [
        "<h2>Differences</h2>",
        better,
        ranges("differences by task", [_range(*one) for one in scores.items()], " pt"),
    ]
    cells = [
        [
            name,
            entry["metric"],
            str(entry["n"]) + (f" of {entry['sequential']['of']}" if "sequential" in entry else ""),
            _percent(entry["original"]),
            _percent(entry["quantized"]),
            _points(entry["difference"]),
            _ends(entry["ci95"]),
            str(entry["flips"]["lost"]),
            str(entry["flips"]["gained"]),
            _number(entry["mcnemar_p"], ".3g"),
            _number(entry["recovery"], ".4f"),
        ]
        for name, entry in scores.items()
    ]
    headers = ["task", "metric", "n", "original", "quantised", "difference, pt", "interval, pt", "lost", "gained"]
    note = ""
    if any("sequential" in entry for entry in scores.values()):
        note = (
            "<p><small>Where n is a part of all questions, a sequential test by betting (arXiv:2010.09686) decided the "
            "gate early; its interval holds at any time of stopping.</small></p>"
        )
    return [*parts, table([*headers, "McNemar p", "recovery"], cells), note]


def _bars(entry: Mapping[str, Any]) -> list[Bar]:
    found = []
    for side in ("against", "model"):
        one = entry["sides"].get(side)
        if one is not None:
            low, high = one["ci95"]
            found.append(Bar(side, 100 * one["value"], (100 * low, 100 * high), _percent(one["value"])))
    return found


def _range(name: str, entry: Mapping[str, Any]) -> Range:
    bounds = entry["ci95"]
    interval = (100 * bounds[0], 100 * bounds[1]) if bounds else None
    said = f"{_points(entry['difference'])} pt" + (f"  [{_ends(bounds)}]" if bounds else "")
    return Range(name, 100 * entry["difference"], interval, said)


def _perplexity(entry: Mapping[str, Any]) -> list[str]:
    sides = [(side, entry["sides"][side]) for side in ("against", "model") if side in entry["sides"]]
    rows = [
        (label, [Bar(side, one[key], None, _number(one[key], ".4f")) for side, one in sides])
        for label, key in (("of a token", "value"), ("of a word", "word_perplexity"))
    ]
    facts = [
        ["tokens, words", f"{entry['tokens']:,}, {entry['words']:,}"],
        [
            "context, stride",
            f"{entry['context']:,}, {entry['stride']:,} {entry['unit']}; text begins {entry['prefix']}",
        ],
        ["bits per byte", ", ".join(_number(one["bits_per_byte"], ".4f") for _, one in sides)],
        ["text, SHA-256", str(entry["text_sha256"])],
    ]
    if "note" in entry:
        facts.insert(0, ["note", entry["note"]])
    if entry["ratio"] is not None:
        bounds = entry["ratio_ci95"]
        within = f" ({bounds[0]:.4f} to {bounds[1]:.4f})" if bounds and None not in bounds else ""
        facts.insert(0, ["ratio", f"{entry['ratio']:.4f}{within}"])
    if entry["kl_divergence"] is not None:
        spread = ", ".join(f"{name} {_number(value, '.4g')}" for name, value in entry["kl_percentiles"].items())
        facts.insert(1, ["KL(original || quantised), nats", f"mean {_number(entry['kl_divergence'], '.4g')}, {spread}"])
        facts.insert(
            2, ["same likeliest token", f"{_percent(entry['top1_agreement'])} of {entry['kl_tokens']:,} tokens"]
        )
    return ["<h2>Perplexity</h2>", *(bars(f"perplexity {row[0]}", [row], "") for row in rows), table([], facts)]


def _groups(name: str, groups: Mapping[str, Any], compared: bool) -> list[str]:
    title = f"{name} by subject"
    parts = [f"<h2>{_escaped(title)}</h2>"]
    if compared:
        order = sorted(groups.items(), key=lambda item: (item[1]["difference"], item[0]))
        drawn = ranges(title, [_range(*item) for item in order], " pt")
        cells = [
            [
                group,
                str(one["n"]),
                _percent(one["original"]),
                _percent(one["quantized"]),
                _points(one["difference"]),
                _ends(one["ci95"]),
                str(one["flips"]["lost"]),
                str(one["flips"]["gained"]),
            ]
            for group, one in groups.items()
        ]
        headers = ["subject", "n", "original", "quantised", "difference, pt", "interval, pt", "lost", "gained"]
    else:
        drawn = bars(
            title,
            [
                (group, [Bar("model", 100 * one["score"], _hundred(one["score_ci95"]), _percent(one["score"]))])
                for group, one in groups.items()
            ],
            " %",
            100.0,
        )
        cells = [
            [group, str(one["n"]), _percent(one["score"]), _ends(one["score_ci95"])] for group, one in groups.items()
        ]
        headers = ["subject", "n", "score", "interval, %"]
    few = "<p><small>By chance alone a few of many intervals do not hold zero.</small></p>"
    return [
        *parts,
        drawn,
        few if compared else "",
        f"<details><summary>figures</summary>{table(headers, cells)}</details>",
    ]


def _flips(scores: Mapping[str, Any]) -> str:
    parts = []
    for name, entry in scores.items():
        for kind, said in (("lost", "right before, wrong now"), ("gained", "wrong before, right now")):
            ids = (entry.get("flipped") or {}).get(kind) or []
            if ids:
                more = f" … and {len(ids) - _IDS_SHOWN:,} more, in results.json" if len(ids) > _IDS_SHOWN else ""
                listed = _escaped(", ".join(str(one) for one in ids[:_IDS_SHOWN]) + more)
                head = f"{_escaped(name)}: {len(ids):,} {kind} ({said})"
                parts.append(f"<details><summary>{head}</summary><pre>{listed}</pre></details>")
    return "<h2>Flips</h2>" + "".join(parts) if parts else ""


def _profile(found: Mapping[str, Any]) -> str:
    facts = {"profile": found["profile"], "model": found["model"], "against": found.get("against")}
    text = json.dumps(facts, indent=1, default=str)
    return f"<h2>How it was asked</h2><details><summary>profile</summary><pre>{_escaped(text)}</pre></details>"


def _name(facts: Mapping[str, Any]) -> str:
    return str(facts.get("model", "?"))


def _escaped(text: str) -> str:
    return html.escape(text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+z.2f}"


def _ends(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:z.2f} to {100 * bounds[1]:z.2f}"


def _hundred(bounds: Sequence[float]) -> tuple[float, float]:
    return 100 * bounds[0], 100 * bounds[1]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
