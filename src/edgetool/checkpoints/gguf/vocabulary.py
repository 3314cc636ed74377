"""GGUF's tokenizer.* metadata from the tokenizer files of a checkpoint; undoes tokenizer.py.

Keys: ggml-org/ggml docs/gguf.md. llama.cpp has the pre-tokenizers in code, by name; which of them a tokenizer.json
means is decided by its content. What would make llama.cpp cut text otherwise than the checkpoint does is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.checkpoints.checkpoint import read_json_object
from edgetool.checkpoints.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    NORMALIZERS,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
)
from edgetool.checkpoints.gguf.writer import Value
from edgetool.errors import BadInput

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_NO_EFFECT = {"trim_offsets"}  # on the tokens; it moves the offsets that are reported with them
_DEFAULTS = {"ByteLevel": {"add_prefix_space": True, "use_regex": True}, "Split": {"invert": False}}


def tokenizer_metadata(directory: Path, config: Mapping[str, Any]) -> dict[str, Value]:
    """The tokenizer.* keys of a GGUF file, from tokenizer.json, tokenizer_config.json and chat_template.jinja.

    config: content of config.json; `vocab_size` is the number of rows of the embeddings, which unused tokens fill up.
    Raises BadInput, naming the file, for a tokenizer that is not byte-level BPE with a pre-tokenizer known here.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            "a GGUF file holds its tokenizer, and there is no tokenizer.json here", "save it with transformers first"
        )
    document = read_json_object(path)
    settings_path = directory / "tokenizer_config.json"
    settings = read_json_object(settings_path) if settings_path.is_file() else {}
    try:
        metadata = _vocabulary(document, settings, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not laid out as the tokenizers library writes it: {error}") from error
    template = _chat_template(directory, settings)
    return metadata | ({"tokenizer.chat_template": template} if template else {})


def _vocabulary(
    document: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Value]:
    pre = _pre(document)
    tokens, types = _tokens(document, int(config["vocab_size"]))
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(document),
    }
    roles = _roles(settings, config, tokens)
    metadata |= {f"tokenizer.ggml.{_ROLES[role]}_token_id": number for role, number in roles.items()}
    adds_bos, adds_eos = _added(document.get("post_processor"), tokens, roles)
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos
    metadata["tokenizer.ggml.add_eos_token"] = adds_eos
    return metadata


def _pre(document: Mapping[str, Any]) -> str:
    """The name llama.cpp has for this tokenizer's way of cutting text into words."""
    model, decoder = _part(document, "model"), _part(document, "decoder")
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise _refused(
            f"is {model.get('type')} with a {decoder.get('type')} decoder; only byte-level BPE can be written"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"sets {key} to {model[key]!r}, which llama.cpp does not do")
    cut = _plain(document.get("pre_tokenizer"))
    pre = next((name for name, known in PRE_TOKENIZERS.items() if _plain(known) == cut), None)
    if pre is None:
        raise _refused(f"has a pre-tokenizer that is none of {', '.join(PRE_TOKENIZERS)}")
    if _plain(document.get("normalizer")) != NORMALIZERS.get(pre):
        raise _refused(f"has a normalizer that llama.cpp's {pre} has not: {document.get('normalizer')}")
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS):
        raise _refused(f"has ignore_merges {model.get('ignore_merges')}, llama.cpp's {pre} has {pre in WHOLE_WORDS}")
    return pre


def _plain(part: Any) -> Any:
    """A part of tokenizer.json with defaults filled in, without what does not matter, sequences of one unwrapped."""
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if key not in _NO_EFFECT}
    kept = {**_DEFAULTS.get(str(kept.get("type")), {}), **kept}
    for key in ("pretokenizers", "normalizers"):
        if isinstance(kept.get(key), list):
            kept[key] = [_plain(item) for item in kept[key]]
            if len(kept[key]) < 2:
                return kept[key][0] if kept[key] else None
    return kept


def _tokens(document: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token, `size` of them."""
    vocab = _part(document, "model").get("vocab")
    if not isinstance(vocab, dict) or not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise _refused("has no vocabulary of token to number")
    by_number = {number: (token, NORMAL) for token, number in vocab.items()}
    for added in document.get("added_tokens") or []:
        number, token = added["id"], added["content"]
        if number in by_number and by_number[number][0] != token:
            raise _refused(f"has two tokens of number {number}: {by_number[number][0]!r} and {token!r}")
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise _refused(f"has the token {token!r} that takes in white space or stands for whole words only")
        by_number[number] = (token, CONTROL if added.get("special") else USER_DEFINED)
    if max(by_number) >= size:
        raise _refused(f"has a token of number {max(by_number)}, the embeddings have {size} rows")
    every = [by_number.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [token for token, _ in every], [kind for _, kind in every]


def _merges(document: Mapping[str, Any]) -> list[str]:
    merges = _part(document, "model").get("merges")
    if not isinstance(merges, list):
        raise _refused("has no list of merges")
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if any(pair.count(" ") != 1 for pair in pairs):
        raise _refused("has a merge that is no pair of tokens without spaces")
    return pairs


def _roles(settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Numbers of the special tokens: what tokenizer_config.json names, else what config.json numbers."""
    numbers = {token: number for number, token in enumerate(tokens)}
    roles = {}
    for role in _ROLES:
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        number = config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if named in numbers:
            roles[role] = numbers[named]
        elif type(number) is int and 0 <= number < len(tokens):
            roles[role] = number
    return roles


def _added(processor: Any, tokens: list[str], roles: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts the begin-of-text token before a text, and the end-of-text token behind it."""
    if processor is None or processor.get("type") == "ByteLevel":
        return False, False
    if processor.get("type") == "Sequence":
        steps = [_added(step, tokens, roles) for step in processor.get("processors", [])]
        return any(bos for bos, _ in steps), any(eos for _, eos in steps)
    if processor.get("type") == "TemplateProcessing":
        names = [item["SpecialToken"]["id"] if "SpecialToken" in item else None for item in processor["single"]]
        bos, eos = ([tokens[roles[role]]] if role in roles else [] for role in ("bos", "eos"))
        for before, behind in ((False, False), (True, False), (False, True), (True, True)):
            if names == [*(bos if before else []), None, *(eos if behind else [])]:
                return before, behind
    raise _refused("adds tokens to a text that are not its begin-of-text and end-of-text tokens")


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def _refused(what: str) -> BadInput:
    return BadInput(f"the tokenizer has no GGUF form: tokenizer.json {what}", "--to gptq or another directory format")
