"""config.json to a GGUF file's description of the model and back, and what has no such description."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.architecture import gguf_rows, model_config, tensor_table
from edgetool.checkpoints.gguf.description import described, metadata, remarks
from edgetool.errors import BadInput

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 500000.0,
}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Shaped:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_description_read_back_is_the_same_model(model_type: str) -> None:
    model = described(CONFIG | {"model_type": model_type})
    tensors = {name: _Shaped(shape) for name, (_, shape) in tensor_table(model, output=True).items()}
    again = model_config(metadata(model), tensors, "here")
    for key in (*CONFIG, "model_type"):
        if key not in ("model_type", "hidden_act"):
            assert again[key] == CONFIG[key], key
    assert (again["model_type"], again["tie_word_embeddings"]) == (model_type, False)
    assert described(again) == model


def test_what_a_configuration_leaves_out_is_what_transformers_takes() -> None:
    lean = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "head_dim", "rope_theta")}
    model = described(lean | {"head_dim": None, "rms_norm_eps": None})
    assert (model["num_key_value_heads"], model["head_dim"]) == (4, 16)
    assert (model["rope_theta"], model["rms_norm_eps"]) == (10000.0, 1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 7e4},
        {"rope_theta": 7e4, "rope_scaling": None},
        {"rope_theta": 7e4, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    ],
)
def test_rope_is_read_as_transformers_4_and_5_write_it(rope: dict[str, Any]) -> None:
    assert described(CONFIG | rope)["rope_theta"] == 7e4


def test_llama_3_s_scaled_rotation_is_read_as_transformers_4_and_5_write_it() -> None:
    for rope in (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ):
        model = described(CONFIG | rope)
        assert (model["llama3"], model["rope_theta"]) == (LLAMA3, 500000.0)
    assert described(CONFIG)["llama3"] is None


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"low_freq_factor": 2.0, "high_freq_factor": 8.0}])
def test_divisors_are_those_transformers_divides_by(head_dim: int, changes: dict[str, Any]) -> None:
    parameters = LLAMA3 | changes
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **parameters}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    divisors = gguf_rope.divisors(parameters, 500000.0, head_dim)
    # they compute in float32: a few units in the last of 24 bits
    np.testing.assert_allclose(divisors, plain / scaled.numpy(), rtol=2e-6)
    assert divisors.max() == parameters["factor"]
    published = "low_freq_factor" not in changes
    assert gguf_rope.parameters_of(divisors, 500000.0, head_dim) == (parameters if published else None)


def test_other_divisors_have_no_parameters() -> None:
    divisors = gguf_rope.divisors(LLAMA3, 500000.0, 64)
    assert gguf_rope.parameters_of(divisors, 10000.0, 64) is None
    assert gguf_rope.parameters_of(divisors, 500000.0, 128) is None
    divisors[20] *= 1.001
    assert gguf_rope.parameters_of(divisors, 500000.0, 64) is None
    divisors[20] = np.nan
    assert gguf_rope.parameters_of(divisors, 500000.0, 64) is None


def test_mistral_is_a_llama_and_its_window_is_remarked_on() -> None:
    mistral = CONFIG | {"model_type": "mistral", "sliding_window": 1024}
    assert metadata(described(mistral))["general.architecture"] == "llama"
    assert "beyond 1024 tokens" in remarks(mistral)[0]
    assert remarks(mistral | {"sliding_window": None}) == []
    assert remarks(mistral | {"sliding_window": 4096}) == []
    assert remarks(CONFIG | {"sliding_window": 1024, "use_sliding_window": False}) == []


REFUSED = {
    "model_type 'qwen2_vl'": {"model_type": "qwen2_vl"},
    "model_type None": {"model_type": None},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "of type llama3 lacks a parameter": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope scaling 'llama3' of qwen2": {"model_type": "qwen2", "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "rope scaling 'yarn'": {"rope_scaling": {"type": "yarn"}},
    "rope scaling 'linear'": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    "partial_rotary_factor 0.5": {"partial_rotary_factor": 0.5},
    "rope_theta is -1": {"rope_theta": -1},
    "heads of 15": {"head_dim": 15},
    "hidden_size is '64'": {"hidden_size": "64"},
    "num_hidden_layers is None": {"num_hidden_layers": None},
    "vocab_size is True": {"vocab_size": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(message: str) -> None:
    with pytest.raises(BadInput, match=message):
        described(CONFIG | REFUSED[message])


def test_rows_of_q_and_k_are_interleaved_in_every_head_of_a_llama() -> None:
    model = described(CONFIG | {"head_dim": 4})
    # first half of a head at even rows, second half at odd ones
    q = gguf_rows("model.layers.1.self_attn.q_proj", model)
    assert q is not None
    assert q.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]
    k = gguf_rows("model.layers.0.self_attn.k_proj.weight", model)
    assert k is not None
    assert k.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "lm_head.weight"):
        assert gguf_rows(name, model) is None
    assert gguf_rows("model.layers.0.self_attn.q_proj", model | {"model_type": "qwen2"}) is None
