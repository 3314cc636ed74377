"""The tokenizer made from GGUF metadata: against by-the-book BPE, and against transformers' own classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

from edgetool.checkpoints.gguf.tokenizer import special_token_ids, tokenizer_config, tokenizer_json
from edgetool.errors import BadInput
from tests.fakes.naive_bpe import SMOLLM, NaiveBpe
from tests.fakes.nasty_strings import NUMERIC, PLAIN, random_strings
from tests.fakes.tiny_models import make_tiny_model

EVERYTHING = PLAIN + NUMERIC + random_strings(500)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")
    document = json.loads((model / "tokenizer.json").read_text())
    vocab = sorted(document["model"]["vocab"], key=document["model"]["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocab],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(metadata, "here")))


def _vocab(metadata: dict[str, Any]) -> dict[str, int]:
    return {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def test_smollm_encodes_as_the_book_says(metadata: dict[str, Any]) -> None:
    tokenizer = _tokenizer(metadata)
    naive = NaiveBpe(_vocab(metadata), metadata["tokenizer.ggml.merges"], SPECIAL, SMOLLM)
    for text in EVERYTHING:
        assert tokenizer.encode(text).ids == naive.encode(text), repr(text)


def test_smollm_sets_every_digit_apart_where_plain_gpt_2_does_not(metadata: dict[str, Any]) -> None:
    # white space in front of a digit is where the two differ even if no token joins digits
    cuts = [_tokenizer(metadata | {"tokenizer.ggml.pre": pre}).pre_tokenizer for pre in ("smollm", "gpt-2")]
    pieces = [[piece for piece, _ in cut.pre_tokenize_str("a  12")] for cut in cuts]
    assert pieces == [["a", "ĠĠ", "1", "2"], ["a", "Ġ", "Ġ12"]]


def test_qwen2_encodes_as_transformers_own_class(metadata: dict[str, Any]) -> None:
    tokenizer = _tokenizer(metadata | {"tokenizer.ggml.pre": "qwen2"})
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab=_vocab(metadata), merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
    for text in EVERYTHING:
        if "<|endoftext|>" not in text:  # which that class adds of its own accord
            assert tokenizer.encode(text).ids == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2"])
def test_text_comes_back_from_its_tokens(metadata: dict[str, Any], pre: str) -> None:
    tokenizer = _tokenizer(metadata | {"tokenizer.ggml.pre": pre})
    for text in EVERYTHING:
        if pre != "qwen2" or text.isascii():  # qwen2 composes accents first
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_begin_of_text_is_added_only_where_the_file_asks(metadata: dict[str, Any]) -> None:
    assert _tokenizer(metadata).encode("dog").ids[0] != 0
    asked = _tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert asked.encode("dog").ids == [0, *_tokenizer(metadata).encode("dog").ids]
    without = metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}
    with pytest.raises(BadInput, match="begin-of-text"):
        tokenizer_json(without, "here")


def test_control_tokens_are_special_user_defined_ones_are_not_unused_ones_are_gone(metadata: dict[str, Any]) -> None:
    tokens = [*metadata["tokenizer.ggml.tokens"], "<tool>", "[PAD]"]
    types = [*metadata["tokenizer.ggml.token_type"], 4, 5]
    tokenizer = _tokenizer(metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    ids = tokenizer.encode("<|im_start|><tool>").ids
    assert ids == [0, len(tokens) - 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"
    assert tokenizer.token_to_id("[PAD]") is None


def test_roles_map_to_ids(metadata: dict[str, Any]) -> None:
    more = metadata | {"tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 3}
    assert special_token_ids(more, "here") == {"bos": 0, "eos": 1, "pad": 2, "unk": 3}
    assert special_token_ids(metadata, "here") == {"bos": 0, "eos": 1}


def test_the_configuration_is_read_by_transformers(metadata: dict[str, Any], tmp_path: Path) -> None:
    write: Callable[[str, object], int] = lambda name, document: (tmp_path / name).write_text(json.dumps(document))  # noqa: E731
    write("tokenizer.json", tokenizer_json(metadata, "here"))
    write("tokenizer_config.json", tokenizer_config(metadata | {"tokenizer.chat_template": "{{ 1 }}"}, 77, "here"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.model_max_length, tokenizer.chat_template, tokenizer.eos_token_id) == (77, "{{ 1 }}", 1)
