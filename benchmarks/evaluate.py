"""Perplexity of any checkpoint, quantised or not, by one judge for all tools.

    python benchmarks/evaluate.py CHECKPOINT --text FILE [--context 512] [--tokens 8192] [--tokenizer DIR]

Every quantised layer is read through edgetool's own readers, dequantised to float32 and put into transformers' own
model class, which computes in float32. So neither a tool's kernels nor its loader nor its compute dtype take part in
the comparison: only what it wrote. The text is tokenised as one piece, cut into windows of `--context` tokens that do
not overlap, and each token but the first of its window is predicted from those before it in the window. No token is
added in front. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import detect, read_linear


def dense_weights(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """config.json without its quantisation, weights in float32 under their usual names, and the number dequantised."""
    checkpoint = Checkpoint.open(directory)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    modules = [] if found is None else list(found.modules)
    weights: dict[str, Tensor] = {}
    for module in modules:
        assert found is not None
        weights[f"{module}.weight"] = torch.from_numpy(read_linear(checkpoint, module, found).dequantize())
    prefixes = set(modules)
    for name in checkpoint.tensors:
        if name.rpartition(".")[0] not in prefixes or name.endswith(".bias"):
            weights[name] = torch.from_numpy(checkpoint.read_float32(name).copy())
    return config, weights, len(modules)


def load(directory: Path) -> tuple[torch.nn.Module, int]:
    """transformers' model with the checkpoint's weights in float32, and how many of its layers were dequantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weights, quantized = dense_weights(directory)
    model_type = config.pop("model_type")
    settings = AutoConfig.for_model(model_type, **config)
    settings.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").to(torch.float32).eval()
    result = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        raise SystemExit(f"{directory}: missing {missing[:5]}, unexpected {result.unexpected_keys[:5]}")
    model.tie_weights()
    return model, quantized


def perplexity(model: torch.nn.Module, ids: Tensor, context: int) -> tuple[float, int]:
    """exp of the mean negative log-likelihood over windows of int64 `ids` [n], and the number of predictions."""
    total = 0.0
    count = 0
    with torch.inference_mode():
        for start in range(0, len(ids) - context + 1, context):
            window = ids[start : start + context].unsqueeze(0)
            logits = model(window).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += context - 1
    return math.exp(total / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tokenizer", type=Path, help="directory; one for all, so that all see the same token ids")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    from transformers import AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.checkpoint)
    text = options.text.read_text(encoding="utf-8")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor(encoded[: options.tokens], dtype=torch.int64)
    model, quantized = load(options.checkpoint)
    start = time.monotonic()
    value, count = perplexity(model, ids, options.context)
    document = {
        "perplexity": value,
        "predicted_tokens": count,
        "context_tokens": options.context,
        "text": options.text.name,
        "dequantized_modules": quantized,
        "seconds": time.monotonic() - start,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
