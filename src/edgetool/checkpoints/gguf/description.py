"""What a GGUF file says about a model, from its config.json; undoes architecture.model_config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.architecture import CLASSES
from edgetool.checkpoints.gguf.writer import Value
from edgetool.errors import BadInput

_ARCHITECTURES = {**{name: name for name in CLASSES}, "mistral": "llama"}


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of config.json that matter here, complete, with `model_type` as GGUF names the architecture.

    Keys as model_config gives them, and llama3: the parameters of a scaled rotation or None. Raises BadInput for a
    model that llama.cpp would compute otherwise or not at all.
    """
    model_type = config.get("model_type")
    architecture = _ARCHITECTURES.get(str(model_type))
    if architecture is None:
        raise BadInput(f"model_type {model_type!r} has no GGUF form here, only {', '.join(_ARCHITECTURES)}")

    def need(key: str, kind: Any = int, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise BadInput(f"config.json: {key} is {value!r}; a GGUF file needs a number above 0")
        return value

    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise BadInput(f"config.json: hidden_act {act!r}; llama.cpp computes {architecture} with silu")
    hidden_size, heads = need("hidden_size"), need("num_attention_heads")
    head_dim = need("head_dim", default=hidden_size // heads)
    if head_dim % 2:
        raise BadInput(f"config.json: heads of {head_dim} values cannot be rotated; must be an even number")
    return {
        "model_type": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": need("intermediate_size"),
        "num_hidden_layers": need("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("max_position_embeddings"),
        "rms_norm_eps": float(need("rms_norm_eps", (int, float), 1e-6)),
        "vocab_size": need("vocab_size"),
        **_rope(config, architecture),
    }


def _rope(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """rope_theta, and llama3: the parameters of a scaled rotation or None.

    transformers 5 has all of it in rope_parameters, transformers 4 in rope_theta and rope_scaling.
    """
    theta, rotated, scaled = config.get("rope_theta"), config.get("partial_rotary_factor"), None
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if not isinstance(given, dict):
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "llama3" and architecture == "llama":
            scaled = gguf_rope.llama3_parameters(given)
            if scaled is None:
                raise BadInput(f"config.json: {name} of type llama3 lacks a parameter: {dict(given)}")
        elif kind != "default":
            raise BadInput(f"config.json: rope scaling {kind!r} of {architecture} has no GGUF form here")
        theta = given.get("rope_theta", theta)
        rotated = given.get("partial_rotary_factor", rotated)
    if rotated not in (None, 1, 1.0):
        raise BadInput(f"config.json: partial_rotary_factor {rotated} has no GGUF form here, only 1")
    theta = 10000.0 if theta is None else theta
    if not isinstance(theta, (int, float)) or not theta > 0:
        raise BadInput(f"config.json: rope_theta is {theta!r}; must be a number above 0")
    return {"rope_theta": float(theta), "llama3": scaled}


def metadata(model: Mapping[str, Any]) -> dict[str, Value]:
    """The general and the architecture's keys, from what `described` gives; without general.file_type."""
    architecture: str = model["model_type"]
    values: dict[str, Value] = {
        "block_count": model["num_hidden_layers"],
        "context_length": model["max_position_embeddings"],
        "embedding_length": model["hidden_size"],
        "feed_forward_length": model["intermediate_size"],
        "attention.head_count": model["num_attention_heads"],
        "attention.head_count_kv": model["num_key_value_heads"],
        "attention.key_length": model["head_dim"],
        "attention.value_length": model["head_dim"],
        "attention.layer_norm_rms_epsilon": model["rms_norm_eps"],
        "rope.freq_base": model["rope_theta"],
        "rope.dimension_count": model["head_dim"],
        "vocab_size": model["vocab_size"],
    }
    general: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.quantization_version": 2,
    }
    return general | {f"{architecture}.{key}": value for key, value in values.items()}


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Sentences about what llama.cpp does otherwise than the model's own code."""
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True)
    if isinstance(window, int) and used and window < int(config.get("max_position_embeddings", 0)):
        return [f"llama.cpp lets this architecture see the whole context: beyond {window} tokens outputs differ"]
    return []
