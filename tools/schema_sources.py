"""The sources of docs/schemas, tools/schemas/*.yaml, and the JSON Schemas that they mean.

A source describes one document, in the fewest words that are still a strict schema:

    about: what the document says
    shapes:                                # parts with a name; those of shared.yaml are known everywhere
      worst_module:
        is: object; a module and its error
        has: {module: "string; its name", relative_error: "ratio or null; 0 is none"}
    outcomes:                              # what the whole document can be; schema and ok are added
      result:
        about: a finished run
        has:
          output_bytes: bytes; size of the weight files
          worst_modules: list of worst_module; the largest errors
          peak_gpu_bytes?: bytes; on a GPU     # a key that may be missing
          smoke: {is: object; a question, has: {prompt: "string; what was asked"}}
      refused: {ok: false, plus: [failure, result], about: ...}    # the keys of other outcomes or shapes as well

The outcome `failure` is added to all. Before the semicolon stands the type: a word of TYPES, a shape, `list of T`,
`pair of T`, `map of T`, `one of a, b`, or several with `or` between them; `or null` after a list or map is about the
whole. Every key has a description, all are required that are not marked, and no others are allowed. A written file
stands alone: the shapes that it uses are in its $defs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SOURCES = Path(__file__).resolve().parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
VERSION = 1

TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "path": {"type": "string", "minLength": 1},
    "time": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)$"},
    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer"},
    "count": {"type": "integer", "minimum": 0},
    "bytes": {"type": "integer", "minimum": 0},
    "tokens": {"type": "integer", "minimum": 0},
    "pid": {"type": "integer", "minimum": 1},
    "port": {"type": "integer", "minimum": 0, "maximum": 65535},
    "number": {"type": "number"},
    "seconds": {"type": "number", "minimum": 0},
    "ratio": {"type": "number", "minimum": 0},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "object": {"type": "object"},
    "anything": {},
}
UNITS = {"bytes": "bytes", "tokens": "tokens", "seconds": "seconds", "share": "0 to 1"}


class Source:
    """One YAML source, beside the shapes that all of them know."""

    def __init__(self, name: str, content: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self.name = name
        self.about: str = content["about"]
        self.shapes: dict[str, Any] = {**shared, **content.get("shapes", {})}
        if clash := self.shapes.keys() & TYPES.keys():
            raise ValueError(f"{name}: {clash} are types and cannot be shapes")
        self.plain: bool = content.get("plain", False)  # without schema and ok: an event, not a document
        self.outcomes: dict[str, Any] = dict(content.get("outcomes", {}))
        if not self.plain:
            self.outcomes["failure"] = {**shared["failure"], "ok": False}
        self._defs: dict[str, Any] = {}

    @property
    def title(self) -> str:
        """What stands in the document's own `schema`."""
        return f"edgetool.{self.name}/{VERSION}"

    @property
    def file_name(self) -> str:
        return f"edgetool.{self.name}.{VERSION}.json"

    def schema(self) -> dict[str, Any]:
        """The JSON Schema (2020-12) of the document."""
        self._defs = {}
        outcomes = {name: self._outcome(name) for name in self.outcomes}
        return {
            "$schema": DIALECT,
            "$id": f"urn:edgetool:schema:{self.name}:{VERSION}",
            "title": self.title,
            "description": sentence(self.about),
            "oneOf": [{"$ref": f"#/$defs/{name}"} for name in outcomes],
            "$defs": {**outcomes, **dict(sorted(self._defs.items()))},
        }

    def _keys(self, what: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of an outcome or shape, with those that it takes over from others."""
        keys: dict[str, Any] = {}
        for other in what.get("plus", ()):
            keys |= self._keys(self.shapes.get(other) or self.outcomes[other])
        given = {key.rstrip("?") for key in what.get("has", {})}
        return {key: text for key, text in keys.items() if key.rstrip("?") not in given} | what.get("has", {})

    def _outcome(self, name: str) -> dict[str, Any]:
        what = self.outcomes[name]
        made = self._object(self._keys(what), what["about"])
        if not self.plain:
            head = {
                "schema": {"const": self.title, "description": "Name and version of this document."},
                "ok": {"const": what.get("ok", True), "description": "Whether the command did what was asked."},
            }
            made["properties"] = head | made["properties"]
            made["required"] = [*head, *made["required"]]
        return made

    def _object(self, keys: Mapping[str, Any], about: str) -> dict[str, Any]:
        return {
            "type": "object",
            "description": sentence(about),
            "properties": {key.rstrip("?"): self._value(what, key) for key, what in keys.items()},
            "required": [key for key in keys if not key.endswith("?")],
            "additionalProperties": False,
        }

    def _value(self, what: str | Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(what, str | Mapping):
            raise ValueError(f"{self.name}: {where!r} says nothing: a comma in a flow mapping?")
        text = what if isinstance(what, str) else what["is"]
        kind, semicolon, about = text.partition(";")
        if not semicolon or not about.strip():
            raise ValueError(f"{self.name}: {where} has no description: {text!r}")
        inner = self._object(self._keys(what), about) if isinstance(what, Mapping) else None
        made = self._type(kind.strip(), inner, where)
        return {**made, "description": " ".join(about.split()) + unit_of(kind)}

    def _type(self, kind: str, inner: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
        if kind.startswith("one of "):
            kind, _, also = kind.removeprefix("one of ").partition(" or ")
            values: list[Any] = [yaml.safe_load(value) for value in kind.split(",")]
            return {"enum": values + ([None] if also == "null" else [])}
        alternatives = kind.split(" or ")
        if len(alternatives) > 1 and not alternatives[0].startswith(("list of", "map of")):
            made = [self._type(one, inner, where) for one in alternatives]
            simple = made[0].keys() <= {"type", "minimum", "maximum"} and "type" in made[0]
            if simple and made[1:] == [TYPES["null"]]:  # the short spelling, which readers know
                return {**made[0], "type": [made[0]["type"], "null"]}
            return {"anyOf": made}
        if kind.endswith(" or null"):
            return {"anyOf": [self._type(kind.removesuffix(" or null"), inner, where), TYPES["null"]]}
        for word, keyword, type_name in (
            ("list of ", "items", "array"),
            ("pair of ", "items", "array"),
            ("map of ", "additionalProperties", "object"),
        ):
            if kind.startswith(word):
                sizes = {"minItems": 2, "maxItems": 2} if word == "pair of " else {}
                return {"type": type_name, keyword: self._type(kind.removeprefix(word), inner, where), **sizes}
        if kind == "object" and inner is not None:
            return dict(inner)
        if kind in TYPES:
            if kind == "object":
                raise ValueError(f"{self.name}: {where} is an object and does not say what it has")
            return dict(TYPES[kind])
        if kind in self.shapes:
            self._shape(kind)
            return {"$ref": f"#/$defs/{kind}"}
        raise ValueError(f"{self.name}: {where} is of no known type: {kind!r}")

    def _shape(self, name: str) -> None:
        if name in self._defs:
            return
        self._defs[name] = {}  # it may use itself
        what = self.shapes[name]
        if isinstance(what, Mapping) and "is" not in what:
            self._defs[name] = self._object(self._keys(what), what["about"])
        else:
            self._defs[name] = self._value(what, name)


def unit_of(kind: str) -> str:
    """` [bytes]` for what counts bytes."""
    words = kind.replace(",", " ").split()
    return "".join(f" [{unit}]" for word, unit in UNITS.items() if word in words and not kind.startswith("one of"))


def sentence(text: str) -> str:
    """With a capital, without line breaks, and with a full stop."""
    text = " ".join(text.split())
    first = text.split(" ")[0]
    text = text if first != first.lower() or "_" in first else text[0].upper() + text[1:]
    return text if text.endswith((".", "]")) else f"{text}."


def sources() -> list[Source]:
    """All of them, in the order of their names."""
    shared = yaml.safe_load((SOURCES / "shared.yaml").read_text(encoding="utf-8"))
    found = []
    for path in sorted(SOURCES.glob("*.yaml")):
        if path.stem != "shared":
            found.append(Source(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")), shared))
    return found
