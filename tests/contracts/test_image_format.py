"""docs/image-format.md speaks of everything that is in an image."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgetool.fpga.image_format import FORMAT, VERSION
from edgetool.fpga.program import NUMERICS, OPERATIONS
from tests.fakes.quantized_models import make_quantized
from tests.unit.fpga.conftest import compile_into

TEXT = (Path(__file__).parent.parent.parent / "docs" / "image-format.md").read_text()


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_0-9.]+", text))


def test_format_version_and_numerics_are_named() -> None:
    assert f"`{FORMAT}`, version {VERSION[0]}.{VERSION[1]}" in TEXT
    assert f"Numerics `{NUMERICS}`" in TEXT


def test_every_operation_and_its_fields_are_described() -> None:
    rows = {match[1]: match[0] for match in re.finditer(r"^\| ([A-Z_]+) \|.*$", TEXT, re.MULTILINE)}
    assert set(rows) == set(OPERATIONS)
    for name, (needed, optional) in OPERATIONS.items():
        for field in {*needed, *optional} - {"in", "out"}:
            assert f"`{field}`" in rows[name], (name, field)


def test_every_key_and_every_file_of_an_image_is_described(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen3", desc_act=("q", "down"))
    compile_into(made.path, tmp_path / "image")
    manifest = json.loads((tmp_path / "image" / "manifest.json").read_text())
    program = json.loads((tmp_path / "image" / "program.json").read_text())
    known = words(TEXT)
    keys = {*manifest, *program, *manifest["kv"], *manifest["model"], *manifest["embedding"], *manifest["program"]}
    keys |= {*manifest["segments"][0], *manifest["constants"][0], *program["buffers"][0], *program["symbols"]}
    for record in manifest["tensors"]:
        keys |= {*record, *record.get("perm", {}), *record["source"]}
    assert keys <= known, keys - known
    for path in (tmp_path / "image").rglob("*"):
        if path.is_file() and path.parent.name != "tokenizer":
            assert path.name in known or re.fullmatch(r"pc\d\d\.bin", path.name), path
    roles = {record["role"] for record in manifest["constants"]}
    assert roles == {"norm", "bias", "order", "table"} and roles <= known
