"""Tiny random checkpoints in Hugging Face layout, made by transformers: real architectures and tokenizer, 300 KB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again, 1234567890 times.",
    "def gather(rows):\n    return [row for row in rows if row is not None]\n",
    "A checkpoint is a directory of files; the weights are in one of them, or in several.",
    "Ein kleiner Text, damit auch Umlaute wie ä, ö und ü vorkommen. Une phrase en français.",
]


def make_tiny_model(
    directory: Path,
    family: str,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    tied: bool = True,
    dtype: str = "float16",
    shards: int = 1,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a random model of `family` (llama, mistral, qwen2, qwen3, qwen2_vl, qwen2_5_vl) and return `directory`.

    Head dimension 16, two query heads to a key head, intermediate size 2 x hidden, vocabulary of 512 with a byte-level
    BPE tokenizer and a chat template. `config_overrides` go to the (text) config. `shards` > 1 writes exactly that many
    files and an index. The same arguments give the same bytes.
    """
    # transformers decides the on-disk tensor names; only the cut into files is ours
    directory.mkdir(parents=True, exist_ok=True)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = _build(family, hidden_size, layers, tied, config_overrides)
    finally:
        torch.random.set_rng_state(generator_state)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="100GB")
    tiny_tokenizer().save_pretrained(directory)
    if shards > 1:
        _cut(directory, shards)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def _build(family: str, hidden_size: int, layers: int, tied: bool, overrides: dict[str, Any]) -> Any:
    import transformers as hf

    hf.utils.logging.disable_progress_bar()

    heads = hidden_size // 16
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "qwen3":
        text["head_dim"] = 16
    if family not in ("qwen2_vl", "qwen2_5_vl"):
        config_class, model_class = {
            "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
            "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
            "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
            "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
        }[family]
        return model_class(config_class(**(text | overrides)))

    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": hidden_size, "mlp_ratio": 2}
        config_class, model_class = hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration
    else:
        vision |= {
            "hidden_size": 32,
            "out_hidden_size": hidden_size,
            "intermediate_size": 64,
            "fullatt_block_indexes": [1],
        }
        config_class, model_class = hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration
    special = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    config = config_class(text_config=text | overrides, vision_config=vision, tie_word_embeddings=tied, **special)
    return model_class(config)


def tiny_tokenizer() -> Any:
    """The tokenizer of all tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|image|>", "<|video|>", "<|vision_start|>", "<|vision_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _cut(directory: Path, shards: int) -> None:
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    whole.unlink()
