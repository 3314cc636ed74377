"""Tokenizers into GGUF metadata: the same tokens when read back, and refusals of what would differ."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgetool.checkpoints.gguf.tokenizer import (
    NORMALIZERS,
    PRE_TOKENIZERS,
    WHOLE_WORDS,
    special_token_ids,
    tokenizer_config,
    tokenizer_json,
)
from edgetool.checkpoints.gguf.vocabulary import tokenizer_metadata
from edgetool.errors import BadInput
from tests.fakes.nasty_strings import NUMERIC, PLAIN, random_strings
from tests.fakes.tiny_models import make_tiny_model

CONFIG = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def directory(tiny: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    return tmp_path


def _change(directory: Path, name: str = "tokenizer.json", **changes: Any) -> dict[str, Any]:
    """Set top-level keys, or with a dot in the name those one level down."""
    document: dict[str, Any] = json.loads((directory / name).read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        (document[outer] if inner else document)[inner or outer] = value
    (directory / name).write_text(json.dumps(document))
    return document


def _begin_of_text(token: str) -> dict[str, Any]:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
                "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [0], "tokens": [token]}},
            },
        ],
    }


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_tokenizer_comes_back_with_the_same_tokens(directory: Path, pre: str) -> None:
    _change(
        directory,
        pre_tokenizer=PRE_TOKENIZERS[pre],
        normalizer=NORMALIZERS.get(pre),
        model__ignore_merges=pre in WHOLE_WORDS,
    )
    metadata = tokenizer_metadata(directory, CONFIG)
    assert metadata["tokenizer.ggml.pre"] == pre
    before = Tokenizer.from_file(str(directory / "tokenizer.json"))
    after = Tokenizer.from_str(json.dumps(tokenizer_json(metadata, "here")))
    for text in PLAIN + NUMERIC + random_strings(300):
        assert after.encode(text).ids == before.encode(text).ids, repr(text)


def test_llama_3_takes_three_digits_and_whole_words(directory: Path) -> None:
    document = _change(directory, pre_tokenizer=PRE_TOKENIZERS["llama-bpe"], model__ignore_merges=True)
    document["model"]["vocab"]["Ġzyzzyva"] = 512  # a word that no merges lead to
    (directory / "tokenizer.json").write_text(json.dumps(document))
    metadata = tokenizer_metadata(directory, CONFIG | {"vocab_size": 513})
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(metadata, "here")))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("in 12345 Don't")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "123", "45", "ĠDon", "'t"]
    assert tokenizer.encode(" zyzzyva", add_special_tokens=False).ids == [512]


def test_a_file_of_llama_3_that_says_nothing_about_begin_of_text_means_it(directory: Path) -> None:
    metadata = tokenizer_metadata(directory, CONFIG)
    for pre, expected in (("llama-bpe", [0]), ("gpt-2", [])):
        silent = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.add_bos_token"}
        tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(silent | {"tokenizer.ggml.pre": pre}, "here")))
        assert tokenizer.encode("").ids == expected


def test_tokens_types_merges_and_roles(directory: Path) -> None:
    document = json.loads((directory / "tokenizer.json").read_text())
    document["added_tokens"].append(
        {"id": 512, "content": "<tool>", "special": False, "lstrip": False, "rstrip": False, "single_word": False}
    )
    (directory / "tokenizer.json").write_text(json.dumps(document))
    metadata = tokenizer_metadata(directory, CONFIG | {"vocab_size": 515})
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert (len(tokens), len(types)) == (515, 515)
    assert (tokens[0], types[0]) == ("<|im_start|>", 3)
    assert (types[100], types[512]) == (1, 4)
    assert (tokens[513:], types[513:]) == (["[PAD513]", "[PAD514]"], [5, 5])
    pairs = [" ".join(pair) for pair in document["model"]["merges"]]
    assert metadata["tokenizer.ggml.merges"] == pairs
    assert special_token_ids(metadata, "here") == {"bos": 0, "eos": 1, "pad": 2}
    assert metadata["tokenizer.chat_template"] == (directory / "chat_template.jinja").read_text()


def test_merges_of_older_files_are_strings(directory: Path) -> None:
    expected = tokenizer_metadata(directory, CONFIG)
    document = json.loads((directory / "tokenizer.json").read_text())
    _change(directory, model__merges=[" ".join(pair) for pair in document["model"]["merges"]])
    assert tokenizer_metadata(directory, CONFIG) == expected


def test_special_tokens_are_those_tokenizer_config_names_and_else_config(directory: Path) -> None:
    _change(directory, "tokenizer_config.json", eos_token={"content": "<|pad|>"}, bos_token=None, pad_token="<unheard>")
    metadata = tokenizer_metadata(directory, CONFIG | {"eos_token_id": [1, 2], "pad_token_id": [5, 6]})
    assert special_token_ids(metadata, "here") == {"bos": 0, "eos": 2, "pad": 5}
    assert "unk" not in special_token_ids(metadata, "here")


def test_begin_of_text_is_added_where_the_tokenizer_adds_it(directory: Path) -> None:
    assert tokenizer_metadata(directory, CONFIG)["tokenizer.ggml.add_bos_token"] is False
    _change(directory, post_processor=_begin_of_text("<|im_start|>"))
    metadata = tokenizer_metadata(directory, CONFIG)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert Tokenizer.from_str(json.dumps(tokenizer_json(metadata, "here"))).encode("dog").ids[0] == 0


def test_an_older_chat_template_is_in_tokenizer_config(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    for template in ("{{ 1 }}", [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ 1 }}"}]):
        _change(directory, "tokenizer_config.json", chat_template=template)
        assert tokenizer_metadata(directory, CONFIG)["tokenizer.chat_template"] == "{{ 1 }}"
    _change(directory, "tokenizer_config.json", chat_template=None)
    metadata = tokenizer_metadata(directory, CONFIG)
    assert "tokenizer.chat_template" not in metadata
    assert "chat_template" not in tokenizer_config(metadata, 77, "here")


def _split(pattern: str) -> dict[str, Any]:
    document = copy.deepcopy(PRE_TOKENIZERS["qwen2"])
    document["pretokenizers"][0]["pattern"]["Regex"] = pattern
    return document


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "wordpiece": ({"model__type": "WordPiece"}, "is WordPiece"),
    "sentencepiece": ({"decoder__type": "Metaspace"}, "a Metaspace decoder"),
    "byte fallback": ({"model__byte_fallback": True}, "only byte-level BPE"),
    "dropout": ({"model__dropout": 0.1}, "dropout"),
    "end of word": ({"model__end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
    "another pattern": ({"pre_tokenizer": _split(r"\p{N}{1,2}")}, "none of gpt-2, smollm, qwen2, llama-bpe"),
    "a space in front": (
        {"pre_tokenizer": PRE_TOKENIZERS["gpt-2"] | {"add_prefix_space": True}},
        "none of gpt-2",
    ),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "none of gpt-2"),
    "normalizer": ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
    "no normalizer": ({"pre_tokenizer": PRE_TOKENIZERS["qwen2"]}, "normalizer"),
    "whole words": ({"model__ignore_merges": True}, "ignore_merges True"),
    "no whole words": ({"pre_tokenizer": PRE_TOKENIZERS["llama-bpe"]}, "ignore_merges"),
    "no vocabulary": ({"model__vocab": ["a", "b"]}, "no vocabulary"),
    "no merges": ({"model__merges": None}, "no list of merges"),
    "merge of three": ({"model__merges": ["a b c"]}, "no pair"),
    "another number": (
        {"added_tokens": [{"id": 5, "content": "<else>", "special": True}]},
        "two tokens of number 5",
    ),
    "takes white space": (
        {"added_tokens": [{"id": 600, "content": "<mask>", "special": True, "lstrip": True}]},
        "'<mask>' that takes in white space",
    ),
    "too many tokens": (
        {"added_tokens": [{"id": 600, "content": "<more>", "special": True}]},
        "number 600, the embeddings have 512 rows",
    ),
    "another token in front": ({"post_processor": _begin_of_text("<|pad|>")}, "adds tokens"),
    "bert": ({"post_processor": {"type": "BertProcessing"}}, "adds tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused(directory: Path, case: str) -> None:
    changes, message = REFUSED[case]
    _change(directory, **changes)
    with pytest.raises(BadInput, match=message):
        tokenizer_metadata(directory, CONFIG)


def test_a_missing_or_broken_tokenizer_is_refused_by_name(directory: Path) -> None:
    document = _change(directory, added_tokens=[{"content": "no number"}])
    with pytest.raises(BadInput, match=r"tokenizer\.json: not laid out as the tokenizers library writes it: 'id'"):
        tokenizer_metadata(directory, CONFIG)
    (directory / "tokenizer.json").write_text(json.dumps(document | {"added_tokens": [], "post_processor": 3}))
    with pytest.raises(BadInput, match="not laid out"):
        tokenizer_metadata(directory, CONFIG)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not valid JSON"):
        tokenizer_metadata(directory, CONFIG)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        tokenizer_metadata(directory, CONFIG)
