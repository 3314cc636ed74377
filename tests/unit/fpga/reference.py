"""Logits of a small model from its dequantised weights, float64: transformers' classes, and ChatGLM by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fakes.quantized_models import VISION, Made


def logits(made: Made, ids: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [vocab] after the last of `ids`. weights: what replaces a module's weight (the rounded lm_head)."""
    return (_chatglm if made.family == "chatglm" else _transformers)(made, ids, weights)


def _weight(made: Made, module: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(weights.get(module, made.weight(module)), dtype=np.float64)


def _transformers(made: Made, ids: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    import transformers as hf

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    names |= dict.fromkeys(VISION, "Qwen2")
    text = dict(made.config.get("text_config", made.config)) | {"tie_word_embeddings": False}
    text = {key: value for key, value in text.items() if key not in ("quantization_config", "model_type")}
    if made.family in VISION:  # on text alone its language model is Qwen2's
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = getattr(hf, f"{names[made.family]}Config")(**text, attn_implementation="eager")
    if any("o_proj.bias" in name for name in made.plain):
        config.attention_bias = True
    if any("mlp" in name and name.endswith("bias") for name in made.plain):
        config.mlp_bias = True
    model: Any = getattr(hf, f"{names[made.family]}ForCausalLM")(config).to(torch.float64).eval()
    prefix = "model.language_model." if made.family in VISION else "model."
    state = {}
    for name in model.state_dict():
        ours = name.replace("model.", prefix, 1) if name.startswith("model.") else name
        if ours == "lm_head.weight" and "lm_head" not in made.linears and ours not in made.plain:
            ours = f"{prefix}embed_tokens.weight"  # tied
        module = ours.removesuffix(".weight")
        if name == "lm_head.weight":
            state[name] = torch.from_numpy(_weight(made, module, weights))
        elif ours in made.plain:
            state[name] = torch.from_numpy(made.plain[ours].astype(np.float64))
        elif name.endswith(".bias"):
            state[name] = torch.zeros_like(model.state_dict()[name])
        else:
            state[name] = torch.from_numpy(_weight(made, module, weights))
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].numpy()


def _chatglm(made: Made, ids: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """From `modeling_chatglm.py` of ChatGLM2 / 3: fused projections, half of each head turned in neighbouring pairs."""
    s, eps = made.shape, made.config["layernorm_epsilon"]
    plain = {name: array.astype(np.float64) for name, array in made.plain.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * plain[f"{name}.weight"]

    def linear(x: np.ndarray, module: str) -> np.ndarray:
        return x @ _weight(made, module, weights).T + plain.get(f"{module}.bias", 0.0)

    half = s.head_dim // 2
    theta = 10000.0 * made.config.get("rope_ratio", 1.0)
    angle = np.arange(len(ids))[:, None] / theta ** (np.arange(0, half, 2) / half)[None, :]

    def rotate(x: np.ndarray) -> np.ndarray:
        out = x.copy()
        for i in range(half // 2):
            c, sn = np.cos(angle[:, i])[:, None], np.sin(angle[:, i])[:, None]
            a, b = x[..., 2 * i], x[..., 2 * i + 1]
            out[..., 2 * i], out[..., 2 * i + 1] = a * c - b * sn, b * c + a * sn
        return out

    x = plain["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(s.layers):
        layer = f"transformer.encoder.layers.{number}."
        fused = linear(norm(x, f"{layer}input_layernorm"), f"{layer}self_attention.query_key_value")
        cut = np.cumsum([s.heads * s.head_dim, s.kv_heads * s.head_dim])
        q, k, v = (part.reshape(len(ids), -1, s.head_dim) for part in np.split(fused, cut, axis=1))
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(one, s.heads // s.kv_heads, axis=1) for one in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(s.head_dim)
        scores[:, np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)] = -np.inf
        probability = np.exp(scores - scores.max(axis=2, keepdims=True))
        probability /= probability.sum(axis=2, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", probability, v).reshape(len(ids), -1)
        x = x + linear(mixed, f"{layer}self_attention.dense")
        gate, up = np.split(linear(norm(x, f"{layer}post_attention_layernorm"), f"{layer}mlp.dense_h_to_4h"), 2, axis=1)
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{layer}mlp.dense_4h_to_h")
    x = norm(x, "transformer.encoder.final_layernorm")
    head = "transformer.embedding.word_embeddings" if made.config["tie_word_embeddings"] else "transformer.output_layer"
    return linear(x, head)[-1]
