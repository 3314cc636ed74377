"""Usage where the host does not count: a plain host and a tokenizer that the user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetool.errors import EdgetoolError
from edgetool.fpga_service.counting import TokenCounter
from edgetool.fpga_service.exchange import Conversation
from tests.fakes.fake_host import FakeHost
from tests.fakes.gateway_server import run, serving
from tests.fakes.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


def test_usage_of_a_plain_host_is_counted_with_the_template(directory: Path) -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "the quick brown fox"}]
    text = "<|im_start|>user\nthe quick brown fox<|im_end|>\n<|im_start|>assistant\n"  # by hand
    prompt = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    made = len(tokenizer("echo: the quick brown fox", add_special_tokens=False)["input_ids"])

    async def test() -> None:
        counter = TokenCounter(directory)
        async with FakeHost(extended=False) as host, serving(host, max_model_len=prompt + 8) as served:
            served.gateway.counter = counter
            answer = (await served.chat("the quick brown fox", max_tokens=8)).json()
            expected = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
            assert answer["usage"] == expected
            refused = await served.chat("the quick brown fox", max_tokens=9)
            assert refused.json()["error"]["code"] == "context_length_exceeded"

    run(test)
    assert TokenCounter(directory).prompt(Conversation(messages)) == prompt


def test_text_and_ids_are_counted_as_they_are(directory: Path) -> None:
    counter = TokenCounter(directory)
    assert counter.prompt([1, 2, 3]) == 3
    assert counter.prompt("fox") == counter.text("fox") == len(tiny_tokenizer()("fox")["input_ids"])


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetoolError):
        TokenCounter(tmp_path)
