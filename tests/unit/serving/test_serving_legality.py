"""What is refused before anything starts, with the number that would do."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace

import pytest

from edgetool.checkpoints.detect import ModuleLayout, QuantizationFound
from edgetool.errors import BadInput
from edgetool.serving.legality import Demand, Device, check

GIB = 2**30
CPU = Device(None, 16 * GIB, "a CPU")
ADA = Device(8.9, 24 * GIB, "RTX 4090")
TURING = Device(7.5, 16 * GIB, "T4")
VOLTA = Device(7.0, 16 * GIB, "V100")
VLLM = Demand("vllm")

CONFIG = {
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_size": 1536,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
KV_BYTES = 14_336 * 2  # of a token, see test_memory.py


def checkpoint(weights_bytes=GIB, **config):
    tensors = {"all": SimpleNamespace(nbytes=weights_bytes, shape=(weights_bytes // 2,))}
    return SimpleNamespace(config=CONFIG | config, tensors=MappingProxyType(tensors), directory="model")


def quantized(bits=4, group_size=128, sym=True, desc_act=False, format="gptq", down=8960, q_out=1536):
    layouts = {
        "model.layers.0.self_attn.q_proj": ModuleLayout(format, bits, q_out, 1536, group_size, not desc_act),
        "model.layers.0.self_attn.k_proj": ModuleLayout(format, bits, 256, 1536, group_size, not desc_act),
        "model.layers.0.mlp.down_proj": ModuleLayout(format, bits, 1536, down, group_size, not desc_act),
    }
    return QuantizationFound(format, bits, group_size, sym, desc_act, tuple(layouts), (), layouts)


def test_a_usual_checkpoint_is_allowed_with_the_models_own_context():
    allowed = check(checkpoint(), quantized(), VLLM, ADA)
    assert allowed.max_model_len == 32_768
    assert allowed.dtype == "bfloat16"
    assert allowed.kv_bytes_per_token == KV_BYTES
    assert allowed.warnings == ()
    assert check(checkpoint(), None, VLLM, CPU).max_model_len == 32_768


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_family_that_only_runs_with_its_own_program_is_refused_and_pointed_to_the_board(engine):
    with pytest.raises(BadInput, match="chatglm cannot be served") as caught:
        check(checkpoint(model_type="chatglm"), quantized(), Demand(engine), CPU)
    assert "serve-fpga" in str(caught.value.hint)


def test_vllm_refuses_float32_for_quantised_weights_only():
    asked = replace(VLLM, dtype="float32")
    with pytest.raises(BadInput, match=r"float16 or bfloat16, and dtype is float32"):
        check(checkpoint(), quantized(), asked, CPU)
    assert check(checkpoint(), None, asked, CPU).dtype == "float32"
    assert check(checkpoint(), quantized(), replace(asked, engine="transformers"), CPU).dtype == "float32"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_families_behind_vllm_need_the_environment_for_gpus(family):
    with pytest.raises(BadInput, match=f"{family} needs torchvision") as caught:
        check(checkpoint(model_type=family), quantized(), VLLM, CPU)
    assert caught.value.hint == "use --engine transformers"
    check(checkpoint(model_type=family), quantized(), Demand("transformers"), CPU)
    check(checkpoint(model_type=family), quantized(), VLLM, ADA)


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(BadInput, match=r"group_size 128 does not divide in_features 8992 .*down_proj") as caught:
        check(checkpoint(), quantized(down=8992), VLLM, ADA)
    assert caught.value.hint is not None
    assert "--group-size 32" in caught.value.hint
    assert "128" not in caught.value.hint


@pytest.mark.parametrize(
    ("found", "device", "reason"),
    [
        (quantized(bits=8), CPU, "8 bits"),
        (quantized(bits=3), ADA, "4 or 8 bits, not 3"),
        (quantized(desc_act=True), ADA, "desc_act"),
        (quantized(sym=False), CPU, "sym only"),
        (quantized(format="compressed-tensors", bits=8, group_size=-1), CPU, "8 bits"),
    ],
)
def test_what_no_kernel_of_the_device_can_run_is_refused_with_its_reason(found, device, reason):
    with pytest.raises(BadInput, match=reason) as caught:
        check(checkpoint(), found, VLLM, device)
    assert "--engine transformers" in str(caught.value.hint)


def test_the_fallback_engine_takes_what_vllm_does_not():
    assert check(checkpoint(), quantized(bits=3, desc_act=True), Demand("transformers"), CPU)


def test_machete_is_for_hopper_alone():
    found = quantized(format="compressed-tensors", bits=8, group_size=64, sym=False)
    assert check(checkpoint(), found, VLLM, Device(9.0, 80 * GIB, "H100")).warnings == ()
    # elsewhere only a kernel from another package is left
    assert check(checkpoint(), found, VLLM, ADA).warnings != ()


def test_a_kernel_from_another_package_is_allowed_with_a_warning():
    allowed = check(checkpoint(), quantized(format="compressed-tensors", bits=3), VLLM, ADA)
    assert any("package humming" in warning for warning in allowed.warnings)


def test_an_old_gpu_is_refused_and_an_older_one_gets_float16():
    with pytest.raises(BadInput, match=r"compute capability 7\.0"):
        check(checkpoint(), None, VLLM, VOLTA)
    allowed = check(checkpoint(), None, VLLM, TURING)
    assert allowed.dtype == "float16"
    assert any("float16" in warning for warning in allowed.warnings)
    with pytest.raises(BadInput, match=r"bfloat16 needs a GPU from 8\.0"):
        check(checkpoint(), None, replace(VLLM, dtype="bfloat16"), TURING)


def test_fp8_cache_needs_a_gpu_that_has_it():
    fp8 = replace(VLLM, kv_cache_dtype="fp8")
    assert check(checkpoint(), None, fp8, ADA).kv_bytes_per_token == KV_BYTES // 2
    for device in (CPU, Device(8.0, 40 * GIB, "A100")):
        with pytest.raises(BadInput, match=r"needs a GPU from 8\.9"):
            check(checkpoint(), None, fp8, device)


@pytest.mark.parametrize(
    ("shards", "found", "reason"),
    [
        (8, None, "12 attention heads"),
        (3, None, "2 key-value heads"),
        # 8960 / 4 = 2240 = 17.5 groups of 128
        (4, quantized(), "a share of 2240 inputs of model.layers.0.mlp.down_proj holds no whole number of groups"),
        (4, quantized(group_size=64, q_out=1544), "out_features 1544"),
    ],
)
def test_a_split_that_does_not_come_out_even_is_refused_with_those_that_do(shards, found, reason):
    with pytest.raises(BadInput, match=reason) as caught:
        check(checkpoint(), found, replace(VLLM, tensor_parallel_size=shards), ADA)
    assert str(caught.value.hint).startswith("sizes that fit: 1")


def test_a_split_that_comes_out_even_is_allowed_and_shares_the_weights():
    # 8960 / 4 = 2240 = 35 groups of 64
    allowed = check(checkpoint(), quantized(group_size=64), replace(VLLM, tensor_parallel_size=4), ADA)
    alone = check(checkpoint(), quantized(group_size=64), VLLM, ADA)
    assert allowed.needed_bytes < alone.needed_bytes


def test_a_context_longer_than_the_models_is_refused_with_its_own():
    with pytest.raises(BadInput, match="32768 tokens") as caught:
        check(checkpoint(), None, replace(VLLM, max_model_len=32_769), ADA)
    assert "--max-model-len 32768" in str(caught.value.hint)


def test_a_context_that_does_not_fit_is_refused_with_the_number_that_does_and_that_number_is_allowed():
    small = Device(8.9, 4 * GIB, "small")
    long = checkpoint(weights_bytes=2 * GIB, max_position_embeddings=131_072)
    with pytest.raises(BadInput, match=r"(\d+) tokens fit") as caught:
        check(long, None, replace(VLLM, max_model_len=131_072), small)
    fits = int(str(caught.value).rpartition(": ")[2].split()[0])
    # by hand: 4 GiB x 0.9 less 2 GiB of weights and 0.5 GiB of working memory
    by_hand = (4 * GIB * 0.9 - 2 * GIB - GIB / 2) / KV_BYTES
    assert by_hand - 48 < fits <= by_hand
    assert check(long, None, replace(VLLM, max_model_len=fits), small).max_model_len == fits
    with pytest.raises(BadInput):
        check(long, None, replace(VLLM, max_model_len=fits + 1), small)
    allowed = check(long, None, VLLM, small)
    assert allowed.max_model_len == fits
    assert any("131072" in warning for warning in allowed.warnings)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="weights"):
        check(checkpoint(weights_bytes=23 * GIB), None, VLLM, ADA)
    with pytest.raises(BadInput, match="weights"):
        check(checkpoint(), None, VLLM, Device(None, 2 * GIB, "a small CPU"))


def test_a_cpu_sets_aside_a_cache_for_a_few_long_sequences_and_no_more():
    allowed = check(checkpoint(), None, replace(VLLM, max_model_len=1024), CPU)
    assert allowed.kv_cache_bytes == 4 * 1024 * KV_BYTES


def test_an_unknown_quantisation_is_left_to_vllm_and_said():
    allowed = check(checkpoint(quantization_config={"quant_method": "fp8"}), None, VLLM, ADA)
    assert any("'fp8' is not known here" in warning for warning in allowed.warnings)


def test_the_fallback_engine_does_not_split():
    with pytest.raises(BadInput, match="one device"):
        check(checkpoint(), None, Demand("transformers", tensor_parallel_size=2), ADA)
