"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


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
