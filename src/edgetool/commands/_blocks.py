"""Results as tables for people: names become words, and bytes and seconds become readable."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from edgetool.console import Block, Table, Text
from edgetool.messages import label
from edgetool.progress_lines import duration, size

_UNITS = {"_bytes": size, "_seconds": duration, "_s": duration}
_WORDS = {"rss": "memory", "vcu128": "VCU128", "vllm": "vLLM", "gpu": "GPU", "cpu": "CPU", "ok": "OK"}


def words(key: str) -> str:
    """`peak_rss_bytes` -> `peak memory`."""
    for suffix in _UNITS:
        if key.endswith(suffix) and key != suffix:
            key = key.removesuffix(suffix)
            break
    return " ".join(_WORDS.get(word, word) for word in key.split("_"))


def name_beside(key: str, others: Container[str]) -> str:
    """The same in a table that has `others`: `output_bytes` beside `output` is the "output size"."""
    own = key.removesuffix("_bytes")
    return words(f"{own}_size" if own != key and own in others else key)


def shown(key: str, value: Any) -> str:
    """One value as text; the key's unit decides how a number reads."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        for suffix, reader in _UNITS.items():
            if key.endswith(suffix) or key == suffix.strip("_"):
                return reader(value)
        if isinstance(value, float):
            return f"{value:.4g}"
        # grouping helps with 134,515,008 parameters; it would only disturb in bits, group sizes and ports
        return f"{value:,}" if abs(value) >= 10_000 and not key.endswith(("pid", "port")) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(words(str(name)))} {shown(str(name), item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(key, item) for item in value)
    return str(value)


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """A table of name and value."""
    return Table(title, [(name_beside(key, values), shown(key, value)) for key, value in values.items()])


def grid(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a column for each key of the records."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[shown(key, record.get(key)) for key in columns] for record in records]
    return Table(title, rows, [words(key) for key in columns])


def listing(title: str, lines: Sequence[Any]) -> list[Block]:
    """A titled list, or nothing when it is empty."""
    return [Text(title, "\n".join(f"- {line}" for line in lines))] if lines else []


def report(title: str, values: Mapping[str, Any]) -> list[Block]:
    """Any nested result: plain values first, then a block for each table, list of records and list of sentences."""
    flat: dict[str, Any] = {}
    below: list[Block] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            nested = report(words(key), value)
            below += nested
        elif _is_records(value):
            below.append(grid(words(key), value))
        elif isinstance(value, list | tuple) and any(isinstance(item, str) and " " in item for item in value):
            below += listing(words(key), value)
        elif value not in ([], (), {}):
            flat[key] = value
    return ([facts(title, flat)] if flat else []) + below


def _is_records(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
