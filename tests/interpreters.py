"""The interpreters of other tools, for tests that need them: installed by `edgetool envs install NAME`, or named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetool.backends.environments import look, recipe_of
from edgetool.config import load


def interpreter_of(name: str, variable: str | None = None) -> Path:
    """The environment's Python, as edgetool itself finds it (EDGETOOL_ENVS_PYTHON, EDGETOOL_ENVS_DIRECTORY).

    `variable` names the interpreter directly and comes first. Without an environment the test is skipped.
    """
    if variable and os.environ.get(variable):
        return Path(os.environ[variable])
    there = look(recipe_of(name), load("envs", {}).envs)
    if there.state != "ready":
        pytest.skip(f"no environment {name}: {there.why}; run `edgetool envs install {name}`")
    return there.python
