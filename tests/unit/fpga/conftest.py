"""Compiled images of small random models, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetool.config import CommonConfig, CompileConfig
from edgetool.fpga.job import compile_checkpoint
from edgetool.progress import NullProgress
from tests.fakes.quantized_models import Made, make_quantized


def compile_into(model: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """`edgetool compile-vcu128` without the command line; one thread and --lm-head rtn4 unless given otherwise."""
    given = {"lm_head": "rtn4", "jobs": 1, "max_context": 64} | settings
    config = CompileConfig(model=str(model), output=output, **given)
    return compile_checkpoint(config, CommonConfig(offline=True), NullProgress())


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Made, Path]]:
    """`compiled("llama", compile={...}, sym=False)`: the checkpoint and its image, to be read only."""
    made: dict[str, tuple[Made, Path]] = {}

    def build(family: str = "llama", compile: dict[str, Any] | None = None, **how: Any) -> tuple[Made, Path]:
        key = repr((family, sorted((compile or {}).items()), sorted(how.items())))
        if key not in made:
            place = tmp_path_factory.mktemp("image")
            checkpoint = make_quantized(place / "q", family, **how)
            compile_into(checkpoint.path, place / "image", **(compile or {}))
            made[key] = checkpoint, place / "image"
        return made[key]

    return build
