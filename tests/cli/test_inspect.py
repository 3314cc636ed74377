"""`edgetool inspect` from the command line to the checkpoint reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_models import make_tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model", "llama")
    return tmp_path / "model"


def test_a_checkpoint_is_described_in_words_and_as_a_document(edgetool: Callable[..., Any], checkpoint: Path) -> None:
    words = edgetool("inspect", str(checkpoint))
    assert words.exit_code == 0, words.stderr
    assert "LlamaForCausalLM" in words.stdout
    assert "none found" in words.stdout
    document = json.loads(edgetool("inspect", str(checkpoint), "--json").stdout)
    assert (document["schema"], document["ok"]) == ("edgetool.inspect/1", True)
    assert (document["architecture"], document["quantization"], document["problems"]) == ("LlamaForCausalLM", None, [])


def test_a_truncated_checkpoint_is_bad_input(edgetool: Callable[..., Any], checkpoint: Path) -> None:
    weights = next(checkpoint.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    result = edgetool("inspect", str(checkpoint), "--json")
    assert result.exit_code == 4
    assert weights.name in json.loads(result.stdout)["message"]


def test_a_name_that_leads_nowhere_is_bad_input(edgetool: Callable[..., Any]) -> None:
    result = edgetool("inspect", "org/name")
    assert result.exit_code == 4
    assert "hint: " in result.stderr and "hf:org/name" in result.stderr
