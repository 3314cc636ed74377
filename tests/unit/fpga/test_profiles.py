"""What each profile takes and refuses: one clear error that names what was found and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput
from edgetool.fpga.compiler import Draft, compile_plan
from edgetool.fpga.settings import CompileSettings
from tests.fakes.packed_checkpoints import read_safetensors, write_safetensors
from tests.fakes.quantized_models import Made, Shape, make_quantized

BOARD = Shape(layers=1, hidden=256, ffn=384, heads=2, kv_heads=1, head_dim=128, vocab=64)


def plan(made: Made | Path, **settings: Any) -> Draft:
    path = made.path if isinstance(made, Made) else made
    given = {"profile": "sim", "lm_head": "rtn4", "max_context": 64} | settings
    return compile_plan(Checkpoint.open(path), CompileSettings(**given), "q")


def refused(made: Made | Path, **settings: Any) -> tuple[str, str]:
    with pytest.raises(BadInput) as error:
        plan(made, **settings)
    return error.value.message, str(error.value.hint)


def test_edgellm_takes_what_the_board_can_hold(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128)
    draft = plan(made, profile="edgellm")
    assert {matrix.layout.group for matrix in draft.matrices} == {128}


def test_edgellm_names_group_size_and_head_dim_in_one_message(tmp_path: Path) -> None:
    shape = Shape(layers=1, hidden=192, ffn=320, heads=3, kv_heads=1, head_dim=64, vocab=64)
    message, hint = refused(make_quantized(tmp_path / "q", shape=shape, group_size=64), profile="edgellm")
    assert "group_size 64" in message and "head_dim 64" in message
    assert "--profile sim" in hint


@pytest.mark.parametrize(
    ("how", "message_words", "hint_words"),
    [
        ({"group_size": 64}, ["group_size 64", "must be 128"], ["--group-size 128"]),
        ({"group_size": 128, "sym": False, "format": "awq"}, ["asymmetric"], ["--requant sym"]),
        ({"group_size": 128, "bits": 8}, ["bits 8", "4-bit"], ["--bits 4"]),
        ({"group_size": 128, "desc_act": ("q",)}, ["desc_act"], ["quantize"]),
        ({"group_size": 128, "desc_act": ("down",), "sym": False}, ["desc_act", "asymmetric"], ["quantize"]),
    ],
)
def test_edgellm_refuses_with_the_remedy(
    tmp_path: Path, how: dict[str, Any], message_words: list[str], hint_words: list[str]
) -> None:
    message, hint = refused(make_quantized(tmp_path / "q", "qwen2", shape=BOARD, **how), profile="edgellm")
    for word in message_words:
        assert word in message
    for word in hint_words:
        assert word in hint


def test_edgellm_has_no_norms_of_queries_and_keys(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen3", shape=BOARD, group_size=128)
    message, hint = refused(made, profile="edgellm")
    assert "query and key norms" in message and "--profile sim" in hint
    plan(made, profile="sim")


def test_edgellm_takes_awq_whose_zeros_are_all_eight(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128, format="awq", sym=True)
    assert not any(matrix.layout.zeros for matrix in plan(made, profile="edgellm").matrices)


def test_zero_points_are_found_in_every_module_whatever_the_configuration_says(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128, format="gptq_v2")
    path = made.path / "model.safetensors"
    tensors = read_safetensors(path)
    tensors["model.layers.0.mlp.up_proj.qzeros"][1, 2] ^= 0x3  # one zero of one group
    write_safetensors(path, tensors)
    config = json.loads((made.path / "config.json").read_text())
    assert config["quantization_config"]["sym"] is True
    message, _ = refused(made, profile="edgellm")
    assert "asymmetric" in message
    layouts = {matrix.linear.name: matrix.layout.zeros for matrix in plan(made).matrices}
    assert [name for name, zeros in layouts.items() if zeros] == ["layers.0.up"]


@pytest.mark.parametrize(("requant", "profile"), [("sym", "edgellm"), ("sym", "sim")])
def test_requant_takes_what_was_refused(tmp_path: Path, requant: str, profile: str) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=64, sym=False, desc_act=("q", "down"))
    draft = plan(made, profile=profile, requant=requant, group_size=128)
    assert {(matrix.layout.group, matrix.layout.zeros) for matrix in draft.matrices} == {(128, False)}
    assert not draft.orders.columns


def test_requant_keeps_what_fits_already(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128)
    draft = plan(made, profile="edgellm", requant="sym")
    assert {type(matrix).__name__ for matrix in draft.matrices[:-1]} == {"PackedMatrix"}


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"group_size": 64}, "has group_size 32, and group_size 64 was asked for", "--group-size 64"),
        ({"bits": 3}, "bits 3 cannot be compiled", "leave --bits out"),
        ({"desc_act": True}, "has no desc_act", "leave --desc-act out"),
    ],
)
def test_what_is_given_and_different_says_how_to_get_there(
    tmp_path: Path, given: dict[str, Any], message: str, hint: str
) -> None:
    said, advice = refused(make_quantized(tmp_path / "q"), **given)
    assert message in said and hint in advice
    assert "--requant" in advice or "leave" in advice


def test_what_is_given_and_true_changes_nothing(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", desc_act=("q",))
    assert plan(made, bits=4, group_size=32, desc_act=True).hbm == plan(made).hbm
    said, advice = refused(made, desc_act=False)
    assert "has desc_act" in said and "--fold-act-order" in advice


def test_lm_head_is_never_rounded_unasked(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", shape=BOARD, group_size=128)
    message, hint = refused(made, lm_head=None)
    assert "lm_head is not quantised" in message and "--lm-head rtn4 (or fp16)" in hint
    _, hint = refused(made, lm_head=None, profile="edgellm")
    assert "fp16" not in hint
    message, hint = refused(made, lm_head="fp16", profile="edgellm")
    assert "no fp16 matrices" in message and "rtn4" in hint


def test_a_quantised_lm_head_is_stored_as_it_is(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", shape=BOARD, group_size=128, quantized_head=True)
    for lm_head in (None, "rtn4"):
        assert plan(made, lm_head=lm_head).lm_head == "checkpoint"
    message, _ = refused(made, lm_head="fp16")
    assert "lm_head is quantised already" in message


def test_a_linear_that_was_left_unquantised_is_named(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q")
    path = made.path / "model.safetensors"
    tensors = {name: a for name, a in read_safetensors(path).items() if "layers.1.mlp.up_proj" not in name}
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((320, 192), np.float16)
    write_safetensors(path, tensors)
    message, _ = refused(made)
    assert "model.layers.1.mlp.up_proj is not quantised" in message


def test_signmag_refuses_minus_eight_with_a_count_of_all(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", lowest_code=1)
    made.linears["model.layers.0.mlp.down_proj"].codes[4, 7] = 0
    made.linears["model.layers.1.self_attn.k_proj"].codes[0, :2] = 0
    from edgetool.checkpoints.formats import FORMATS, Spec

    path = made.path / "model.safetensors"
    tensors = read_safetensors(path)
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        written = FORMATS["gptq"].write(made.linears[module], Spec(4, 32, True), module)
        tensors |= {f"{module}.{suffix}": array for suffix, array in written.items()}
    write_safetensors(path, tensors)
    message, hint = refused(made, int4="signmag")
    assert "3 weights in 2 modules are -8" in message and "model.layers.0.mlp.down_proj: 1" in message
    assert "--int4 twos" in hint


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "qwen2_moe"}, "architecture 'qwen2_moe' cannot be compiled", "chatglm, llama"),
        ({"model_type": "gpt2"}, "architecture 'gpt2' cannot be compiled", "chatglm"),
        ({"hidden_act": "gelu"}, "activation 'gelu'", "None"),
        ({"num_hidden_layers": 5}, "layers.2", "None"),
        ({"intermediate_size": 352}, "config.json asks for [352, 192]", "None"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0", "None"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' cannot be compiled", "None"),
        ({"sliding_window": 32, "use_sliding_window": True}, "sliding window of 32 tokens", "--max-context 32"),
    ],
)
def test_a_model_that_is_another_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str, hint: str
) -> None:
    said, advice = refused(make_quantized(tmp_path / "q", **config))
    assert message in said and hint in advice


def test_a_window_that_is_not_used_or_wide_enough_is_none(tmp_path: Path) -> None:
    plan(make_quantized(tmp_path / "a", sliding_window=32, use_sliding_window=False))
    plan(make_quantized(tmp_path / "b", sliding_window=64))
    plan(make_quantized(tmp_path / "c", sliding_window=32, layer_types=["full_attention"] * 2))


def test_positions_beyond_the_training_are_warned_about(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", max_position_embeddings=48)
    assert any("beyond the 48 positions" in warning for warning in plan(made).warnings)
    assert plan(made, max_context=None).max_context == 48
    assert not plan(made, max_context=48).warnings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"kv_channels": None}, "kv_channels is None"),
    ],
)
def test_a_chatglm_of_another_kind_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    message, _ = refused(make_quantized(tmp_path / "q", "chatglm", **config))
    assert words in message


def test_the_first_chatglm_is_another_architecture(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama", model_type="chatglm")
    message, _ = refused(made)
    assert "only ChatGLM2 and ChatGLM3" in message
