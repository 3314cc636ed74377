"""Small random quantised checkpoints of every family that can be compiled, without torch: seconds become milliseconds.

Tensor names and configurations are those of the published models; ChatGLM's projections are fused as there. Codes,
scales and zeros are drawn, packed by edgetool's own formats (which have their own oracles), and kept for comparison.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import FORMATS, Spec
from tests.fakes.packed_checkpoints import write_safetensors

VISION = ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the default is tiny and awkward: K of 192 is no multiple of 128, the vocabulary none of 32."""

    layers: int = 2
    hidden: int = 192
    ffn: int = 320
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 248


@dataclass(frozen=True)
class Made:
    """A checkpoint, and what is in it: module -> linear as drawn, tensor name -> plain array."""

    path: Path
    linears: Mapping[str, QuantizedLinear]
    plain: Mapping[str, np.ndarray]
    shape: Shape
    family: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def weight(self, module: str) -> np.ndarray:
        """float32 [out, in] by the definition."""
        if module not in self.linears:
            return self.plain[f"{module}.weight"].astype(np.float32)
        linear = self.linears[module]
        groups = linear.g_idx if linear.g_idx is not None else np.arange(linear.in_features) // linear.group_size
        steps = linear.codes.astype(np.float32) - linear.zeros.astype(np.float32)[:, groups]
        return linear.scales.astype(np.float32)[:, groups] * steps


def make_quantized(
    directory: Path,
    family: str = "llama",
    *,
    shape: Shape | None = None,
    format: str = "gptq",
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: tuple[str, ...] = (),
    same_order: bool = True,
    biases: tuple[str, ...] | None = None,
    tied: bool = False,
    quantized_head: bool = False,
    scale_dtype: str = "F16",
    plain_dtype: str = "F16",
    lowest_code: int = 0,
    seed: int = 0,
    **config: Any,
) -> Made:
    """Write a checkpoint of `family` (llama, mistral, qwen2, qwen3, qwen2_vl, qwen2_5_vl, chatglm) into `directory`.

    desc_act: roles (q, k, v, o, gate, up, down) in activation order; same_order: those of one stage share it.
    biases: roles with a bias (default: as the family has them). lowest_code: 1 for codes without -8.
    config: changes of config.json.
    """
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    document, modules, plain = (_chatglm if family == "chatglm" else _llama)(family, shape, tied, rng)
    if biases is None:
        biases = ("q", "k", "v") if family in ("qwen2", *VISION, "chatglm") else ()
    orders: dict[str, np.ndarray] = {}
    linears: dict[str, QuantizedLinear] = {}
    for module, (roles, rows, width) in modules.items():
        if roles == ("lm_head",) and not quantized_head:
            plain[f"{module}.weight"] = _normal(rng, (rows, width), 0.05)
            continue
        order = None
        if set(roles) & set(desc_act):
            stage = module.rpartition(".")[0] if same_order else module
            key = f"{stage}:{width}"
            trivial = np.arange(width) // group_size
            order = orders.setdefault(key, rng.permutation(trivial).astype(np.int32))
        linears[module] = _draw(rng, rows, width, bits, group_size, sym, order, scale_dtype, lowest_code)
        if set(roles) & set(biases):
            plain[f"{module}.bias"] = _normal(rng, (rows,), 0.1)
    tensors = dict(plain)
    if plain_dtype == "BF16":
        tensors = {name: float32_to_bfloat16(array) for name, array in plain.items()}
        plain = {name: bfloat16_to_float32(array) for name, array in tensors.items()}
    spec = Spec(bits, group_size, sym, bool(desc_act))
    for module, linear in linears.items():
        tensors |= {
            f"{module}.{suffix}": array for suffix, array in FORMATS[format].write(linear, spec, module).items()
        }
    ignored = [] if quantized_head else ["lm_head"]
    document["quantization_config"] = FORMATS[format].quantization_config(spec, ignored)
    document |= config
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(document))
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (directory / "README.md").write_text("not a part of a tokenizer")
    return Made(directory, linears, plain, shape, family, document)


def _draw(
    rng: np.random.Generator, rows: int, width: int, bits: int, group_size: int, sym: bool, order: np.ndarray | None,
    scale_dtype: str, lowest_code: int,
) -> QuantizedLinear:  # fmt: skip
    groups, top = -(-width // group_size), (1 << bits) - 1
    middle = 1 << (bits - 1)
    codes = np.clip(np.rint(rng.normal(middle, top / 5, (rows, width))), lowest_code, top).astype(np.uint8)
    zeros = np.full((rows, groups), middle, dtype=np.uint8)
    if not sym:
        zeros = np.clip(np.rint(rng.normal(middle, 1, zeros.shape)), 1, top).astype(np.uint8)
        zeros[0, 0] = middle - 1
    scales = (rng.normal(0, 0.02, zeros.shape)).astype(np.float16)
    linear = QuantizedLinear(codes, scales, zeros, order, bits, group_size)
    if scale_dtype == "F32":
        wide = np.abs(rng.normal(0, 0.02, zeros.shape)).astype(np.float32) + np.float32(1e-3)
        linear = replace(linear, scales=wide, scale_dtype="F32")
    return linear


def _normal(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    return rng.normal(0, width, shape).astype(np.float16)


def _llama(family: str, s: Shape, tied: bool, rng: np.random.Generator) -> tuple[dict[str, Any], dict, dict]:
    text = {
        "model_type": family,
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    prefix = "model."
    document: dict[str, Any] = dict(text)
    if family in VISION:
        prefix = "model.language_model."
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        document = {
            "model_type": family,
            "text_config": text,
            "tie_word_embeddings": tied,
            "vision_config": {"depth": 1},
        }
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    sizes = {
        "self_attn.q_proj": ("q", q, s.hidden),
        "self_attn.k_proj": ("k", kv, s.hidden),
        "self_attn.v_proj": ("v", kv, s.hidden),
        "self_attn.o_proj": ("o", s.hidden, q),
        "mlp.gate_proj": ("gate", s.ffn, s.hidden),
        "mlp.up_proj": ("up", s.ffn, s.hidden),
        "mlp.down_proj": ("down", s.hidden, s.ffn),
    }
    modules, plain = {}, {f"{prefix}embed_tokens.weight": _normal(rng, (s.vocab, s.hidden), 0.5)}
    for number in range(s.layers):
        layer = f"{prefix}layers.{number}."
        for name, (role, rows, width) in sizes.items():
            modules[layer + name] = ((role,), rows, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{layer}{name}.weight"] = 1 + _normal(rng, (s.hidden,), 0.1)
        if family == "qwen3":
            for part in "qk":
                plain[f"{layer}self_attn.{part}_norm.weight"] = 1 + _normal(rng, (s.head_dim,), 0.1)
    plain[f"{prefix}norm.weight"] = 1 + _normal(rng, (s.hidden,), 0.1)
    if not tied:
        modules["lm_head"] = (("lm_head",), s.vocab, s.hidden)
    if family in VISION:
        plain["model.visual.blocks.0.mlp.fc1.weight"] = _normal(rng, (8, 8), 0.1)
    return document, modules, plain


def _chatglm(family: str, s: Shape, tied: bool, rng: np.random.Generator) -> tuple[dict[str, Any], dict, dict]:
    document = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": s.layers,
        "hidden_size": s.hidden,
        "ffn_hidden_size": s.ffn,
        "kv_channels": s.head_dim,
        "num_attention_heads": s.heads,
        "multi_query_attention": True,
        "multi_query_group_num": s.kv_heads,
        "padded_vocab_size": s.vocab,
        "seq_length": 512,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "original_rope": True,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    prefix = "transformer."
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    modules: dict[str, Any] = {}
    plain = {
        f"{prefix}embedding.word_embeddings.weight": _normal(rng, (s.vocab, s.hidden), 0.5),
        f"{prefix}rotary_pos_emb.inv_freq": _normal(rng, (s.head_dim // 4,), 1),
        f"{prefix}encoder.final_layernorm.weight": 1 + _normal(rng, (s.hidden,), 0.1),
    }
    for number in range(s.layers):
        layer = f"{prefix}encoder.layers.{number}."
        modules[f"{layer}self_attention.query_key_value"] = (("q", "k", "v"), q + 2 * kv, s.hidden)
        modules[f"{layer}self_attention.dense"] = (("o",), s.hidden, q)
        modules[f"{layer}mlp.dense_h_to_4h"] = (("gate", "up"), 2 * s.ffn, s.hidden)
        modules[f"{layer}mlp.dense_4h_to_h"] = (("down",), s.hidden, s.ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{layer}{name}.weight"] = 1 + _normal(rng, (s.hidden,), 0.1)
    if not tied:
        modules[f"{prefix}output_layer"] = (("lm_head",), s.vocab, s.hidden)
    return document, modules, plain
