"""tokenizer.json, tokenizer_config.json and the special-token ids from the metadata of a GGUF file.

The JSON is written directly: its schema is that of the `tokenizers` library, which need not be installed for this.
The pre-tokenisers are those that llama.cpp's src/llama-vocab.cpp lists for each value of `tokenizer.ggml.pre`, written
with the building blocks the models' own tokenizer.json files use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetool.errors import BadInput

# values of tokenizer.ggml.token_type (ggml-org/ggml docs/gguf.md)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # up to three digits instead of one
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    # every digit alone, whatever stands before it: "a  1" is a, two spaces, 1; ByteLevel alone cuts between the spaces
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "qwen2": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
}
"""Value of tokenizer.ggml.pre -> content of `pre_tokenizer` in tokenizer.json."""

NORMALIZERS: dict[str, dict[str, Any]] = {"qwen2": {"type": "NFC"}}
"""Value of tokenizer.ggml.pre -> content of `normalizer`; null for the others."""

WHOLE_WORDS = {"llama-bpe"}
"""Values of tokenizer.ggml.pre with which a word that is a token is taken whole (ignore_merges)."""

_BOS_BY_DEFAULT = {"llama-bpe"}  # where llama.cpp adds a begin-of-text token unless the file says no


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Content of tokenizer.json: a byte-level BPE with the file's tokens, merges and control tokens.

    `metadata` maps GGUF keys to values. Raises BadInput, beginning with `where`, for a tokenizer that is not byte-level
    BPE, a pre-tokeniser not known here, or lists that do not fit together.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise BadInput(f"{where}: tokenizer of kind {kind!r} cannot be converted, only byte-level BPE ('gpt2')")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise BadInput(f"{where}: pre-tokenizer {pre!r} is not known; known are {', '.join(PRE_TOKENIZERS)}")
    tokens, merges = _list(metadata, "tokens", str), _list(metadata, "merges", str)
    types = _list(metadata, "token_type", int) or [NORMAL] * len(tokens)
    if not tokens or not merges or len(types) != len(tokens):
        raise BadInput(f"{where}: {len(tokens)} tokens, {len(types)} token types, {len(merges)} merges: do not fit")
    vocab = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise BadInput(f"{where}: merge {merge!r} names a token that is not in the vocabulary")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == CONTROL,
            }
            for number, kind in enumerate(types)
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": _post_processor(metadata, tokens, where),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """An array of the tokenizer's; empty where it is missing or of something else."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if isinstance(value, list) and all(isinstance(item, kind) for item in value) else []


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    """Puts the begin-of-text token before the text where the file asks for it."""
    if not metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT):
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    number = special_token_ids(metadata, where).get("bos")
    if number is None:
        raise BadInput(f"{where}: asks for a begin-of-text token and does not name one")
    bos = tokens[number]
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def special_token_ids(metadata: Mapping[str, Any], where: str) -> dict[str, int]:
    """Ids of bos, eos, pad and unk, as far as the file names them. Raises BadInput for one outside the vocabulary."""
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    size = len(_list(metadata, "tokens", str))
    found = {}
    for role, key in keys.items():
        number = metadata.get(f"tokenizer.ggml.{key}")
        if number is not None:
            if not isinstance(number, int) or not 0 <= number < size:
                raise BadInput(f"{where}: tokenizer.ggml.{key} is {number}, the vocabulary has {size} tokens")
            found[role] = int(number)
    return found


def tokenizer_config(metadata: Mapping[str, Any], max_length: int, where: str) -> dict[str, Any]:
    """Content of tokenizer_config.json, chat template included, with a class that transformers 4 and 5 both know."""
    tokens = metadata["tokenizer.ggml.tokens"]
    document: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for role, number in special_token_ids(metadata, where).items():
        document[f"{role}_token"] = tokens[number]
    if template := metadata.get("tokenizer.chat_template"):
        document["chat_template"] = template
    return document
