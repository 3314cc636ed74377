"""The import direction of CONTRIBUTING.md, held by import-linter; and what its contracts cannot say."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import edgetool

SOURCE = Path(edgetool.__file__).parent
ROOT = Path(__file__).parent.parent.parent


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def users_of(package: str) -> set[str]:
    return {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_console_is_the_only_importer_of_rich() -> None:
    assert users_of("rich") == {"console.py"}


def test_click_is_never_imported() -> None:
    assert users_of("click") == set()


def test_only_the_command_line_knows_typer() -> None:
    assert {name.split("/")[0] for name in users_of("typer")} == {"cli.py", "commands"}


def test_errors_progress_and_artifacts_need_the_standard_library_only() -> None:
    for module in ("errors", "progress", "progress_lines", "artifacts"):
        outside = {name.split(".")[0] for name in imports(SOURCE / f"{module}.py")} - set(sys.stdlib_module_names)
        assert outside <= {"edgetool", "__future__"}, module
