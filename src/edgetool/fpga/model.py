"""A decoder as the board sees it: seven matrices a layer, norms, an embedding, an output matrix, and sizes.

Fused projections (ChatGLM's query_key_value and dense_h_to_4h) appear split: each `Linear` is a range of rows of a
module of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound
from edgetool.errors import BadInput
from edgetool.fpga.rope import Rope, glm_rope, rope_of
from edgetool.models.architectures import FAMILIES, map_layers

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer in the order in which they lie in HBM."""


@dataclass(frozen=True)
class Linear:
    """One matrix [n, k] of the image: rows start .. start + n of a module. bias: tensor name, sliced alike."""

    name: str
    role: str
    module: str
    start: int
    n: int
    k: int
    bias: str | None


@dataclass(frozen=True)
class Norm:
    """One RMS norm; `tensor` holds gamma [channels]."""

    name: str
    tensor: str
    channels: int


@dataclass(frozen=True)
class Sizes:
    """What memory and time depend on, all per model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> (n, k) of a layer's matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.ffn, self.hidden),
            "up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


@dataclass(frozen=True)
class BoardModel:
    """Everything the compiler takes from a checkpoint but the weights themselves.

    lm_head: the output matrix; its module is the embedding where the two are tied (`tied`).
    """

    family: str
    model_type: str
    sizes: Sizes
    rms_norm_eps: float
    activation: str
    rope: Rope
    layers: tuple[Mapping[str, Linear], ...]
    norms: tuple[Mapping[str, Norm], ...]
    final_norm: Norm
    embedding: str
    lm_head: Linear
    tied: bool
    qk_norm: bool
    max_position: int
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def linears(self) -> list[Linear]:
        """All matrices in the order of HBM, lm_head last."""
        return [layer[role] for layer in self.layers for role in ROLES] + [self.lm_head]

    def all_norms(self) -> list[Norm]:
        return [norm for layer in self.norms for norm in layer.values()] + [self.final_norm]

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: what is needed to run the model, without names of the checkpoint's tensors."""
        return {
            "family": self.family,
            "model_type": self.model_type,
            **asdict(self.sizes),
            "rms_norm_eps": self.rms_norm_eps,
            "activation": self.activation,
            "rope": self.rope.to_dict(),
            "qk_norm": self.qk_norm,
            "tied_embedding": self.tied,
            "max_position_embeddings": self.max_position,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
        }


def board_model(checkpoint: Checkpoint, found: QuantizationFound | None) -> BoardModel:
    """The model in `checkpoint`. Raises BadInput naming what cannot be compiled, or a tensor of the wrong shape."""
    model_type = str(checkpoint.config.get("model_type", ""))
    if model_type not in {*FAMILIES, "chatglm"}:
        raise BadInput(
            f"architecture {model_type or 'none given'!r} cannot be compiled (model_type in config.json)",
            "can be: " + ", ".join(sorted({*FAMILIES, "chatglm"})),
        )
    model = _glm(checkpoint) if model_type == "chatglm" else _llama_like(checkpoint)
    _check_shapes(model, checkpoint, found)
    return model


def _llama_like(checkpoint: Checkpoint) -> BoardModel:
    mapped = map_layers(checkpoint.config, checkpoint.tensors)
    text = mapped.text_config
    heads = _count(text, "num_attention_heads")
    head_dim = int(text.get("head_dim") or mapped.hidden_size // heads)
    sizes = Sizes(
        mapped.n_layers,
        mapped.hidden_size,
        _count(text, "intermediate_size"),
        heads,
        int(text.get("num_key_value_heads") or heads),
        head_dim,
        mapped.vocab_size,
    )
    layers, norms = [], []
    where = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {
        role: f"mlp.{role}_proj" for role in ("gate", "up", "down")
    }
    qk_norm = f"{mapped.layer_prefix(0)}self_attn.q_norm.weight" in checkpoint.tensors
    for number in range(sizes.layers):
        prefix = mapped.layer_prefix(number)
        layers.append(
            {role: _linear(checkpoint, number, role, prefix + where[role], 0, *sizes.shapes[role]) for role in ROLES}
        )
        named = {
            "input_norm": ("input_layernorm", sizes.hidden),
            "post_norm": ("post_attention_layernorm", sizes.hidden),
        }
        if qk_norm:
            named |= {f"{part}_norm": (f"self_attn.{part}_norm", head_dim) for part in "qk"}
        norms.append(_norms(number, {name: (f"{prefix}{tensor}.weight", n) for name, (tensor, n) in named.items()}))
    tied = mapped.lm_head is None
    head = mapped.embedding if mapped.lm_head is None else mapped.lm_head
    family = "qwen3" if qk_norm else mapped.model_type
    return BoardModel(
        family=family,
        model_type=mapped.model_type,
        sizes=sizes,
        rms_norm_eps=float(text.get("rms_norm_eps") or 1e-6),
        activation=_activation(text.get("hidden_act", "silu")),
        rope=rope_of(text, head_dim),
        layers=tuple(layers),
        norms=tuple(norms),
        final_norm=Norm("final_norm", mapped.final_norm, sizes.hidden),
        embedding=mapped.embedding,
        lm_head=_head(checkpoint, head.removesuffix(".weight"), sizes),
        tied=tied,
        qk_norm=qk_norm,
        max_position=int(text.get("max_position_embeddings") or 0),
        sliding_window=_sliding_window(text),
        **_special_tokens(text | checkpoint.config),
    )


def _glm(checkpoint: Checkpoint) -> BoardModel:
    """ChatGLM2 / ChatGLM3 (and GLM-4 in the same layout), from `modeling_chatglm.py` of the published models."""
    config = checkpoint.config
    prefix = "transformer."
    if f"{prefix}encoder.final_layernorm.weight" not in checkpoint.tensors:
        raise BadInput(
            "no transformer.encoder.final_layernorm.weight: only ChatGLM2 and ChatGLM3 can be compiled, not ChatGLM-6B"
        )
    unsupported = {
        "rmsnorm": (True, "layer norms with a mean"),
        "post_layer_norm": (True, "models without a final norm"),
        "apply_residual_connection_post_layernorm": (False, "residuals taken behind the norm"),
    }
    for key, (needed, what) in unsupported.items():
        if bool(config.get(key, needed)) != needed:
            raise BadInput(f"config.json: {key} is {config[key]}; {what} cannot be compiled")
    heads, head_dim = _count(config, "num_attention_heads"), _count(config, "kv_channels")
    groups = _count(config, "multi_query_group_num") if config.get("multi_query_attention", False) else heads
    vocab = int(config.get("padded_vocab_size") or config.get("vocab_size") or 0)
    sizes = Sizes(
        _count(config, "num_layers"), _count(config, "hidden_size"), _count(config, "ffn_hidden_size"),
        heads, groups, head_dim, vocab,
    )  # fmt: skip
    q, kv = heads * head_dim, groups * head_dim
    modules = {
        "q": ("self_attention.query_key_value", 0),
        "k": ("self_attention.query_key_value", q),
        "v": ("self_attention.query_key_value", q + kv),
        "o": ("self_attention.dense", 0),
        "gate": ("mlp.dense_h_to_4h", 0),
        "up": ("mlp.dense_h_to_4h", sizes.ffn),
        "down": ("mlp.dense_4h_to_h", 0),
    }
    layers, norms = [], []
    for number in range(sizes.layers):
        layer = f"{prefix}encoder.layers.{number}."
        layers.append(
            {
                role: _linear(checkpoint, number, role, layer + module, start, *sizes.shapes[role])
                for role, (module, start) in modules.items()
            }
        )
        named = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
        norms.append(
            _norms(number, {name: (f"{layer}{tensor}.weight", sizes.hidden) for name, tensor in named.items()})
        )
    embedding = f"{prefix}embedding.word_embeddings.weight"
    tied = bool(config.get("tie_word_embeddings", False))
    return BoardModel(
        family="chatglm",
        model_type="chatglm",
        sizes=sizes,
        rms_norm_eps=float(config.get("layernorm_epsilon") or 1e-5),
        activation="silu",
        rope=glm_rope(config, head_dim),
        layers=tuple(layers),
        norms=tuple(norms),
        final_norm=Norm("final_norm", f"{prefix}encoder.final_layernorm.weight", sizes.hidden),
        embedding=embedding,
        lm_head=_head(checkpoint, embedding.removesuffix(".weight") if tied else f"{prefix}output_layer", sizes),
        tied=tied,
        qk_norm=False,
        max_position=int(config.get("seq_length") or 0),
        sliding_window=None,
        **_special_tokens(config),
    )


def _linear(checkpoint: Checkpoint, layer: int, role: str, module: str, start: int, n: int, k: int) -> Linear:
    bias = f"{module}.bias"
    return Linear(f"layers.{layer}.{role}", role, module, start, n, k, bias if bias in checkpoint.tensors else None)


def _head(checkpoint: Checkpoint, module: str, sizes: Sizes) -> Linear:
    bias = f"{module}.bias"
    return Linear(
        "lm_head", "lm_head", module, 0, sizes.vocab, sizes.hidden, bias if bias in checkpoint.tensors else None
    )


def _norms(layer: int, tensors: Mapping[str, tuple[str, int]]) -> dict[str, Norm]:
    return {name: Norm(f"layers.{layer}.{name}", tensor, channels) for name, (tensor, channels) in tensors.items()}


def _activation(name: object) -> str:
    if name not in ("silu", "swish"):
        raise BadInput(f"activation {name!r} (hidden_act in config.json) cannot be compiled; the board has SiLU")
    return "silu"


def _sliding_window(text: Mapping[str, Any]) -> int | None:
    """The attention window, where some layer uses one."""
    window = text.get("sliding_window")
    kinds = text.get("layer_types")
    used = "sliding_attention" in kinds if isinstance(kinds, list) else text.get("use_sliding_window", True)
    return int(window) if isinstance(window, int) and window > 0 and used else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    bos = config.get("bos_token_id")
    return {
        "bos_token_id": bos if isinstance(bos, int) else None,
        "eos_token_ids": tuple(int(one) for one in ids if isinstance(one, int)),
    }


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"config.json: {key} is {value!r}; must be a positive whole number")
    return value


def _check_shapes(model: BoardModel, checkpoint: Checkpoint, found: QuantizationFound | None) -> None:
    """Every module and norm exists and has the shape that config.json promises."""
    layouts = found.layouts if found else {}
    rows: dict[str, int] = {}
    for linear in model.linears():
        rows[linear.module] = max(rows.get(linear.module, 0), linear.start + linear.n)
    for linear in model.linears():
        if linear.module in layouts:
            layout = layouts[linear.module]
            shape: tuple[int, ...] = (layout.out_features, layout.in_features)
        else:
            shape = _plain_shape(checkpoint, f"{linear.module}.weight")
        needed = (rows[linear.module], linear.k)
        if shape != needed:
            raise BadInput(f"{linear.module} has shape {list(shape)}; config.json asks for {list(needed)}")
        if linear.bias is not None and checkpoint.tensors[linear.bias].shape != needed[:1]:
            raise BadInput(f"{linear.bias} has shape {list(checkpoint.tensors[linear.bias].shape)}, not {[needed[0]]}")
    for norm in model.all_norms():
        shape = _plain_shape(checkpoint, norm.tensor)
        if shape != (norm.channels,):
            raise BadInput(f"{norm.tensor} has shape {list(shape)}; config.json asks for {[norm.channels]}")
    shape = _plain_shape(checkpoint, model.embedding)
    if shape != (model.sizes.vocab, model.sizes.hidden):
        wanted = [model.sizes.vocab, model.sizes.hidden]
        raise BadInput(f"{model.embedding} has shape {list(shape)}; config.json asks for {wanted}")


def _plain_shape(checkpoint: Checkpoint, tensor: str) -> tuple[int, ...]:
    if tensor not in checkpoint.tensors:
        raise BadInput(f"no tensor {tensor} in {checkpoint.directory}")
    return checkpoint.tensors[tensor].shape
