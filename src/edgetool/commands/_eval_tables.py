"""Results of `edgetool eval` as tables: original | quantised | difference | interval | flips, and what explains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgetool.commands._blocks import facts, listing, report
from edgetool.console import Table, Text

if TYPE_CHECKING:
    from edgetool.console import Block

_WORST_GROUPS = 5


def blocks(result: Mapping[str, Any]) -> list[Block]:
    """The tables of a run, of a comparison, or of a plan."""
    if "plan" in result:
        return report("plan (nothing was measured)", result["plan"])
    tasks = {name: entry for name, entry in result["tasks"].items() if name != "perplexity"}
    compared = result.get("against") is not None
    shown: list[Block] = []
    if tasks:
        shown.append(_both(result, tasks) if compared else _alone(result, tasks))
    for name, entry in tasks.items():
        shown += _groups(name, entry, compared)
    if "perplexity" in result["tasks"]:
        shown.append(_perplexity(result["tasks"]["perplexity"], compared))
    gate = result.get("gate")
    if gate:
        verdict = f"{gate['expression']}: {'holds' if gate['passed'] else 'does not hold'}"
        shown.append(Text("gate", "\n".join([verdict, *(f"- {one['reason']}" for one in gate["verdicts"])])))
    shown += listing("stopped early", [_early(name, entry) for name, entry in tasks.items() if "sequential" in entry])
    said = {key: result[key] for key in ("output", "reused", "seconds") if result.get(key) is not None}
    return [*shown, facts("run", {**said, "profile": result["profile"]["hash"][:16]})]


def _title(result: Mapping[str, Any], compared: bool) -> str:
    model = result["model"]["model"]
    return f"{model} beside {result['against']['model']}" if compared else str(model)


def _both(result: Mapping[str, Any], tasks: Mapping[str, Any]) -> Table:
    rows = []
    for name, entry in tasks.items():
        flips = entry["flips"]
        chance = entry.get("mcnemar_p")
        rows.append(
            [
                name,
                entry["metric"],
                str(entry["n"]),
                _percent(entry["original"]),
                _percent(entry["quantized"]),
                _points(entry["difference"]),
                _interval(entry["ci95"]),
                f"-{flips['lost']} +{flips['gained']}",
                "-" if chance is None else f"{chance:.3f}" if chance >= 0.001 else "<0.001",
                "-" if entry.get("recovery") is None else f"{entry['recovery']:.4f}",
            ]
        )
    headers = ["task", "metric", "n", "original", "quantised", "difference", "95 % interval", "flips", "p", "recovery"]
    return Table(_title(result, True), rows, headers)


def _alone(result: Mapping[str, Any], tasks: Mapping[str, Any]) -> Table:
    rows = []
    for name, entry in tasks.items():
        side = entry["sides"]["model"]
        low_high = side["ci95"]
        bounds = "-" if low_high is None else f"{_percent(low_high[0])} to {_percent(low_high[1])}"
        rows.append([name, entry["metric"], str(entry["n"]), _percent(entry["score"]), bounds])
    return Table(_title(result, False), rows, ["task", "metric", "n", "score", "95 % interval"])


def _groups(name: str, entry: Mapping[str, Any], compared: bool) -> list[Block]:
    """The subtasks that lost most, or scored least."""
    groups = entry.get("groups") or {}
    if not groups:
        return []
    key = "difference" if compared else "score"
    worst = sorted(groups.items(), key=lambda item: (item[1].get(key, 0.0), item[0]))[:_WORST_GROUPS]
    names = ["original", "quantized", "difference"] if compared else ["score"]
    rows = [
        [
            group,
            str(found["n"]),
            *(_points(found[key]) if key == "difference" else _percent(found[key]) for key in names),
        ]
        for group, found in worst
    ]
    headers = ["part", "n", *(key.replace("quantized", "quantised") for key in names)]
    return [Table(f"{name}: the {len(rows)} weakest of {len(groups)} parts (all in report.html)", rows, headers)]


def _perplexity(entry: Mapping[str, Any], compared: bool) -> Table:
    found = {
        "original": _number(entry["original"]),
        "quantised": _number(entry["quantized"]),
        "ratio": f"{_number(entry['ratio'])} ({_plain(entry['ratio_ci95'])})" if entry.get("ratio") else None,
        "KL divergence": _number(entry["kl_divergence"]),
        "same likeliest token": _percent(entry["top1_agreement"]),
    }
    if not compared:
        found = {"perplexity": _number(entry["score"])}
    found |= {
        "of a word": _number(entry["word_perplexity"]),
        "bits per byte": _number(entry["bits_per_byte"]),
        "tokens": f"{entry['tokens']:,}",
        "windows": f"{entry['context']} {entry['unit']}, every {entry['stride']}",
    }
    return Table("perplexity", [(key, value) for key, value in found.items() if value is not None and value != "-"])


def _early(name: str, entry: Mapping[str, Any]) -> str:
    found = entry["sequential"]
    return (
        f"{name}: after {found['questions']} of {found['of']} questions, about {found['about']}, by {found['method']}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f} pt"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{100 * bounds[0]:+.2f} to {100 * bounds[1]:+.2f} pt"


def _plain(bounds: Sequence[float] | None) -> str:
    return "no interval" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
