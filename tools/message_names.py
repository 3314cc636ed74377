"""What is to be translated and is known by importing edgetool: names of rows and columns, requirements of settings.

Names are keys of documents, which tables show in words (`peak_rss_bytes` as "peak memory"). What must be translated are
the properties of the published schemas (docs/schemas). What may be is every key that the code writes down: some tables
show more than a document has.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetool.commands._blocks import name_beside, words
from edgetool.config import SECTIONS, must_of

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "docs" / "schemas"
SOURCE = ROOT / "src" / "edgetool"

NO_TABLES = ("edgetool.progress.", "edgetool.config.", "edgetool.failure.")
"""Documents that are never shown as a table."""


def needed() -> dict[str, list[str]]:
    """Names that tables can show, each with the schemas that have it."""
    found: dict[str, list[str]] = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        if not path.name.startswith(NO_TABLES):
            for name in _names(json.loads(path.read_text(encoding="utf-8"))):
                found.setdefault(name, []).append(path.name)
    return found


def requirements() -> dict[str, list[str]]:
    """What a setting has to be, in words: some are put together from lists, so they are read from the sections."""
    found: dict[str, list[str]] = {}
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            if " " in must_of(field):
                found.setdefault(must_of(field), []).append(f"[{name}] {key}")
    return found


def possible() -> set[str]:
    """Names of all keys, fields and columns in the code."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(words(node.value))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(words(node.target.id))
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(words(node.arg))
    return found


def _names(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict):
            for key in properties:
                yield words(key)
                yield name_beside(key, properties)
        for value in schema.values():
            yield from _names(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _names(value)
