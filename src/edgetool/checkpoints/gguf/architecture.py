"""What GGUF and Hugging Face each call the parts of a model, for the architectures that both have here.

Metadata keys and tensor names: ggml-org/ggml docs/gguf.md and llama.cpp's converter. Architectures: llama (which covers
SmolLM2 and Mistral), qwen2, qwen3, dense models only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.errors import BadInput

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architecture -> class of transformers; the architecture is also the model_type of config.json."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PARTS: dict[str, tuple[str, ...]] = {
    "llama": tuple(f"{name}.weight" for name in _LAYER_NAMES if not name.endswith(("q_norm", "k_norm"))),
}
_LAYER_PARTS["qwen2"] = (*_LAYER_PARTS["llama"], "attn_q.bias", "attn_k.bias", "attn_v.bias")
_LAYER_PARTS["qwen3"] = (*_LAYER_PARTS["llama"], "attn_q_norm.weight", "attn_k_norm.weight")
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj(?:\.weight)?")


class Shaped(Protocol):
    """A tensor of which only the shape counts here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def model_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Shaped],
    where: str,
    rope_divisors: npt.NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """config.json, without the token ids, of the model that a GGUF file's metadata and tensors (by name) describe.

    rope_divisors: the values of the tensor gguf_rope.TENSOR where the file has it.
    Raises BadInput, beginning with `where`, for what transformers would compute differently or not at all.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in CLASSES:
        raise BadInput(f"{where}: architecture {architecture!r} cannot be imported, only {', '.join(CLASSES)}")
    if metadata.get(f"{architecture}.expert_count"):
        raise BadInput(f"{where}: {architecture} with experts (MoE) cannot be imported, only dense models")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise BadInput(f"{where}: rope scaling ({scaling}) cannot be imported")

    def need(key: str, kind: Any = int, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise BadInput(f"{where}: metadata {architecture}.{key} is missing")
        # an array where a number belongs: models whose layers differ have one, and damaged files
        if not isinstance(value, kind) or not value > 0:
            raise BadInput(f"{where}: metadata {architecture}.{key} is {value!r}; must be one number above 0")
        return value

    hidden_size, heads = need("embedding_length"), need("attention.head_count")
    head_dim = need("attention.key_length", default=hidden_size // heads)
    if head_dim % 2:
        raise BadInput(f"{where}: heads of {head_dim} values cannot be rotated; must be an even number")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise BadInput(f"{where}: tensor 'token_embd.weight' is missing")
    rope_theta = _short(need("rope.freq_base", (int, float), 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rope_theta}
    if rope_divisors is not None:
        scaled = gguf_rope.parameters_of(rope_divisors, rope_theta, head_dim) if architecture == "llama" else None
        if scaled is None:
            raise BadInput(f"{where}: rope scaling by {gguf_rope.TENSOR} that is not Llama 3's cannot be imported")
        rope = {"rope_type": "llama3", "rope_theta": rope_theta, **scaled}
    config: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon", (int, float))),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 4 reads the first of each pair, transformers 5 the second, and either is silent about the other
        "rope_theta": rope_theta,
        "rope_parameters": rope,
        "torch_dtype": "float16",
        "dtype": "float16",
    }
    if rope_divisors is not None:
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if architecture != "qwen2":
        config["attention_bias"] = False
    if architecture == "llama":
        config["mlp_bias"] = False
    return config


def _short(value: float) -> float:
    """The shortest decimal that rounds to the stored float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def tensor_table(config: Mapping[str, Any], output: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape) of every tensor of a model, in llama.cpp's usual order of a file.

    config: as `model_config` gives it. output: whether there is an output matrix beside the embeddings.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q_norm": (config["head_dim"],),
        "attn_k_norm": (config["head_dim"],),
        "attn_q": (q_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, q_rows),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], hidden))
    }
    for layer in range(config["num_hidden_layers"]):
        for part in _LAYER_PARTS[config["model_type"]]:
            stem, _, suffix = part.partition(".")
            shape = shapes[stem][:1] if suffix == "bias" else shapes[stem]
            table[f"blk.{layer}.{part}"] = (f"model.layers.{layer}.{_LAYER_NAMES[stem]}.{suffix}", shape)
    table["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if output:
        table["output.weight"] = ("lm_head.weight", (config["vocab_size"], hidden))
    return table


def target_names(config: Mapping[str, Any], tensors: Mapping[str, Shaped], where: str) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor; refuses what is missing, unknown or of the wrong shape.

    The divisors of a scaled rotation are no tensor in Hugging Face's layout and not among them.
    """
    if config["num_hidden_layers"] > len(tensors):  # a damaged count must not make a table of its own size
        raise BadInput(f"{where}: {len(tensors)} tensors are too few for {config['num_hidden_layers']} layers")
    table = tensor_table(config, output=not config["tie_word_embeddings"])
    for name, (_, shape) in table.items():
        if name not in tensors:
            raise BadInput(f"{where}: tensor {name!r} is missing")
        if tensors[name].shape != shape:
            raise BadInput(f"{where}: tensor {name!r} has shape {tensors[name].shape}, its metadata ask for {shape}")
    if unknown := sorted(set(tensors) - set(table) - {gguf_rope.TENSOR}):
        raise BadInput(f"{where}: tensors that {config['model_type']} does not have: {', '.join(unknown[:5])}")
    return {name: theirs for name, (theirs, _) in table.items()}


def gguf_rows(name: str, config: Mapping[str, Any]) -> npt.NDArray[np.intp] | None:
    """For each row of the Hugging Face tensor or module `name` the row of the GGUF tensor; None when they agree.

    llama.cpp rotates neighbouring values of a head, Hugging Face's llama classes values half a head apart, so its
    converter interleaves the two halves of every head of q and k. Other architectures are stored as they are.
    """
    match = _ROTATED.fullmatch(name)
    if config["model_type"] != "llama" or not match:
        return None
    heads = config["num_attention_heads"] if match[1] == "q" else config["num_key_value_heads"]
    stored = np.arange(heads * config["head_dim"]).reshape(heads, config["head_dim"] // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)
