"""Write a checkpoint of random weights with the shape of a real 1.5B model, for measuring memory: no quality in it.

    python benchmarks/make_random_model.py OUTPUT --tokenizer DIR [--layers 28]

Qwen2's architecture as Qwen2.5-1.5B has it: hidden 1536, 28 layers, FFN 8960, 12 query and 2 key/value heads,
vocabulary 151,936, tied embeddings; bf16, in shards (3.1 GB). Weights are drawn and written shard by shard, so this
needs about one shard of memory, not the model's. The tokenizer's files are copied from DIR: any tokenizer with a
smaller vocabulary does. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def configuration(layers: int) -> Qwen2Config:
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=1536,
        num_hidden_layers=layers,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        max_window_layers=layers,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
    )


def shapes(config: Qwen2Config) -> dict[str, torch.Size]:
    """Name -> shape of every stored tensor, as transformers' own class names them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def shards(sizes: dict[str, torch.Size], limit_bytes: int) -> Iterator[list[str]]:
    """The tensors' names in runs of at most `limit_bytes` of bf16 (a larger tensor is a run of its own)."""
    run: list[str] = []
    filled = 0
    for name, shape in sizes.items():
        if run and filled + 2 * shape.numel() > limit_bytes:
            yield run
            run, filled = [], 0
        run.append(name)
        filled += 2 * shape.numel()
    yield run


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """bf16 values of a plausible size: norms about 1, biases small, matrices such that activations keep their scale."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    if name.endswith(".bias"):
        return tensor.normal_(0.0, 0.1, generator=generator)
    return tensor.normal_(0.0, 0.02 if "embed" in name else 1 / math.sqrt(shape[1]), generator=generator)


def write(output: Path, tokenizer: Path, layers: int, shard_bytes: int, seed: int) -> int:
    """Make the whole checkpoint; returns its parameters."""
    output.mkdir(parents=True)
    config = configuration(layers)
    sizes = shapes(config)
    runs = list(shards(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, names in enumerate(runs, 1):
        file_name = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        save_file({n: draw(n, sizes[n], generator) for n in names}, output / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    parameters = sum(shape.numel() for shape in sizes.values())
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config.save_pretrained(output)
    written = json.loads((output / "config.json").read_text())
    written["rope_theta"] = 1000000.0  # where transformers 4 looks for it
    (output / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, output / name)
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parameters = write(options.output, options.tokenizer, options.layers, options.shard_bytes, options.seed)
    print(f"{options.output}: {parameters:,} parameters")


if __name__ == "__main__":
    main()
