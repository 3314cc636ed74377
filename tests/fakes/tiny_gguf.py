"""GGUF files of tiny models, laid out as llama.cpp's own converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path,
    model: Path,
    *,
    pre: str = "smollm",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    stored: dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]] | None = None,
) -> Path:
    """Write the checkpoint `model` (one file, fp16 or fp32) as GGUF: matrices as `kind`, vectors as F32.

    `metadata` overrides keys (None leaves one out); `tensors` adds, replaces or (None) leaves out tensors by GGUF name;
    `stored` replaces tensors by given blocks, uint8 [rows, row_bytes].
    """
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    arch = config["model_type"]
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab] + [f"[PAD{n}]" for n in range(len(vocab), config["vocab_size"])]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    heads = config["num_attention_heads"]
    values: dict[str, Any] = {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{arch}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 5 if t.startswith("[PAD") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (model / "chat_template.jinja").read_text(),
    }
    if arch == "llama":
        values["llama.rope.dimension_count"] = config["head_dim"]
    if arch == "qwen3":
        values["qwen3.attention.key_length"] = values["qwen3.attention.value_length"] = config["head_dim"]
    values |= metadata or {}

    writer = gguf.GGUFWriter(path, values.pop("general.architecture", arch))
    for key, value in values.items():
        _add(writer, key, value)
    arrays: dict[str, np.ndarray | None] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        array = tensor.float().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else config["num_key_value_heads"]
            array = _interleave(array, count)
        arrays[_gguf_name(name)] = array
    for name, given in (arrays | (tensors or {})).items():
        if given is None:
            continue
        if stored and name in stored:
            blocks_kind, blocks = stored[name]
            writer.add_tensor(name, blocks, raw_dtype=blocks_kind)
            continue
        if given.ndim == 1:
            writer.add_tensor(name, given.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(given, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp: for each head, first half and second half alternate (naive on purpose)."""
    head_dim = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows.append(weight[head * head_dim + i])
            rows.append(weight[head * head_dim + head_dim // 2 + i])
    return np.stack(rows)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, number, part = stem.split(".", 3)
        return f"blk.{number}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
