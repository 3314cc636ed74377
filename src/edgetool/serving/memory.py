"""How much context fits: bytes of weights and of the key-value cache, and the context a model was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATION_BYTES = 512 * 2**20
"""Kept free on each GPU beside weights and cache: activations of one profile run and the CUDA context."""
CPU_OVERHEAD_BYTES = {"vllm": 2500 * 2**20, "transformers": 1000 * 2**20}
"""What an engine's processes take on a CPU beside weights and cache (vLLM's three: 3.6 GB with a model of 0.3 GB)."""
BLOCK_TOKENS = 16
"""vLLM hands out the cache in blocks of this many tokens, and one block stays empty."""


@dataclass(frozen=True)
class Sizes:
    """What memory a model takes.

    weights_bytes: all tensors as stored. kv_values_per_token: numbers that the cache keeps for a token over all layers
    (2 x layers x key-value heads x head_dim), None where config.json does not tell. context_tokens: the longest
    context that the model's configuration allows, None where it does not say.
    """

    weights_bytes: int
    kv_values_per_token: int | None
    context_tokens: int | None
    kv_heads: int | None
    heads: int | None


def sizes(checkpoint: Checkpoint, found: QuantizationFound | None, dense_bytes_per_value: int | None = None) -> Sizes:
    """Sizes of a checkpoint; with `dense_bytes_per_value` as if every weight were stored dequantised at that width."""
    config = text_config(checkpoint.config)
    layers, heads = (_whole(config.get(key)) for key in ("num_hidden_layers", "num_attention_heads"))
    kv_heads = _whole(config.get("num_key_value_heads")) or heads
    hidden = _whole(config.get("hidden_size"))
    head_dim = _whole(config.get("head_dim")) or (hidden // heads if hidden and heads else None)
    values = 2 * layers * kv_heads * head_dim if layers and kv_heads and head_dim else None
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    if dense_bytes_per_value is not None:
        packed = set(found.modules) if found else set()
        plain = sum(
            math.prod(info.shape)
            for name, info in checkpoint.tensors.items()
            if name.rpartition(".")[0] not in packed or name.endswith(".bias")
        )
        linears = sum(layout.in_features * layout.out_features for layout in found.layouts.values()) if found else 0
        weights = (plain + linears) * dense_bytes_per_value
    return Sizes(weights, values, _context(config), kv_heads, heads)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model, with what stands around it filled in."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def tokens_that_fit(budget_bytes: int, values_per_token: int, bytes_per_value: float, shards: int) -> int:
    """Tokens of cache in `budget_bytes` of one device when the cache is split over `shards` devices; at least 0."""
    block_bytes = BLOCK_TOKENS * values_per_token * bytes_per_value / shards
    return max(0, int(budget_bytes // block_bytes) - 1) * BLOCK_TOKENS


def _context(config: Mapping[str, Any]) -> int | None:
    """As vLLM derives it: the trained positions, stretched where rotary scaling says so.

    For YaRN the factor counts from the original length; llama3 and longrope write the stretched length already.
    """
    limits = [
        _whole(config.get(key)) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ]
    known = [limit for limit in limits if limit]
    if not known:
        return None
    limit = min(known)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, dict) else "default"
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if isinstance(factor, int | float) and factor > 1 and kind in ("yarn", "linear", "dynamic"):
        original = _whole(rope.get("original_max_position_embeddings")) if kind == "yarn" else None
        limit = int((original or limit) * factor)
    return limit


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
