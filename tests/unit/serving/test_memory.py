"""Sizes worked out by hand from published configurations."""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace

import pytest

from edgetool.serving.memory import BLOCK_TOKENS, sizes, tokens_that_fit

# Qwen2.5-1.5B: 28 layers, 2 key-value heads of 128: 2 x 28 x 2 x 128 = 14,336 numbers a token, 28 KiB in bf16
QWEN = {
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_size": 1536,
    "max_position_embeddings": 32768,
}


def checkpoint(config, tensors=()):
    made = {name: SimpleNamespace(nbytes=nbytes, shape=shape) for name, nbytes, shape in tensors}
    return SimpleNamespace(config=config, tensors=MappingProxyType(made))


def test_cache_of_a_token_is_counted_over_layers_and_key_value_heads():
    found = sizes(checkpoint(QWEN), None)
    assert found.kv_values_per_token == 14_336
    assert (found.heads, found.kv_heads, found.context_tokens) == (12, 2, 32_768)


def test_head_dim_that_is_given_counts_more_than_the_quotient():
    assert sizes(checkpoint(QWEN | {"head_dim": 256}), None).kv_values_per_token == 2 * 14_336


def test_without_key_value_heads_every_head_has_its_own():
    config = {key: value for key, value in QWEN.items() if key != "num_key_value_heads"}
    assert sizes(checkpoint(config), None).kv_values_per_token == 6 * 14_336


def test_the_language_part_of_a_vision_model_is_taken():
    nested = {"model_type": "qwen2_vl", "hidden_size": 5, "text_config": QWEN}
    assert sizes(checkpoint(nested), None).kv_values_per_token == 14_336


def test_what_the_configuration_does_not_tell_is_none():
    found = sizes(checkpoint({"model_type": "odd"}), None)
    assert (found.kv_values_per_token, found.context_tokens) == (None, None)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 32_768),
        # Qwen2.5's own recipe for 128k: factor 4 on the original length
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"type": "linear", "factor": 2.0}, 65_536),
        # Llama 3.1 writes the stretched length already
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 32_768),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rotary_scaling_stretches_the_context_as_vllm_counts_it(rope, context, key):
    assert sizes(checkpoint(QWEN | {key: rope}), None).context_tokens == context


def test_weights_are_the_bytes_of_all_tensors_or_of_all_weights_when_dequantised():
    tensors = [("a.qweight", 512, (16, 8)), ("a.scales", 32, (2, 8)), ("a.bias", 16, (8,)), ("norm.weight", 8, (4,))]
    layout = SimpleNamespace(in_features=128, out_features=8)
    found = SimpleNamespace(modules=("a",), layouts={"a": layout})
    assert sizes(checkpoint(QWEN, tensors), found).weights_bytes == 568
    # 128 x 8 weights, 8 biases and 4 of the norm, in two bytes each
    assert sizes(checkpoint(QWEN, tensors), found, dense_bytes_per_value=2).weights_bytes == (1024 + 8 + 4) * 2


def test_tokens_fit_in_whole_blocks_of_which_one_stays_empty():
    block_bytes = BLOCK_TOKENS * 14_336 * 2
    assert tokens_that_fit(10 * block_bytes, 14_336, 2, 1) == 9 * BLOCK_TOKENS
    assert tokens_that_fit(10 * block_bytes - 1, 14_336, 2, 1) == 8 * BLOCK_TOKENS
    assert tokens_that_fit(10 * block_bytes, 14_336, 2, 2) == 19 * BLOCK_TOKENS
    assert tokens_that_fit(10 * block_bytes, 14_336, 1, 1) == 19 * BLOCK_TOKENS
    assert tokens_that_fit(block_bytes, 14_336, 2, 1) == 0
    assert tokens_that_fit(-5, 14_336, 2, 1) == 0
