"""A GGUF file made into a checkpoint in Hugging Face layout with fp16 weights, a few rows at a time.

Metadata keys and tensor names: ggml-org/ggml docs/gguf.md; block formats are decoded by the `gguf` package.
Architectures: llama (which covers SmolLM2 and Mistral), qwen2, qwen3, dense models only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.gguf_tokenizer import special_token_ids, tokenizer_config, tokenizer_json
from edgetool.checkpoints.tensor_file import TensorFileWriter
from edgetool.errors import BadInput, MissingDependency
from edgetool.progress import NullProgress, Progress

IMPORT_VERSION = 1
"""Raised whenever the same GGUF would give another checkpoint; part of the cache key."""

_CHUNK_VALUES = 1 << 22
_HALF_MAX = 65504.0

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
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


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the GGUF file: `shape` in row-major order (GGUF lists it reversed), `offset` absolute in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


def import_gguf(source: Path, directory: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors (fp16) into `directory`.

    The same file gives the same bytes. Returns what the file says about itself: name, architecture, license, the number
    that fp16 cannot hold; MissingDependency without the `gguf` package. The caller maps OSError (full disk).
    that fp16 cannot hold; MissingDependency without the `gguf` package. The caller maps OSError (disk full).
    """
    progress = progress or NullProgress()
    metadata, tensors = _read(source)
    config = _model_config(metadata, tensors, str(source))
    names = _target_names(config, tensors, str(source))
    context = config["max_position_embeddings"]
    roles = special_token_ids(metadata, str(source))
    ids = {f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles}
    _write_json(directory / "config.json", config | ids)
    _write_json(directory / "generation_config.json", ids)
    _write_json(directory / "tokenizer.json", tokenizer_json(metadata, str(source)))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata, context, str(source)))
    entries = [(names[tensor.name], "F16", tensor.shape) for tensor in tensors.values()]
    with (
        progress.task("read GGUF", sum(tensor.nbytes for tensor in tensors.values()), "B") as task,
        source.open("rb") as file,
        TensorFileWriter(directory / "model.safetensors", entries) as writer,
    ):
        for tensor in tensors.values():
            writer.write(names[tensor.name], _half_rows(source, file.fileno(), tensor, _row_order(tensor, config)))
            task.advance(tensor.nbytes)
    kinds = [tensor.kind.name for tensor in tensors.values()]
    return {
        "name": metadata.get("general.name"),
        "architecture": metadata["general.architecture"],
        "license": metadata.get("general.license"),
        "gguf_types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def _read(source: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensor table of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingDependency(
            "reading GGUF files (the demo model is one) needs the package gguf", "pip install 'edgetool[demo]'"
        ) from None
    try:
        with source.open("rb") as file:
            magic, size = file.read(4), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadInput(f"{source}: cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise BadInput(f"{source}: not a GGUF file (begins with {magic!r})")
    try:
        reader = GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: _Tensor(
                tensor.name,
                tuple(int(length) for length in reversed(tensor.shape)),
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # the reader has no errors of its own: a cut or damaged file ends in one of these
        raise BadInput(f"{source}: damaged GGUF file: {error}", hint="fetch the file again") from error
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > size:
            raise BadInput(f"{source}: truncated: tensor {tensor.name!r} reaches beyond the file's {size} bytes")
    return metadata, tensors


def _model_config(metadata: Mapping[str, Any], tensors: Mapping[str, _Tensor], where: str) -> dict[str, Any]:
    """config.json without the token ids."""
    architecture = metadata.get("general.architecture")
    if architecture not in _CLASSES:
        raise BadInput(f"{where}: architecture {architecture!r} cannot be imported, only {', '.join(_CLASSES)}")
    if metadata.get(f"{architecture}.expert_count"):
        raise BadInput(f"{where}: {architecture} with experts (MoE) cannot be imported, only dense models")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise BadInput(f"{where}: rope scaling ({scaling}, or a rope_freqs tensor) cannot be imported")

    def need(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise BadInput(f"{where}: metadata {architecture}.{key} is missing")
        return metadata[f"{architecture}.{key}"]

    hidden_size, heads = need("embedding_length"), need("attention.head_count")
    if "token_embd.weight" not in tensors:
        raise BadInput(f"{where}: tensor 'token_embd.weight' is missing")
    rope_theta = _short(metadata.get(f"{architecture}.rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{architecture}.attention.key_length", hidden_size // heads),
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 4 reads the first of each pair, transformers 5 the second, and either is silent about the other
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "torch_dtype": "float16",
        "dtype": "float16",
    }
    if architecture != "qwen2":
        config["attention_bias"] = False
    if architecture == "llama":
        config["mlp_bias"] = False
    return config


def _short(value: float) -> float:
    """The shortest decimal that rounds to the stored float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _target_names(config: Mapping[str, Any], tensors: Mapping[str, _Tensor], where: str) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor; refuses what is missing, unknown or of the wrong shape."""
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
    names = dict(_TOP_NAMES)
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(_TOP_NAMES, (config["vocab_size"], hidden))
    expected["output_norm.weight"] = (hidden,)
    if config["tie_word_embeddings"]:
        del names["output.weight"], expected["output.weight"]
    for layer in range(config["num_hidden_layers"]):
        for part in _LAYER_PARTS[config["model_type"]]:
            stem, _, suffix = part.partition(".")
            names[f"blk.{layer}.{part}"] = f"model.layers.{layer}.{_LAYER_NAMES[stem]}.{suffix}"
            expected[f"blk.{layer}.{part}"] = shapes[stem][:1] if suffix == "bias" else shapes[stem]
    for name, shape in expected.items():
        if name not in tensors:
            raise BadInput(f"{where}: tensor {name!r} is missing")
        if tensors[name].shape != shape:
            raise BadInput(f"{where}: tensor {name!r} has shape {tensors[name].shape}, its metadata ask for {shape}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise BadInput(f"{where}: tensors that {config['model_type']} does not have: {', '.join(unknown[:5])}")
    return names


def _row_order(tensor: _Tensor, config: Mapping[str, Any]) -> npt.NDArray[np.intp] | None:
    """For each row to be written, the row of the GGUF tensor that holds it; None when they agree.

    llama.cpp rotates neighbouring values of a head, Hugging Face's llama classes values half a head apart, so its
    converter interleaves the two halves of every head of q and k. Other architectures are stored as they are.
    """
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", tensor.name)
    if config["model_type"] != "llama" or not match:
        return None
    heads = config["num_attention_heads"] if match[1] == "q" else config["num_key_value_heads"]
    stored = np.arange(tensor.rows).reshape(heads, config["head_dim"] // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _half_rows(
    source: Path, fd: int, tensor: _Tensor, order: npt.NDArray[np.intp] | None
) -> Iterator[npt.NDArray[np.float16]]:
    """The tensor in fp16, a block of rows at a time."""
    from gguf import dequantize

    row_bytes = tensor.nbytes // tensor.rows
    order = np.arange(tensor.rows) if order is None else order
    contiguous = bool(np.all(np.diff(order) == 1))
    step = max(_CHUNK_VALUES // max(tensor.shape[-1], 1), 1)
    for start in range(0, tensor.rows, step):
        wanted = order[start : start + step]
        if contiguous:
            raw = _pread(source, fd, tensor, start * row_bytes, wanted.size * row_bytes)
        else:
            raw = b"".join(_pread(source, fd, tensor, int(row) * row_bytes, row_bytes) for row in wanted)
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(wanted.size, row_bytes)
        try:
            values = dequantize(_as_stored(blocks, tensor.kind.name), tensor.kind)
        except (NotImplementedError, ValueError) as error:
            raise BadInput(f"{source}: tensor {tensor.name!r} of type {tensor.kind.name}: {error}") from error
        yield _to_half(values, f"{source}: tensor {tensor.name!r}")


def _pread(source: Path, fd: int, tensor: _Tensor, offset: int, count: int) -> bytes:
    data = os.pread(fd, count, tensor.offset + offset)
    if len(data) != count:
        raise BadInput(f"{source}: tensor {tensor.name!r} is cut off (the file became shorter while it was read)")
    return data


def _as_stored(blocks: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    """The plain float types are arrays of their own dtype to the gguf package, all others rows of bytes."""
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    return blocks.view(plain[kind]) if kind in plain else blocks


def _to_half(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.float16]:
    if values.size:
        largest = float(np.max(np.abs(values)))  # NaN goes through max
        if not largest <= _HALF_MAX:
            raise BadInput(f"{where}: holds {largest}, which fp16 (at most {_HALF_MAX:g}) cannot")
    return values.astype(np.float16)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
