"""A directory with a model and a recipe, in which `edgetool run` runs with the stand-ins of fake_steps.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.fakes import fake_steps

RECIPE = """
[run]
model = "model"
output = "out"
ladder = [{ group_size = 64 }, { method = "awq" }]

[steps.quantize]
command = "quantize"
group_size = 128

[steps.eval]
command = "eval"
from = "quantize"
against = { from = "model" }
tasks = "perplexity"
gate = "ratio<=1.05"

[steps.image]
command = "compile-vcu128"
from = "quantize"

[steps.serve]
command = "serve-gpu"
from = "quantize"
ask = "What is <the> capital?"
ask_tokens = 5
"""


class Run:
    """A directory with a model and a recipe, and edgetool run in it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.out = directory / "out"
        self.monkeypatch = monkeypatch
        (directory / "model").mkdir()
        (directory / "model" / "weights").write_text("original")
        (directory / "r.toml").write_text(RECIPE)
        monkeypatch.chdir(directory)
        monkeypatch.setenv("FAKE_CALLS", str(directory / "calls"))
        monkeypatch.setattr("edgetool.pipeline.child.PROGRAM", fake_steps.PROGRAM)

    def __call__(self, *arguments: str, steps: str = "", group: int = 128) -> Any:
        from edgetool.cli import app

        self.monkeypatch.setenv("FAKE_STEPS", steps)
        self.monkeypatch.setenv("FAKE_GROUP", str(group))
        return CliRunner().invoke(app, ["run", *(arguments or ("r.toml",)), "--json"])

    def states(self, *arguments: str, **how: Any) -> dict[str, str]:
        """Step -> state of a run that succeeds."""
        result = self(*arguments, **how)
        assert result.exit_code == 0, result.output
        return states_of(json.loads(result.stdout))

    def edit(self, old: str, new: str) -> None:
        path = self.directory / "r.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def calls(self) -> list[str]:
        """The command lines since the last call of this."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


def states_of(document: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in document["steps"]}
