"""The real demo model, against transformers' own reading of the same GGUF file."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.inspect import inspect_checkpoint
from tests.fakes.naive_bpe import SMOLLM, NaiveBpe
from tests.fakes.nasty_strings import NUMERIC, PLAIN, random_strings

pytestmark = pytest.mark.demo

TEXT = "The capital of France is Paris.\n\ndef double(x):\n    return x + x  # 12345 — naïve"


def test_weights_and_logits_are_those_transformers_takes_from_the_gguf_file(
    demo_model_dir: Path, demo_gguf: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    tokens = torch.tensor([Tokenizer.from_file(str(demo_model_dir / "tokenizer.json")).encode(TEXT).ids])
    with torch.no_grad():
        logits = model(tokens).logits
    # what from_pretrained(gguf_file=...) calls, without its second and third reading of the file
    theirs = load_gguf_checkpoint(str(demo_gguf), return_tensors=True, model_to_load=model)["tensors"]
    ours = model.state_dict()
    assert set(ours) - set(theirs) == {"lm_head.weight"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.half().float()), name
    model.load_state_dict(theirs, strict=False)
    with torch.no_grad():
        expected = model(tokens).logits
    # weights are equal but for rounding to fp16 (2**-11 relative); logits reach 36, measured difference 0.03
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert not torch.equal(logits, expected)  # the second run did use the other weights


def test_the_tokenizer_is_the_books_and_where_digits_play_no_part_transformers(
    demo_model_dir: Path, demo_gguf: Path
) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(demo_model_dir)
    document = json.loads((demo_model_dir / "tokenizer.json").read_text())
    special = [token["content"] for token in document["added_tokens"]]
    naive = NaiveBpe(document["model"]["vocab"], document["model"]["merges"], special, SMOLLM)
    for text in PLAIN + NUMERIC + random_strings(1500):
        assert ours(text).input_ids == naive.encode(text), repr(text)
    # transformers drops the model's splitting of digits when it reads GGUF: white space before one is cut otherwise
    theirs = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    for text in PLAIN + random_strings(1500, seed=1, digits=False):
        assert ours(text).input_ids == theirs(text).input_ids, repr(text)
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    chat = [{"role": "user", "content": "Hello!"}]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert "<|im_start|>user\nHello!<|im_end|>" in rendered[0]


def test_inspect_finds_smollm2_and_nothing_wrong(demo_model_dir: Path) -> None:
    report = inspect_checkpoint(demo_model_dir)
    assert report.parameters == 134_515_008  # as the model's card says: 135M
    assert (report.architecture, report.dtypes) == ("LlamaForCausalLM", {"F16": 272})
    assert (report.quantization, report.problems) == (None, [])
    assert report.tokenizer
    assert report.chat_template


def test_side_files_for_an_output_are_tokenizer_and_generation_settings(demo_model_dir: Path) -> None:
    names = [path.name for path in Checkpoint.open(demo_model_dir).side_files]
    assert names == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
