"""The command line in this process and as a real child: with the stand-in of tests/fakes/fake_job.py, and real."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.fakes.process_server import ProcessServer

FAKE_JOB = Path(__file__).parent.parent / "fakes" / "fake_job.py"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the developer's own machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("EDGETOOL_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("EDGETOOL_JOBS_RECORD", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("fake_job", FAKE_JOB)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "edgetool.quantizers.job", module)
    return module


@pytest.fixture
def edgetool(fake_job: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`edgetool("quantize", "demo", job="bug")` through typer's own runner."""
    from edgetool.cli import app

    def invoke(*arguments: str, job: str = "", env: dict[str, str] | None = None) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"FAKE_JOB": job, **(env or {})})

    return invoke


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same as a child process with pipes for stdout and stderr."""

    def run(*arguments: str, job: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(FAKE_JOB), *arguments],
            env={**os.environ, "FAKE_JOB": job, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("llama", tied=False)`: a tiny checkpoint, made once a session; to be read only (copy it to damage it)."""
    from tests.fakes.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def model(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp("models") / family, family, **options)
        return made[key]

    return model


@pytest.fixture
def quantize() -> Callable[..., Any]:
    """`edgetool quantize ... --json` for real, in this process, with a small recipe that later options override."""
    from edgetool.cli import app

    small = ("--group-size", "32", "--calib-samples", "4", "--calib-seqlen", "32", "--threads", "1")

    def invoke(model: Path | str, output: Path, *options: str) -> Any:
        return CliRunner().invoke(app, ["quantize", str(model), "-o", str(output), *small, *options, "--json"])

    return invoke


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessServer]:
    """Real processes that stop at exact steps."""
    server = ProcessServer(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()
