"""Write docs/schemas/*.json and docs/schemas/README.md; `--check` only compares (exit 1 when stale).

Documents of commands come from tools/schemas/*.yaml (tools/schema_sources.py says how they are written), that of
`--show-config` from the configuration model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from schema_sources import DIALECT, VERSION, Source, sentence, sources

DOCS = Path(__file__).resolve().parent.parent / "docs" / "schemas"
NOTE = "<!-- written by tools/generate_schemas.py (`make docs`): edit tools/schemas/, not this file -->\n"


def settings_schema() -> dict[str, Any]:
    """The schema of `--show-config --json`, from the configuration model itself."""
    from edgetool.config import SECTIONS

    sections: dict[str, Any] = {}
    defs: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        made = section.model_json_schema(mode="serialization", ref_template="#/$defs/{model}")
        defs |= made.pop("$defs", {})
        sections[name] = _bare(made)
        sections[name]["required"] = list(made["properties"])
    settings = {
        "type": "object",
        "description": "The sections that the command reads, `common` first.",
        "properties": {name: {"$ref": f"#/$defs/section_{name}"} for name in sections},
        "required": ["common"],
        "additionalProperties": False,
    }
    origins = {
        "type": "object",
        "description": "section.key -> where its value came from; a key that is missing has its default.",
        "additionalProperties": {"type": "string", "minLength": 1},
        "propertyNames": {"pattern": r"^[a-z_]+\.[a-z_0-9]+$"},
    }
    return {
        "$schema": DIALECT,
        "$id": f"urn:edgetool:schema:config:{VERSION}",
        "title": f"edgetool.config/{VERSION}",
        "description": "What `--show-config --json` prints for every command; docs/config.md has the meaning of keys.",
        "type": "object",
        "properties": {
            "schema": {"const": f"edgetool.config/{VERSION}", "description": "Name and version of this document."},
            "ok": {"const": True, "description": "Whether the command did what was asked."},
            "config": settings,
            "origins": origins,
        },
        "required": ["schema", "ok", "config", "origins"],
        "additionalProperties": False,
        "$defs": {
            **{f"section_{name}": made for name, made in sections.items()},
            **{name: _bare(made) for name, made in sorted(defs.items())},
        },
    }


def _bare(schema: Any) -> Any:
    """Without pydantic's titles and our own notes on settings, and strict."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":  # what is below are names of settings
            made[key] = {name: _bare(setting) for name, setting in value.items()}
        elif key not in ("title", "must", "option", "off", "default", "format"):
            made[key] = _bare(value)
    return made


def files() -> dict[str, str]:
    """Name -> text of everything in docs/schemas/ that is written here."""
    described = sources()
    schemas = {one.file_name: one.schema() for one in described}
    schemas[f"edgetool.config.{VERSION}.json"] = settings_schema()
    pages = {name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in sorted(schemas.items())}
    return {**pages, "README.md": reference(described)}


INTRODUCTION = """# What `--json` prints

One file for each document, named after the document's own `schema` field: `edgetool.quantize/1` is described by
[edgetool.quantize.1.json](edgetool.quantize.1.json), a JSON Schema (2020-12) that stands alone. How to read the
documents in a script is in [json.md](../json.md). A number that is not finite is `null`. Keys in *italics* may be
missing. Real documents are in [examples/](examples).

"""


def reference(described: list[Source]) -> str:
    """docs/schemas/README.md: every key of every document."""
    parts = [NOTE, INTRODUCTION]
    for one in described:
        parts.append(f"- [{one.title}](#{one.title.replace('.', '').replace('/', '')}): {sentence(one.about)}\n")
    parts.append(
        "- [edgetool.config/1](edgetool.config.1.json): what `--show-config --json` prints; its keys are in"
        " [config.md](../config.md).\n"
    )
    for one in described:
        parts.append(f"\n## {one.title}\n\n{sentence(one.about)}\n")
        defs = one.schema()["$defs"]
        names = [name for name in one.outcomes if name != "failure" or one.name == "failure"]
        for name in names:  # grows: a shape follows those that it is part of
            kind = "**" if name in one.outcomes else "*"
            if "properties" not in defs[name]:
                parts.append(f"\n*{shown(name)}* ({words(defs[name], names)}): {defs[name]['description']}\n")
                continue
            parts.append(f"\n{kind}{shown(name)}{kind}: {defs[name]['description']}\n\n")
            parts.append("| key | type | meaning |\n| --- | --- | --- |\n")
            for row in rows(defs[name], "", names):
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n")
    return "".join(parts)


def shown(name: str) -> str:
    """The name of an outcome or shape in words."""
    return name.replace("_", " ")


def rows(schema: Mapping[str, Any], prefix: str, shapes: list[str]) -> Iterator[tuple[str, str, str]]:
    """(key, type, meaning) of every property, nested ones by their path."""
    for key, value in schema["properties"].items():
        path = f"{prefix}{key}"
        if path in ("schema", "ok"):
            continue
        name = f"`{path}`" if key in schema["required"] else f"*`{path}`*"
        yield name, words(value, shapes), value.get("description", "")
        nested = value
        while True:
            if nested.get("type") == "array":
                nested, path = nested["items"], f"{path}[]"
            elif isinstance(nested.get("additionalProperties"), dict):
                nested, path = nested["additionalProperties"], f"{path}.*"
            elif "anyOf" in nested:
                nested = nested["anyOf"][0]
            else:
                break
        if "properties" in nested:
            yield from rows(nested, f"{path}.", shapes)


def words(schema: Mapping[str, Any], shapes: list[str]) -> str:
    """A type as people read it; shapes that it names are added to `shapes`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in shapes:
            shapes.append(name)
        return shown(name)
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join("null" if value is None else str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(words(one, shapes) for one in schema["anyOf"])
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {words(schema['items'], shapes)}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {words(schema['additionalProperties'], shapes)}"
    return str(kind)


def main() -> int:
    """Write the files, or with `--check` name those that are stale."""
    made = files()
    written = {path.name for path in DOCS.glob("*") if path.is_file()}
    if "--check" in sys.argv:
        stale = [n for n, text in made.items() if n not in written or (DOCS / n).read_text(encoding="utf-8") != text]
        stale += sorted(written - made.keys())
        if stale:
            print(f"stale: {', '.join(f'docs/schemas/{name}' for name in stale)}; run make docs", file=sys.stderr)
        return 1 if stale else 0
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in written - made.keys():
        (DOCS / name).unlink()
    for name, text in made.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
