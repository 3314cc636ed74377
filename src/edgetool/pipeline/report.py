"""report.html of a run: one page that needs nothing but itself, every number under the command that it came from."""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetool.pages import page, table
from edgetool.pipeline.work import StepResult, Work
from edgetool.progress_lines import duration, size

_STYLE = (
    ":root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:2em auto;padding:0 1em;max-width:70em}"
    "table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #8884}pre{background:#8882;padding:.5em;overflow-x:auto}small{opacity:.7}"
    "svg{max-width:100%;background:#fff;color:#222}"
)

Rows = Sequence[Sequence[str]]


def report_page(work: Work) -> str:
    """The whole page."""
    return page(f"edgetool run: {work.model}", _STYLE, _parts(work))


def _parts(work: Work) -> Iterator[str]:
    yield f"<h1>{_text(work.model)}</h1><p>{_text(work.recipe.name)}, in {_text(str(work.directory))}</p>"
    results = [work.results[step.name] for step in work.recipe.steps if step.name in work.results]
    yield table(["step", "took", "exit", "in short"], [_overview(result) for result in results])
    if len(work.attempts) > 1 or any(not attempt.passed for attempt in work.attempts):
        yield "<h2>The ladder</h2>" + table(["rung", "changes", "gate"], _ladder(work))
    for result in results:
        yield f"<h2>{_text(result.name)}</h2><pre>{_text(shlex.join(result.command))}</pre>"
        if result.result is not None:
            show = _SECTIONS.get(result.command[1], _any)
            yield show(result, work.directory)
        yield "".join(f"<p>warning: {_text(warning)}</p>" for warning in result.warnings)
    yield f"<h2>The recipe</h2><pre>{_text(work.recipe.text)}</pre>"


def _overview(result: StepResult) -> list[str]:
    took = "-" if result.seconds is None else duration(result.seconds)
    code = "-" if result.exit_code is None else str(result.exit_code)
    state = "failed" if result.exit_code else "done"
    return [result.name, took, f"{code} ({state})", in_short(result)]


def in_short(result: StepResult) -> str:
    """The figures of a step that one would ask for first, in one line."""
    found = result.result or {}
    if found.get("message") and not found.get("tasks"):
        return str(found["message"])
    short = _SHORT.get(result.command[1])
    return "" if short is None else ", ".join(short(found))


def _short_quantize(found: Mapping[str, Any]) -> list[str]:
    kind = f"{found.get('bits')} bits in groups of {found.get('group_size')} ({found.get('method')})"
    return (
        [kind, f"{size(found['source_bytes'])} -> {size(found['output_bytes'])}"] if "output_bytes" in found else [kind]
    )


def _short_convert(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{found.get('source_format')} -> {found.get('format')}",
        f"{found.get('tensors_equal', '-')} tensors equal",
    ]


def _short_eval(found: Mapping[str, Any]) -> list[str]:
    said = []
    for name, task in found.get("tasks", {}).items():
        if task.get("original") is None:
            said.append(f"{name} {_number(task.get('score'))}")
        else:
            said.append(f"{name} {_number(task['original'])} -> {_number(task['quantized'])}")
    gate = found.get("gate")
    return said + ([f"gate {'holds' if gate['passed'] else 'does not hold'}"] if gate else [])


def _short_image(found: Mapping[str, Any]) -> list[str]:
    if "estimate" not in found:
        return []
    low, high = found["estimate"]["decode_tokens_per_s"]
    return [f"{low:g} to {high:g} tokens/s (an estimate)", f"context {found['max_context']:,}"]


def _short_serve(found: Mapping[str, Any]) -> list[str]:
    asked = found.get("asked")
    return [f"{asked['question']} - {asked['answer'].strip()}"] if asked else []


_SHORT: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "quantize": _short_quantize,
    "convert": _short_convert,
    "eval": _short_eval,
    "compile-vcu128": _short_image,
    "serve-gpu": _short_serve,
    "serve-fpga": _short_serve,
}


def _ladder(work: Work) -> Rows:
    return [
        [
            str(attempt.rung),
            ", ".join(f"{key} {value}" for key, value in attempt.changes.items()) or "as in the recipe",
            attempt.reason or "not asked",
        ]
        for attempt in work.attempts
    ]


def _any(result: StepResult, _directory: Path) -> str:
    """Plain values as they are."""
    rows = [[key, _shown(key, value)] for key, value in (result.result or {}).items() if not _is_nested(value)]
    return table([], rows)


def _eval(result: StepResult, directory: Path) -> str:
    found = result.result or {}
    rows = []
    for name, task in found.get("tasks", {}).items():
        ratio = "ratio" in task
        change = task.get("ratio") if ratio else task.get("difference")
        bounds = task.get("ratio_ci95") if ratio else task.get("ci95")
        interval = "-" if not bounds else f"{_number(bounds[0])} to {_number(bounds[1])}"
        what = ("ratio " if ratio else "difference ") + _number(change) if change is not None else "-"
        alone = task.get("quantized") if task.get("quantized") is not None else task.get("score")
        rows.append(
            [
                name,
                str(task.get("metric")),
                f"{task.get('n'):,}",
                _number(task.get("original")),
                _number(alone),
                what,
                interval,
            ]
        )
    headers = ["task", "metric", "n", "original", "quantised", "change", "95 % interval of the change"]
    gate = found.get("gate")
    verdicts = "" if not gate else f"<p>gate {_text(gate['expression'])}: {_text(gate['reason'])}</p>"
    return (table(headers, rows) if rows else _any(result, directory)) + verdicts


def _image(result: StepResult, directory: Path) -> str:
    found = result.result or {}
    if "estimate" not in found:
        return _any(result, directory)
    low, high = found["estimate"]["decode_tokens_per_s"]
    rows = [
        ["profile", str(found["profile"])],
        ["context, tokens", f"{found['max_context']:,} (largest that fits: {found['largest_context']:,})"],
        ["HBM of each pseudo-channel", size(max(found["hbm_bytes_per_pc"]))],
        ["weights read for one token", size(found["weight_read_bytes_per_token"])],
        ["decode, tokens/s (estimated)", f"{low:g} to {high:g}"],
        ["prefill, tokens/s (estimated)", f"{found['estimate']['prefill_tokens_per_s']:g}"],
    ]
    return table([], rows) + _hbm_map(directory / result.name / "report.html", result.name)


def _hbm_map(path: Path, name: str) -> str:
    """The picture in the image's own report; its ids are made its own, since this page may show several."""
    if not path.is_file():
        return ""
    picture = path.read_text(encoding="utf-8")
    start, end = picture.find("<svg "), picture.find("</svg>")
    if start < 0 or end < 0:
        return ""
    return picture[start : end + len("</svg>")].replace('id="pc"', f'id="pc-{name}"').replace("#pc", f"#pc-{name}")


def _serve(result: StepResult, directory: Path) -> str:
    asked = (result.result or {}).get("asked")
    if not asked:
        return _any(result, directory)
    rows = [
        ["question", asked["question"]],
        ["answer", asked["answer"].strip()],
        ["tokens", str(asked["tokens"])],
        ["time of the answer", duration(asked["seconds"])],
        ["time to become ready", duration((result.result or {}).get("seconds_to_ready") or 0)],
    ]
    how = shlex.join(without_free_port(result.command))
    return table([], rows) + f"<p>To serve it: <code>{_text(how)}</code></p>"


def without_free_port(command: Sequence[str]) -> list[str]:
    """A server's command line with the command's own port, not one chosen for a check."""
    words = list(command)
    at = words.index("--port") if "--port" in words else -1
    return words[:at] + words[at + 2 :] if at >= 0 and words[at + 1] == "0" else words


_SECTIONS: dict[str, Callable[[StepResult, Path], str]] = {
    "eval": _eval,
    "compile-vcu128": _image,
    "serve-gpu": _serve,
    "serve-fpga": _serve,
}


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | dict) or value is None


def _shown(key: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return size(value)
        return duration(value) if key.endswith("seconds") else _number(value)
    return str(value)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _text(text: str) -> str:
    return html.escape(text)
