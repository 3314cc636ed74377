"""Whether the weights of a decoder are those its config.json promises: all layers, all linears, the right shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_DENSE = {"llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"}
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SHOWN = 5


@dataclass(frozen=True)
class ModuleShape:
    """Shape of a weight as the model computes with it: a quantised linear is [out_features, in_features]."""

    shape: tuple[int, ...]
    quantized: bool


def config_problems(config: Mapping[str, Any], weights: Mapping[str, ModuleShape]) -> list[str]:
    """One sentence for each thing in which `weights` (name -> shape) are not what `config` describes.

    Dense decoders of the Llama kind are checked weight by weight, other architectures only in what all have in common.
    """
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else dict(config)
    problems = []
    family = config.get("model_type")
    if not isinstance(family, str):
        problems.append("config.json names no model_type")
        family = ""
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in weights), None)
    if prefix is None:
        if family in _DENSE:
            problems.append("no tensor model.embed_tokens.weight")
        return problems
    problems += _rope_problems(text)
    wrong = {key: said for key in _SIZES if text.get(key) is not None and (said := size_problem(text, key))}
    problems += wrong.values()
    layers = layer_numbers(prefix, weights)
    if "num_hidden_layers" not in wrong:
        problems += _layer_problems(text, layers)
    expected = {} if wrong else _expected(text, prefix, layers, dense=family in _DENSE)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    head = next((name for name in weights if name.endswith("lm_head.weight")), None)
    if head is None and not tied:
        problems.append("no lm_head.weight, and config.json does not say that it is tied to the embedding")
    if head is not None and tied:
        problems.append(f"config.json ties the output to the embedding; the stored {head} is ignored by loaders")
    if head is not None and "lm_head.weight" in expected:
        expected[head] = expected.pop("lm_head.weight")
    else:
        expected.pop("lm_head.weight", None)
    missing = [name for name in expected if name not in weights]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    for name, shape in expected.items():
        if name in weights and weights[name].shape != shape:
            problems.append(f"{name} has shape {list(weights[name].shape)}, config.json asks for {list(shape)}")
    return problems


def _rope_problems(text: Mapping[str, Any]) -> list[str]:
    parameters = text.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    if theta is None or theta == 10000.0 or text.get("rope_theta") == theta:
        return []
    return [
        f"config.json has rope_theta {theta} in rope_parameters and {text.get('rope_theta', 'nothing')} beside it: "
        f"readers of the old key (transformers 4) compute other positions"
    ]


def size_problem(text: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with a size in config.json, None where it can be one."""
    value = text.get(key)
    if type(value) is int and value >= 1:  # `type is`, since True is an int too
        return None
    return f"config.json: {key} is {value!r}; must be a whole number, 1 or more"


def layer_numbers(prefix: str, names: Iterable[str]) -> set[int]:
    """Numbers of the layers below `prefix` that have tensors."""
    pattern = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    return {int(match[1]) for name in names if (match := pattern.match(name))}


def _layer_problems(text: Mapping[str, Any], layers: set[int]) -> list[str]:
    promised = text.get("num_hidden_layers")
    if promised is None:
        return ["config.json names no num_hidden_layers"]
    problems = []
    extra = sorted(layer for layer in layers if layer >= promised)
    if absent := promised - (len(layers) - len(extra)):
        # config.json may promise any number: no list is made of it
        first = [layer for layer in range(min(promised, len(layers) + _SHOWN)) if layer not in layers]
        problems.append(f"config.json promises {promised} layers; layers {_some(first, absent)} have no tensors")
    if extra:
        problems.append(f"config.json promises {promised} layers; there are tensors of layers {_some(extra)}")
    return problems


def _expected(text: Mapping[str, Any], prefix: str, layers: set[int], dense: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that must be there, of `layers` as far as they are promised.

    Empty when the configuration lacks a size.
    """
    try:
        hidden, vocab, promised = text["hidden_size"], text["vocab_size"], text["num_hidden_layers"]
        matrix = (vocab, hidden)
        expected: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": matrix, "lm_head.weight": matrix}
        if not dense:
            return expected
        inner, heads = text["intermediate_size"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        q_rows, kv_rows = heads * head_dim, (text.get("num_key_value_heads") or heads) * head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            "self_attn.o_proj": (hidden, q_rows),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        expected[f"{prefix}norm.weight"] = (hidden,)
        for number in sorted(layer for layer in layers if layer < promised):
            expected |= {f"{prefix}layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    except (KeyError, TypeError):
        return {}
    return expected


def _some(items: list[Any], count: int | None = None) -> str:
    """The first of `items`, and how many more there are of `count` (default: of the items)."""
    more = (len(items) if count is None else count) - _SHOWN
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown + (f" and {more} more" if more > 0 else "")
