"""The published schemas: complete, strict, described, and each held against real documents (docs/schemas/examples)."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
import typer.main

from edgetool import console, errors
from edgetool.cli import app
from tests import documents

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = documents.SCHEMAS / "examples"
SCHEMAS = documents.schemas()
NO_COMMANDS = {"edgetool.config/1", documents.PROGRESS, "edgetool.failure/1"}
CASES = [
    (name, outcome)
    for name in sorted(SCHEMAS)
    for outcome in documents.outcomes(name) or ["settings"]
    if outcome != "failure" or name == "edgetool.failure/1"  # it is the same everywhere
]
GONE = object()


def example(name: str, outcome: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / f"{name.removesuffix('/1')}.1.{outcome}.json").read_text())
    return found


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        yield from commands(command, f"{prefix}{name}-") if hasattr(command, "commands") else ()


def described(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(place, object, property) of every property in a schema."""
    if isinstance(schema, list):
        for index, one in enumerate(schema):
            yield from described(one, f"{place}[{index}]")
    elif isinstance(schema, dict):
        for key, value in schema.get("properties", {}).items():
            yield f"{place}.{key}", schema, value
        for key, value in schema.items():
            yield from described(value, f"{place}.{key}")


def test_the_files_are_those_that_the_sources_make() -> None:
    program = [sys.executable, str(ROOT / "tools" / "generate_schemas.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_file_is_a_schema_that_stands_alone(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema_rs.meta.validate(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    short, version = re.fullmatch(r"edgetool\.([a-z0-9-]+)/(\d+)", name).groups()  # type: ignore[union-attr]
    assert schema["$id"] == f"urn:edgetool:schema:{short}:{version}"
    assert (documents.SCHEMAS / f"edgetool.{short}.{version}.json").is_file()
    assert all(ref.startswith("#/$defs/") for ref in re.findall(r'"\$ref": "([^"]*)"', json.dumps(schema)))


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_key_has_a_description_and_a_unit_and_no_other_key_is_allowed(name: str) -> None:
    units = {"_bytes": "[bytes]", "_s": "[seconds]", "seconds": "[seconds]", "_tokens": "[tokens]"}
    seen = 0
    for place, owner, value in described(SCHEMAS[name], name):
        seen += 1
        assert value.get("description") or (name == "edgetool.config/1" and "$defs.section_" not in place), place
        assert owner["additionalProperties"] is False, place
        assert set(owner.get("required", ())) <= set(owner["properties"]), place
        key = place.rpartition(".")[2]
        numeric = any(kind in json.dumps(value.get("type", "")) for kind in ("integer", "number"))
        for suffix, unit in units.items():
            if numeric and name != "edgetool.config/1" and key.endswith(suffix) and not key.endswith("_per_s"):
                assert value["description"].endswith(unit), place
    assert seen >= 4


def test_every_command_that_prints_json_has_a_schema_and_every_schema_a_command() -> None:
    found = {
        f"edgetool.{name}/1"
        for name, command in commands(typer.main.get_command(app))
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert len(found) > 20
    assert found == set(SCHEMAS) - NO_COMMANDS


def test_values_that_the_code_names_are_those_of_the_schemas() -> None:
    from edgetool.backends.environments import State
    from edgetool.config_models import BackendName, ConvertTarget
    from edgetool.evaluation.tasks import Framework
    from edgetool.jobs import store
    from edgetool.pipeline import work
    from edgetool.scheduler.ownership import ProcessClass

    def values(name: str, shape: str, key: str) -> set[str]:
        return set(SCHEMAS[name]["$defs"][shape]["properties"][key]["enum"])

    assert values("edgetool.gpus/1", "gpu_process", "class") == set(get_args(ProcessClass))
    assert values("edgetool.envs-doctor/1", "environment", "state") == set(get_args(State))
    assert values("edgetool.envs-list/1", "environment", "state") == {*get_args(State), "yours"}
    assert values("edgetool.eval/1", "task_plan", "framework") == set(get_args(Framework))
    assert values("edgetool.quantize/1", "result", "backend") == set(get_args(BackendName))
    assert set(SCHEMAS["edgetool.convert/1"]["$defs"]["format"]["enum"]) == {*get_args(ConvertTarget), "fp32", "fp64"}
    states = {store.RUNNING, store.DONE, store.FAILED, store.STOPPED, store.LOST}
    assert set(SCHEMAS["edgetool.jobs/1"]["$defs"]["job"]["properties"]["state"]["enum"]) == states
    steps = {work.WAITING, work.RUNNING, work.UNCHANGED, work.DONE, work.FAILED, work.STOPPED}
    assert values(documents.PROGRESS, "step", "state") == steps
    assert values("edgetool.run/1", "step_result", "state") == steps - {work.WAITING}


def test_a_failure_is_of_a_public_kind_with_a_documented_exit_code() -> None:
    kinds = [kind.__name__ for _, kind in inspect.getmembers(errors, inspect.isclass)]
    keys = SCHEMAS["edgetool.failure/1"]["$defs"]["failure"]["properties"]
    assert set(keys["type"]["enum"]) == set(kinds) - {"EdgetoolError", "ReaderGone", "Any", "ClassVar", "Mapping"} | {
        "Interrupted",
        "Bug",
    }
    # nobody reads a document that says that nobody reads
    assert set(keys["exit_code"]["enum"]) == set(errors.EXIT_CODES) - {0, errors.ReaderGone.exit_code}


def test_an_error_of_a_module_of_its_own_has_the_name_of_its_public_class() -> None:
    class Own(errors.BadInput):
        pass

    assert Own("x").type_name == "BadInput"


def test_every_outcome_has_one_example_and_no_other_file_is_there() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {
        f"{name.removesuffix('/1')}.1.{outcome}.json" for name, outcome in CASES
    }


@pytest.mark.parametrize(("name", "outcome"), CASES)
def test_an_example_is_the_outcome_that_it_is_named_after(name: str, outcome: str) -> None:
    document = example(name, outcome)
    assert documents.faults(document, name) == []
    if outcome != "settings":
        assert documents.outcome_of(document, name) == outcome


def fits(schema: Any, root: Any, value: Any) -> bool:
    whole = {"$schema": root["$schema"], "$defs": root.get("$defs", {}), **schema}
    return bool(jsonschema_rs.validator_for(whole).is_valid(value))


def damages(schema: Any, root: Any, value: Any, place: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(what is wrong, where, what to put there) for every way to damage `value` that `schema` has to notice."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    for one in schema.get("anyOf", []):
        if fits(one, root, value):
            yield from (found for found in damages(one, root, value, place) if found[1] != place)
    if not schema.keys() - {"description"}:
        return  # anything may stand here
    others = [
        other for other in (None, True, 0.5, "no such thing", [[]], {"no such": [[]]}) if not fits(schema, root, other)
    ]
    assert others, place
    yield from (("a wrong type", place, other) for other in others)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if schema.get("additionalProperties") is False:
            yield "an unknown key", (*place, "no_such_key"), 1
        for key in schema.get("required", []):
            yield "a missing key", (*place, key), GONE
        for key, inner in value.items():
            below = known.get(key, schema.get("additionalProperties"))
            if isinstance(below, dict):
                yield from damages(below, root, inner, (*place, key))
    elif isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value[:2]):
            yield from damages(schema["items"], root, inner, (*place, index))


def damaged(document: dict[str, Any], place: tuple[Any, ...], what: Any) -> dict[str, Any]:
    made = copy.deepcopy(document)
    holder: Any = made
    for key in place[:-1]:
        holder = holder[key]
    if what is GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = what
    return made


@pytest.mark.parametrize(("name", "outcome"), CASES)
def test_whatever_is_missing_too_much_or_of_another_type_is_noticed(name: str, outcome: str) -> None:
    document, schema = example(name, outcome), SCHEMAS[name]
    start = schema if outcome == "settings" else schema["$defs"][outcome]
    validator = documents.validator(name, None if outcome == "settings" else outcome)
    tried = 0
    for wrong, place, what in damages(start, schema, document, ()):
        if not place:
            continue
        tried += 1
        assert not validator.is_valid(damaged(document, place, what)), (wrong, place)
    assert tried >= 2 * len(document) - 2


def test_a_document_that_does_not_fit_fails_the_test_that_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    console.Output("edgetool.jobs-clean/1", as_json=True).result({"removed": 1}, [])
    assert documents.wrong == []
    console.Output("edgetool.jobs-clean/1", as_json=True).result({"removed": 1, "more": 2}, [])
    console.Output("edgetool.no-such/1", as_json=True).result({}, [])
    console.event_line("note", message=1)
    found, documents.wrong[:] = list(documents.wrong), []
    assert [text.split(":")[0].split(",")[0] for text in found[:3]] == [
        "edgetool.jobs-clean/1",
        "no schema is named edgetool.no-such/1",
        "edgetool.progress/1",
    ]
    documents.look(capsys.readouterr().out)  # three documents are none
    assert documents.wrong == []
    documents.look('{\n  "schema": "edgetool.jobs-clean/1", "ok": true}')
    assert documents.wrong.pop().endswith("is a required property")


GUIDE = (ROOT / "docs" / "json.md").read_text()
FILES = {
    "quantize.json": "edgetool.quantize.1.result",
    "inspect.json": "edgetool.inspect.1.result",
    "convert.json": "edgetool.convert.1.result",
    "eval.json": "edgetool.eval.1.gate_failed",
    "compile.json": "edgetool.compile-vcu128.1.result",
    "server.json": "edgetool.serve-gpu.1.result",
}
PIPED = {
    "edgetool chat": "edgetool.chat.1.result",
    "edgetool serve-gpu --stop": "edgetool.serve-gpu.1.stop",
    "edgetool run": "edgetool.run.1.result",
    "edgetool quantize demo -o q --group-size 64 --dry-run": "edgetool.quantize.1.plan",
    "edgetool quantize demo -o q --group-size 100": "edgetool.failure.1.failure",
    "edgetool gpus": "edgetool.gpus.1.result",
    "edgetool jobs": "edgetool.jobs.1.result",
}


def filters() -> list[tuple[str, str]]:
    """(filter of jq, example that it is to read) of every line of the guide."""
    found = [(query, FILES[file]) for query, file in re.findall(r"jq -\w+ '([^']+)' (\w+\.json)\b", GUIDE)]
    for query, file in re.findall(r"\$\(jq -\w+ '([^']+)' (\w+\.json)\)", GUIDE):
        found.append((query, FILES[file]))
    for line in GUIDE.splitlines():
        match = re.match(r"(edgetool .*) --json \| jq (?:-\w+ )?'([^']+)'", line)
        if match:
            (name,) = [name for start, name in PIPED.items() if match[1].startswith(start)]
            found.append((match[2], name))
    return found


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(("query", "name"), filters())
def test_every_filter_of_the_guide_finds_what_it_asks_for(query: str, name: str) -> None:
    text = (EXAMPLES / f"{name}.json").read_text()
    # what is not there would be null, in silence: let it be an error
    keys = set(re.findall(r"\.([a-z][a-z_0-9]*)", query))
    done = subprocess.run(["jq", "-r", query], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f'"{key}":' in text for key in keys)
    assert done.stdout.strip() or query.endswith("[]")


def test_the_guide_has_a_filter_for_every_chained_step() -> None:
    assert {name.split(".")[1] for _, name in filters()} == {
        "quantize", "inspect", "convert", "eval", "compile-vcu128", "serve-gpu", "chat", "run", "gpus", "jobs",
        "failure",
    }  # fmt: skip
