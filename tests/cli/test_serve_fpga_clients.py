"""Other people's clients against `edgetool serve-fpga`: langchain, lm-eval and OpenAI's own for Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.served import Served
from tests.fakes.tiny_image import make_tiny_image

pytestmark = pytest.mark.slow

NPM_OPENAI = "openai@6.49.0"
SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "the quick brown fox" }];
const asked = { model: "image", messages, temperature: 0, max_tokens: 8 };
const whole = await client.chat.completions.create(asked);
let streamed = "", usage = null;
for await (const chunk of await client.chat.completions.create(
    { ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let refused = null;
try { await client.chat.completions.create({ ...asked, model: "other" }); }
catch (error) { refused = [error.status, error.code, error.param]; }
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ whole: whole.choices[0].message.content, usage: whole.usage, streamed,
                             streamedUsage: usage, refused, models }));
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def document(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("served")
    with Served(directory, "--image", str(image), "--port", "0", "--threads", "1", command="serve-fpga") as served:
        yield served.ready()


def test_langchain_is_answered_streamed_and_not(document: dict[str, Any]) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=document["openai_base_url"], api_key="k", model="image", temperature=0, max_tokens=8, max_retries=0
    )
    messages = [("system", "be short"), ("human", "the quick brown fox")]
    whole = model.invoke(messages)
    chunks = list(model.stream(messages, stream_usage=True))
    assert whole.content and "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] in range(1, 9)
    assert any(chunk.usage_metadata == whole.usage_metadata for chunk in chunks)
    assert whole.response_metadata["finish_reason"] in ("stop", "length")


def test_lm_eval_scores_and_generates_over_the_endpoint(
    document: dict[str, Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """local-completions against logits that the test takes from the simulator itself."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        model="image",
        base_url=f"{document['openai_base_url']}/completions",
        tokenizer=str(image / "tokenizer"),
        num_concurrent=2,
        max_retries=1,
        max_length=512,
    )
    pairs = [("The quick brown fox", " jumps over the lazy dog"), ("A checkpoint is", " a directory of files"),
             ("Une phrase", " en français")]  # fmt: skip
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)])
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids, start = lm.tok_encode(context + continuation), len(lm.tok_encode(context))
        expected, likeliest = likelihood(image, ids, start)
        assert logprob == pytest.approx(expected, abs=1e-3)  # float32 sums of a few logprobs, as JSON
        assert greedy == likeliest
    text = lm.generate_until([Instance("generate_until", {}, ("The quick", {"until": ["\n"], "max_gen_toks": 6}), 0)])
    assert len(text) == 1 and isinstance(text[0], str) and "\n" not in text[0]


def likelihood(image: Path, ids: list[int], start: int) -> tuple[float, bool]:
    """Sum of the log-probabilities of ids[start:], and whether each is the likeliest, by numpy in float64."""
    from edgetool.fpga.image import Image
    from edgetool.fpga.simulator.engine import Simulator

    with Simulator(Image.open(image)).session() as session:
        logits = np.asarray(session.feed(ids[:-1], "all"), dtype=np.float64)
    top = logits.max(axis=1, keepdims=True)
    chances = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    wanted = ids[start:]
    rows = chances[start - 1 :]
    return float(sum(row[id] for row, id in zip(rows, wanted, strict=True))), all(
        int(row.argmax()) == id for row, id in zip(rows, wanted, strict=True)
    )


def test_openais_client_for_node_is_answered_streamed_and_not(document: dict[str, Any], tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("no npm and node here")
    installing = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", NPM_OPENAI]
    installed = subprocess.run(installing, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"npm cannot install {NPM_OPENAI}: {installed.stderr[-300:]}")
    (tmp_path / "ask.mjs").write_text(SCRIPT)
    environment = {**os.environ, "BASE_URL": document["openai_base_url"], "KEY": "k"}
    done = subprocess.run([node, "ask.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["whole"] and said["streamed"] == said["whole"] and said["streamedUsage"] == said["usage"]
    assert said["refused"] == [404, "model_not_found", "model"] and said["models"] == ["image"]
