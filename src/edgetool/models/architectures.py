"""Which models the engine understands, and how a decoder layer of them is put together.

All supported families share one layer: four groups of linears, each group reading one common input. They differ in
attention details (biases, per-head norms, sliding windows, rotary scaling), which transformers' own
classes take care of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgetool.checkpoints.consistency import layer_numbers, size_problem
from edgetool.errors import BadInput


@dataclass(frozen=True)
class Stage:
    """Linears of one layer that read the same input.

    linears: names inside the layer, in the order the checkpoint's tools expect.
    source: what AWQ may divide by the per-channel scale so that the product stays the same (arXiv 2306.00978, section
        3.2): the norm in front, or the linear whose output channels become this stage's input channels.
    """

    name: str
    linears: tuple[str, ...]
    source: str


STAGES = (
    Stage("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Stage("o", ("self_attn.o_proj",), "self_attn.v_proj"),
    Stage("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Stage("down", ("mlp.down_proj",), "mlp.up_proj"),
)

LINEARS_PER_LAYER = tuple(name for stage in STAGES for name in stage.linears)

FAMILIES: dict[str, str] = {
    "llama": "Llama (also SmolLM2 and other models of this shape)",
    "mistral": "Mistral",
    "qwen2": "Qwen2 / Qwen2.5",
    "qwen3": "Qwen3",
    "qwen2_vl": "Qwen2-VL (language part)",
    "qwen2_5_vl": "Qwen2.5-VL (language part)",
}
"""model_type in config.json -> what people call it."""

VISION_FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl"})

_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEAD_TENSORS = ("weight", "qweight", "weight_packed")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class LayerMap:
    """Where the decoder lies in a checkpoint, and its size.

    prefix: what the decoder's tensor names begin with, e.g. `model.` (then `layers.0...`, `embed_tokens.weight`).
    text_config: the part of config.json that describes the decoder.
    lm_head: tensor name of the output matrix, or None when it is tied to the embedding.
    """

    model_type: str
    prefix: str
    text_config: dict[str, Any]
    n_layers: int
    hidden_size: int
    vocab_size: int
    lm_head: str | None

    @property
    def embedding(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        return f"{self.prefix}norm.weight"

    def layer_prefix(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}."

    def linear_names(self, layer: int) -> list[str]:
        """Full names of the layer's quantisable linears, without `.weight`."""
        return [self.layer_prefix(layer) + name for name in LINEARS_PER_LAYER]

    def uncounted(self, tensor_names: Iterable[str]) -> list[int]:
        """Numbers of the layers that have tensors and that config.json does not count: loaders leave them out."""
        return sorted(number for number in layer_numbers(self.prefix, tensor_names) if number >= self.n_layers)

    def quantizable(self) -> list[str]:
        """Tensor names of the weights of all layers' quantisable linears, in order."""
        return [f"{name}.weight" for layer in range(self.n_layers) for name in self.linear_names(layer)]


def map_layers(config: dict[str, Any], tensor_names: Iterable[str]) -> LayerMap:
    """Find the decoder in a checkpoint. Raises BadInput naming an architecture that is not supported, and why."""
    model_type = str(config.get("model_type", ""))
    inner = config.get("text_config") or {}
    if not isinstance(inner, dict):
        raise BadInput(f"config.json: text_config is {inner!r}; must be an object")
    text = {**config, **inner}
    for key in _EXPERT_KEYS:
        if "moe" in model_type or (isinstance(text.get(key), int) and text[key] > 1):
            raise BadInput(
                f"mixture-of-experts models cannot be quantised yet (model_type {model_type!r}, {key} in config.json)",
                hint="supported: " + ", ".join(sorted(FAMILIES)),
            )
    if model_type not in FAMILIES:
        name = model_type or "none given"
        raise BadInput(
            f"architecture {name!r} is not supported (model_type in config.json)",
            hint="supported: " + ", ".join(sorted(FAMILIES)),
        )
    names = set(tensor_names)
    prefix = next((p for p in _TEXT_PREFIXES if f"{p}embed_tokens.weight" in names), None)
    if prefix is None:
        raise BadInput(f"no model.embed_tokens.weight in the checkpoint: not a {FAMILIES[model_type]} model")
    heads = ("lm_head", "language_model.lm_head")
    head = next((f"{h}.weight" for h in heads if any(f"{h}.{kind}" in names for kind in _HEAD_TENSORS)), None)
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    if head is None and not tied:
        raise BadInput(
            "no lm_head.weight in the checkpoint, and tie_word_embeddings is not set in config.json",
            hint='if the model shares its embedding with its output, set "tie_word_embeddings": true in config.json',
        )
    sizes = {key: _size(text, key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    promised, numbers = sizes["num_hidden_layers"], layer_numbers(prefix, names)
    absent = next((layer for layer in range(promised) if layer not in numbers), None)
    if absent is not None:
        raise BadInput(f"config.json promises {promised} layers, and there is no tensor of {prefix}layers.{absent}")
    return LayerMap(
        model_type,
        prefix,
        text,
        sizes["num_hidden_layers"],
        sizes["hidden_size"],
        sizes["vocab_size"],
        None if tied else head,
    )


def _size(text: Mapping[str, Any], key: str) -> int:
    problem = size_problem(text, key)
    if problem is not None:
        raise BadInput(problem)
    return int(text[key])
