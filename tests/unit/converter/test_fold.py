import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.config import CommonConfig, ConvertConfig
from edgetool.converter.compare import UNCHANGED, Order
from edgetool.converter.fold import FoldPlan, plan_fold, sorted_by_group
from edgetool.converter.folded import FoldedSource
from edgetool.converter.job import run_convert
from edgetool.converter.source import CheckpointSource, PlainTensor
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from tests.fakes.packed_checkpoints import quantization_config_of, random_layer, read_checkpoint, write_safetensors
from tests.fakes.tiny_models import make_tiny_model

HEAD, GROUP = 16, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Sums of a few hundred float64 products in another order: some 1e-15 of their size, and logits are about 1.
SUMMATION_ORDER = 1e-11

# transformers' norms compute in float32 whatever the model is in: a mean of 64 squares in another order differs by
# 1e-7 of itself, and logits reach 15.
SUMMATION_ORDER_IN_NORMS = 1e-5


def scattered(seed, channels):
    """A g_idx that spreads every group over all channels."""
    return np.random.default_rng(seed).permutation(np.arange(channels) // GROUP).astype(np.int32)


def inside_heads(seed, heads, shared):
    """A g_idx that sorts the channels of each head among themselves, the same way for heads that share values."""
    orders = [np.random.default_rng(seed + k).permutation(np.arange(HEAD) // GROUP) for k in range(shared)]
    groups = [orders[h * shared // heads] + h * (HEAD // GROUP) for h in range(heads)]
    return np.concatenate(groups).astype(np.int32)


@pytest.fixture
def make(tmp_path):
    def model(family, g_idx, *, plain=(), extra=None, **config):
        """A GPTQ checkpoint of random weights. g_idx: end of a name -> its groups. plain: ends of names in 16 bit."""
        original = make_tiny_model(tmp_path / "original", family, dtype="float32", **{"tied": False, **config})
        tensors = read_checkpoint(original)
        rng = np.random.default_rng(3)
        # Norms of ones and biases of zeros would hide that they were not moved.
        others = {name: (array + rng.normal(0, 0.3, array.shape)).astype(np.float32) for name, array in tensors.items()}
        layers = {}
        for number, name in enumerate(sorted(tensors)):
            module = name.removesuffix(".weight")
            if "visual" in name or not (module.endswith(LINEARS) or module in g_idx) or module.endswith(plain):
                continue
            del others[name]
            layer = random_layer(number, *tensors[name].shape, group_size=GROUP)
            groups = next((given for end, given in g_idx.items() if module.endswith(end)), layer.g_idx)
            layers[module] = replace(layer, g_idx=groups)
        for module, layer in layers.items():
            others |= {f"{module}.{suffix}": array for suffix, array in layer.tensors("gptq").items()}
        hf = json.loads((original / "config.json").read_text())
        hf["quantization_config"] = quantization_config_of(layers, "gptq")
        checkpoint = tmp_path / "gptq"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps(hf))
        write_safetensors(checkpoint / "model.safetensors", {**others, **(extra or {})})
        return CheckpointSource.open(checkpoint)

    return model


def value(tensor):
    whole = np.concatenate(list(tensor.chunks())).reshape(tensor.shape)
    return bfloat16_to_float32(whole) if tensor.dtype == "BF16" else whole


def logits(source):
    config = AutoConfig.for_model(**{k: v for k, v in source.config.items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float64)
    state = {f"{module}.weight": source.weight(module) for module in source.layouts}
    state |= {name: value(tensor) for name, tensor in source.plain.items()}
    missing, unexpected = model.load_state_dict(
        {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items()}, strict=False
    )
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    tokens = torch.arange(24).reshape(2, 12) * 7 % 500
    with torch.no_grad():
        return model.eval()(tokens).logits.numpy()


def check_folded(source, modules, *, computed=True):
    """The modules are folded; every value is where the plan says; the model computes the same."""
    plan = plan_fold(source)
    assert sorted(plan.folded) == sorted(modules)
    folded = FoldedSource(source, plan)
    for module in source.layouts:
        order = plan.order.get(module, UNCHANGED)
        expected = source.weight(module)
        expected = expected if order.rows is None else expected[order.rows]
        expected = expected if order.columns is None else expected[:, order.columns]
        assert np.array_equal(folded.weight(module), expected)
        assert np.array_equal(folded.rest(module).zeros, folded.linear(module).zeros)
        assert folded.layouts[module].g_idx_trivial == (folded.linear(module).g_idx is None)
        folded.linear(module).validate(module)
    assert all(folded.linear(module).g_idx is None for module in plan.folded)
    if computed:
        before, after = logits(source), logits(folded)
        assert np.abs(before).max() > 0.1
        residual = "model.norm.weight" in plan.order
        assert np.abs(before - after).max() <= (SUMMATION_ORDER_IN_NORMS if residual else SUMMATION_ORDER)
    return folded


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {"mlp_bias": True, "attention_bias": True}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"tied": True})],
)
def test_down_proj_is_always_folded_and_the_model_computes_the_same(make, family, config):
    source = make(
        family, {"layers.0.mlp.down_proj": scattered(1, 128), "layers.1.mlp.down_proj": scattered(2, 128)}, **config
    )
    assert source.spec.desc_act
    folded = check_folded(source, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])
    assert not folded.spec.desc_act and not folded.plan.not_folded
    for layer in range(2):
        order = folded.plan.order
        perm = sorted_by_group(scattered(1 + layer, 128))
        for maker in ("gate_proj", "up_proj"):
            assert np.array_equal(order[f"model.layers.{layer}.mlp.{maker}"].rows, perm)
        assert np.array_equal(order[f"model.layers.{layer}.mlp.down_proj"].columns, perm)
    assert ("model.layers.0.mlp.gate_proj.bias" in folded.plan.order) == ("mlp_bias" in config)


def test_gate_and_up_in_16_bit_are_moved_too(make):
    source = make("qwen2", {"layers.1.mlp.down_proj": scattered(1, 128)}, plain=("gate_proj", "up_proj"))
    folded = check_folded(source, ["model.layers.1.mlp.down_proj"])
    assert "model.layers.1.mlp.up_proj.weight" in folded.plan.order
    assert "model.layers.0.mlp.up_proj.weight" not in folded.plan.order


def test_o_proj_is_folded_where_its_order_stays_inside_heads_that_share_values(make):
    source = make("qwen2", {"self_attn.o_proj": inside_heads(5, heads=4, shared=2)})
    folded = check_folded(source, ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"])
    assert "model.layers.0.self_attn.v_proj.bias" in folded.plan.order


def test_heads_without_sharing_may_each_have_their_own_order(make):
    source = make("llama", {"layers.0.self_attn.o_proj": inside_heads(6, 4, 4)}, num_key_value_heads=4)
    check_folded(source, ["model.layers.0.self_attn.o_proj"])


def test_o_proj_across_heads_or_with_two_orders_for_one_value_head_stays(make):
    orders = {"layers.0.self_attn.o_proj": scattered(1, 64), "layers.1.self_attn.o_proj": inside_heads(6, 4, 4)}
    folded = check_folded(make("llama", orders), [])
    reasons = folded.plan.not_folded
    assert "reach across attention heads (of 16 channels)" in reasons["model.layers.0.self_attn.o_proj"]
    assert "2 query heads that share a value head want different" in reasons["model.layers.1.self_attn.o_proj"]
    assert folded.spec.desc_act and not folded.plan.order


READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize("config", [{}, {"tied": True}, {"mlp_bias": True, "attention_bias": True}], ids=str)
def test_one_order_of_the_whole_residual_stream_is_folded_into_embedding_norms_and_writers(make, config):
    source = make("llama", dict.fromkeys(READERS, scattered(7, 64)), **config)
    folded = check_folded(source, [module for module in source.layouts if module.endswith(READERS)])
    moved = folded.plan.order
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"} <= moved.keys()
    assert ("lm_head.weight" in moved) == ("tied" not in config)
    assert ("model.layers.1.self_attn.o_proj.bias" in moved) == ("mlp_bias" in config)
    assert "model.layers.1.self_attn.q_proj.bias" not in moved


def test_everything_at_once_with_a_quantised_head(make):
    orders = {**dict.fromkeys((*READERS, "lm_head"), scattered(7, 64)), "down_proj": scattered(8, 128)}
    source = make("qwen3", {**orders, "o_proj": inside_heads(9, 4, 2)})
    check_folded(source, list(source.layouts))


@pytest.mark.parametrize("odd", ["layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"])
def test_a_residual_stream_with_two_orders_stays_and_the_reason_names_both(make, odd):
    source = make("llama", {odd: scattered(8, 64), **dict.fromkeys(READERS, scattered(7, 64))})
    plan = plan_fold(source)
    assert not plan.folded and not plan.order
    assert len(plan.not_folded) == 10
    reason = plan.not_folded["model.layers.0.self_attn.q_proj"]
    assert "the residual stream has one order" in reason and f"model.{odd}" in reason


def test_a_linear_in_plain_order_keeps_the_residual_stream_as_it_is(make):
    source = make("llama", {"layers.1.mlp.up_proj": np.arange(64) // GROUP, **dict.fromkeys(READERS, scattered(7, 64))})
    plan = plan_fold(source)
    assert not plan.folded and "model.layers.1.mlp.up_proj" in plan.not_folded["model.layers.0.self_attn.q_proj"]


def test_what_else_may_use_the_residual_stream_forbids_moving_it(make):
    vision = {"visual.merger.mlp.2.weight": np.ones((64, 32), np.float32)}
    source = make("llama", {**dict.fromkeys(READERS, scattered(7, 64)), "down_proj": scattered(8, 128)}, extra=vision)
    folded = check_folded(source, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"], computed=False)
    assert "visual.merger.mlp.2.weight may use" in folded.plan.not_folded["model.layers.0.mlp.up_proj"]
    assert folded.spec.desc_act


@pytest.mark.parametrize(
    ("name", "module"),
    [("mlp.ffn_sub_norm.weight", "mlp.down_proj"), ("self_attn.attn_sub_norm.weight", "self_attn.o_proj")],
)
def test_a_tensor_between_the_two_linears_forbids_folding(make, name, module):
    extra = {f"model.layers.0.{name}": np.ones(128 if "mlp" in name else 64, np.float32)}
    groups = {"mlp.down_proj": scattered(1, 128), "self_attn.o_proj": inside_heads(1, 4, 2)}
    plan = plan_fold(make("llama", groups, extra=extra))
    assert list(plan.not_folded) == [f"model.layers.0.{module}"]
    assert f"model.layers.0.{name} may depend on the order" in plan.not_folded[f"model.layers.0.{module}"]


@pytest.mark.parametrize(
    ("heads", "reason"),
    [(8, "k_proj is not 2 heads of 8 rows"), (None, "does not tell how many"), ("4", "does not tell"), (0, "tell")],
)
def test_heads_that_config_and_shapes_do_not_agree_on_are_left_alone(make, heads, reason):
    source = make("llama", {"o_proj": inside_heads(1, 4, 2)})
    config = {**source.config, "num_attention_heads": heads, "num_key_value_heads": 2 if heads == 8 else None}
    plan = plan_fold(replace(source, checkpoint=replace(source.checkpoint, config=config)))
    assert not plan.folded and all(reason in text for text in plan.not_folded.values())


def test_a_q_proj_that_also_makes_a_gate_keeps_o_proj_as_it_is(make):
    source = make("llama", {"o_proj": inside_heads(1, 4, 2)})
    q = "model.layers.0.self_attn.q_proj"
    twice = replace(source.layouts[q], out_features=128)
    plan = plan_fold(replace(source, layouts={**source.layouts, q: twice}))
    assert plan.folded == ("model.layers.1.self_attn.o_proj",)
    assert "q_proj is not 4 heads of 16 rows" in plan.not_folded["model.layers.0.self_attn.o_proj"]


def test_groups_of_unequal_size_are_not_folded(make):
    source = make("llama", {"layers.0.mlp.down_proj": scattered(1, 128), "layers.1.mlp.down_proj": scattered(2, 128)})
    uneven = FoldedSource(source, FoldPlan((), {}, {}))

    def linear(module):
        layer = source.linear(module)
        if module == "model.layers.0.mlp.down_proj":
            layer.g_idx[np.flatnonzero(layer.g_idx == 3)[0]] = 4
        return layer

    uneven.rest = linear
    plan = plan_fold(uneven)
    assert plan.folded == ("model.layers.1.mlp.down_proj",)
    assert plan.not_folded == {"model.layers.0.mlp.down_proj": "its groups have 7 to 9 channels; all must have 8"}


def test_a_linear_of_unknown_place_is_not_folded(make):
    source = make("llama", {"layers.1.mlp.down_proj": scattered(2, 128)})
    moved = {name.replace("layers.1.mlp", "blocks.1.ffn"): layout for name, layout in source.layouts.items()}
    renamed = FoldedSource(replace(source, layouts=moved), FoldPlan((), {}, {}))
    renamed.rest = lambda module: source.linear(module.replace("blocks.1.ffn", "layers.1.mlp"))
    assert "does not know what makes" in plan_fold(renamed).not_folded["model.blocks.1.ffn.down_proj"]


def test_groups_that_only_have_other_numbers_need_no_partner(make):
    numbers = np.repeat(np.random.default_rng(1).permutation(8), GROUP).astype(np.int32)
    folded = check_folded(
        make("llama", {"layers.0.self_attn.q_proj": numbers, "layers.0.self_attn.o_proj": numbers}),
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"],
    )
    assert not folded.plan.order


def test_channels_of_a_group_keep_their_order_and_groups_follow_their_first_channel():
    assert sorted_by_group(np.array([2, 0, 2, 1, 0, 1])).tolist() == [0, 2, 1, 4, 3, 5]


@pytest.mark.parametrize("wrong", ["up_proj stays", "inverse", "scales stay"])
def test_a_wrong_permutation_is_caught(make, wrong):
    source = make("llama", {"layers.0.mlp.down_proj": scattered(1, 128)})
    plan = plan_fold(source)
    order = dict(plan.order)
    down, up = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
    if wrong == "up_proj stays":
        del order[up]
    elif wrong == "inverse":
        order[up] = Order(rows=np.argsort(order[up].rows))
    folded = FoldedSource(source, replace(plan, order=order))
    if wrong == "scales stay":
        real = folded.linear

        def linear(module):
            moved = real(module)
            return replace(moved, scales=source.linear(module).scales) if module == down else moved

        folded.linear = linear
    assert np.abs(logits(source) - logits(folded)).max() > 1e-3


def test_a_folded_layer_fits_awq_and_the_original_does_not(make):
    source = make("llama", {"layers.0.mlp.down_proj": scattered(1, 128)})
    folded = FoldedSource(source, plan_fold(source))
    name, spec = "model.layers.0.mlp.down_proj", Spec(4, GROUP, False)
    assert "AWQ has no g_idx" in FORMATS["awq"].refusal(source.linear(name), spec)
    again = FORMATS["awq"].read(FORMATS["awq"].write(folded.linear(name), spec), spec)
    assert np.array_equal(again.dequantize(), folded.weight(name))


def test_a_conversion_that_folding_does_not_make_possible_says_why(make, tmp_path):
    orders = {"layers.0.self_attn.o_proj": scattered(1, 64), "layers.1.mlp.down_proj": scattered(2, 128)}
    source = make("llama", orders).checkpoint.directory
    config = ConvertConfig(source=str(source), output=tmp_path / "out", to="awq", fold_act_order=True)
    with pytest.raises(BadInput, match="o_proj has no lossless form in awq") as error:
        run_convert(config, CommonConfig(), NullProgress())
    assert "o_proj cannot be folded: its groups reach across attention heads" in error.value.hint
    assert error.value.details["folded"] == ["model.layers.1.mlp.down_proj"]
    assert [entry["module"] for entry in error.value.details["refused"]] == ["model.layers.0.self_attn.o_proj"]
    assert not (tmp_path / "out").exists()


def test_columns_move_right_whatever_the_pieces_a_tensor_comes_in(make):
    empty = make("llama", {})
    array = np.arange(60, dtype=np.float32).reshape(12, 5)
    perm = np.array([3, 0, 4, 1, 2])
    for cuts in ([], [7], [3, 4, 23, 59], list(range(1, 60))):
        pieces = np.split(array.reshape(-1), cuts)

        tensor = PlainTensor("t", "F32", array.shape, lambda pieces=pieces: iter(pieces))
        source = replace(empty, plain={"t": tensor})
        moved = FoldedSource(source, FoldPlan((), {}, {"t": Order(columns=perm)})).plain["t"]
        assert np.array_equal(value(moved), array[:, perm])
        assert np.array_equal(value(moved), array[:, perm])  # from the start at each call
        both = FoldPlan((), {}, {"t": Order(np.arange(12)[::-1], perm)})
        assert np.array_equal(value(FoldedSource(source, both).plain["t"]), array[::-1, perm])
