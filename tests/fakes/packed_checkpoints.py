"""Small quantised checkpoints without torch: plain integers put into words by the scalar oracle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity import scalar_layouts as oracle

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_FORMATS = {
    "autoawq-0.2.9-gemm": "awq",
    "autoround-0.16-awq": "awq",
    "gptqmodel-7.6.0-awq": "awq",
    "autoround-0.16-gptq": "gptq",
    "gptqmodel-7.6.0-gptq": "gptq",
    "llmcompressor-0.14-awq-asym": "compressed-tensors",
    "llmcompressor-0.14-gptq-sym": "compressed-tensors",
}
"""Tensors that other tools wrote (tests/golden) -> their format."""
PACKED = ("gptq", "gptq_v2", "awq", "compressed-tensors")
"""The formats that hold codes in words."""
VOCAB = 48
DTYPES = {"float16": "F16", "float32": "F32", "uint16": "BF16", "int32": "I32", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Layer:
    """A linear as plain integers: codes and zeros uint8 [out, in] and [out, groups], scales as stored, g_idx [in]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray
    bits: int

    @property
    def sym(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def group_size(self) -> int:
        return int(np.bincount(self.g_idx).max())

    @property
    def act_order(self) -> bool:
        return not np.array_equal(self.g_idx, np.arange(self.codes.shape[1]) // self.group_size)

    def tensors(self, kind: str, sym: bool | None = None) -> dict[str, np.ndarray]:
        """Suffix -> array as format `kind` stores it."""
        codes, zeros = self.codes.tolist(), self.zeros.tolist()
        if kind == "awq":
            return oracle.awq_tensors(codes, zeros, self.scales)
        if kind == "compressed-tensors":
            g_idx = self.g_idx.tolist() if self.act_order else None
            sym = self.sym if sym is None else sym
            return oracle.compressed_tensors(codes, zeros, self.scales, g_idx, self.bits, sym)
        version = 2 if kind == "gptq_v2" else 1
        return oracle.gptq_tensors(codes, zeros, self.scales, self.g_idx.tolist(), self.bits, version)

    def weight(self) -> np.ndarray:
        """float32 [out, in] by the definition."""
        scales = self.scales
        wide = (scales.astype(np.uint32) << 16).view(np.float32) if scales.dtype == np.uint16 else np.float32(scales)
        steps = self.codes.astype(np.int64) - self.zeros.astype(np.int64)[:, self.g_idx]
        return wide[:, self.g_idx] * steps.astype(np.float32)


def random_layer(
    seed: int,
    out_features: int,
    in_features: int,
    bits: int = 4,
    group_size: int = 32,
    *,
    sym: bool = False,
    act_order: bool = False,
    lowest_zero: int = 1,
) -> Layer:
    """group_size -1: one group. Codes scatter around their zero, as those of trained weights do."""
    rng = np.random.default_rng(seed)
    size = in_features if group_size == -1 else group_size
    g_idx = np.arange(in_features) // size
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    zeros = rng.integers(lowest_zero, top + 1, (out_features, g_idx[-1] + 1)).astype(np.uint8)
    if not sym:
        near = np.clip(middle + np.rint(rng.normal(0, 1, zeros.shape)), max(lowest_zero, 1), top).astype(np.uint8)
        zeros = np.where(rng.random(zeros.shape) < 0.8, near, zeros)
        zeros[0, 0] = top if middle != top else middle - 1  # certainly asymmetric
    else:
        zeros[:] = middle
    if act_order:
        g_idx = rng.permutation(g_idx)
    drawn = zeros[:, g_idx] + np.rint(rng.normal(0, (1 << bits) / 6, (out_features, in_features)))
    codes = np.clip(drawn, 0, top).astype(np.uint8)
    codes[0, :2] = 0, top
    scales = (rng.normal(0, 0.02, zeros.shape)).astype(np.float16)
    scales[scales == 0] = np.float16(0.01)
    return Layer(codes, zeros, scales, g_idx.astype(np.int32), bits)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any] | None = None) -> None:
    """By hand. uint16 arrays are BF16. header: entries that replace or join the true ones."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        entries[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries | dict(header or {})).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By hand: name -> array, BF16 as uint16."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    dtypes = {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1"}
    arrays = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[start + begin : start + end], dtypes[entry["dtype"]])
            arrays[name] = data.reshape(entry["shape"]).copy()
    return arrays


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of all safetensors files in `directory`."""
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found = read_safetensors(path)
        assert not arrays.keys() & found.keys()
        arrays |= found
    return arrays


HEADS = 4
SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": '{"chat_template": "a template"}',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": 2}',
    "LICENSE": "as you like",
}


def linear_shapes(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Module -> (out_features, in_features) of a Llama's linears, half as many key heads as heads."""
    shapes: dict[str, tuple[int, int]] = {}
    for number in range(layers):
        attention, mlp = f"model.layers.{number}.self_attn.", f"model.layers.{number}.mlp."
        shapes |= {attention + "q_proj": (hidden, hidden), attention + "k_proj": (hidden // 2, hidden)}
        shapes |= {attention + "v_proj": (hidden // 2, hidden), attention + "o_proj": (hidden, hidden)}
        shapes |= {mlp + "gate_proj": (inner, hidden), mlp + "up_proj": (inner, hidden)}
        shapes[mlp + "down_proj"] = (hidden, inner)
    return shapes


def random_layers(
    layers: int = 2, hidden: int = 64, inner: int = 128, seed: int = 0, **options: Any
) -> dict[str, Layer]:
    """Module -> random layer of a Llama; options as those of `random_layer`."""
    shapes = linear_shapes(layers, hidden, inner)
    return {name: random_layer(seed + k, *shape, **options) for k, (name, shape) in enumerate(shapes.items())}


def other_tensors(layers: Mapping[str, Layer], dtype: type[np.generic] = np.float16) -> dict[str, np.ndarray]:
    """Embedding, norms, a bias and an lm_head that fit `layers`; every value is exact in float16 and in bfloat16."""
    rng = np.random.default_rng(99)
    hidden = layers["model.layers.0.self_attn.q_proj"].codes.shape[1]
    tensors = {"model.embed_tokens.weight": (VOCAB, hidden), "lm_head.weight": (VOCAB, hidden)}
    shapes: dict[str, tuple[int, ...]] = {**tensors, "model.norm.weight": (hidden,)}
    for number in range(sum(name.endswith("q_proj") for name in layers)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{norm}.weight"] = (hidden,)
    shapes["model.layers.0.self_attn.q_proj.bias"] = (hidden,)
    return {name: (rng.integers(-100, 100, shape) / 128).astype(dtype) for name, shape in shapes.items()}


def config_of(layers: Mapping[str, Layer], kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a checkpoint that stores `layers` as `kind` (fp16 for one that is not quantised)."""
    hidden = layers["model.layers.0.self_attn.q_proj"].codes.shape[1]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": layers["model.layers.0.mlp.up_proj"].codes.shape[0],
        "num_hidden_layers": sum(name.endswith("q_proj") for name in layers),
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": hidden // HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if kind not in ("fp16", "bf16"):
        config["quantization_config"] = quantization_config_of(layers, kind)
    return config | changes


def quantization_config_of(layers: Mapping[str, Layer], kind: str) -> dict[str, Any]:
    """As the tools write it, in the few keys that readers need."""
    layer = next(iter(layers.values()))
    one_group = all(other.zeros.shape[1] == 1 for other in layers.values())
    group_size = -1 if one_group else layer.group_size
    sym, act_order = all(o.sym for o in layers.values()), any(o.act_order for o in layers.values())
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    if kind == "compressed-tensors":
        weights = {
            "num_bits": layer.bits,
            "type": "int",
            "symmetric": sym,
            "strategy": "channel" if one_group else "group",
            "group_size": None if one_group else group_size,
            "actorder": "group" if act_order else None,
        }
        group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
        return method | {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    common = {"quant_method": "gptq", "bits": layer.bits, "group_size": group_size, "sym": sym, "desc_act": act_order}
    return common | {"checkpoint_format": kind, "lm_head": False}


def make_checkpoint(
    directory: Path,
    layers: Mapping[str, Layer],
    kind: str,
    *,
    shards: int = 1,
    others: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint directory that stores `layers` as `kind`: gptq, gptq_v2, awq, compressed-tensors, fp16 or bf16.

    others: the tensors that are not quantised. config: changes of config.json. Returns `directory`.
    """
    directory.mkdir(parents=True)
    tensors = dict(other_tensors(layers) if others is None else others)
    sym = all(layer.sym for layer in layers.values())
    for module, layer in layers.items():
        if kind in ("fp16", "bf16"):
            weight = layer.weight()
            with np.errstate(over="ignore"):
                tensors[f"{module}.weight"] = weight.astype(np.float16) if kind == "fp16" else bfloat16(weight)
        else:
            tensors |= {f"{module}.{suffix}": array for suffix, array in layer.tensors(kind, sym).items()}
    document = config_of(layers, kind, **config)
    (directory / "config.json").write_text(json.dumps(document, indent=2))
    if kind.startswith("gptq"):
        (directory / "quantize_config.json").write_text(json.dumps(document["quantization_config"]))
    for name, text in SIDE_FILES.items():
        (directory / name).write_text(text)
    write_shards(directory, tensors, shards)
    return directory


def golden_checkpoint(directory: Path, tool: str) -> Path:
    """What `tool` (a name in tests/golden) stored, as a checkpoint directory of the modules k_proj and down_proj."""
    directory.mkdir(parents=True)
    side = json.loads((GOLDEN / f"{tool}.json").read_text())
    (directory / "config.json").write_text(json.dumps({"quantization_config": side["quantization_config"]}))
    arrays = read_safetensors(GOLDEN / f"{tool}.safetensors")
    stored = {name: array for name, array in arrays.items() if not name.startswith("expected.")}
    write_safetensors(directory / "model.safetensors", stored)
    return directory


def write_shards(directory: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    """All tensors in one file, or in several with their index."""
    names = sorted(tensors)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", {name: tensors[name] for name in names})
        return
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(directory / file_name, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest, ties to even, by arithmetic: the last of 8 significant bits of each value."""
    wide = values.astype(np.float64)
    _, exponents = np.frexp(wide)
    step = np.ldexp(1.0, np.maximum(exponents - 8, -133))
    nearest = (np.rint(wide / step) * step).astype(np.float32)
    return (nearest.view(np.uint32) >> 16).astype(np.uint16)
