import pytest
import torch

from edgetool.models.architectures import STAGES
from edgetool.quantizers.awq import find_scale, fold, value_channel_of
from edgetool.quantizers.grid import find_grid, quantize_to_codes
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.statistics import InputStatistics
from tests.unit.models.reference import some_ids, stirred_model, transformers_model
from tests.unit.quantizers.naive_gptq import correlated_inputs, gram_of

RECIPE = Recipe(method="awq", group_size=32, scale_search="minmax")
STAGE = {stage.name: stage for stage in STAGES}


def random_scale(channels, seed):
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_folding_leaves_the_function_of_the_model_unchanged(family, options, tmp_path):
    """All stages of a layer folded by large random scales, in a real model with two query heads to a value head."""
    model = transformers_model(stirred_model(tmp_path, family, **options), torch.float64)
    ids = some_ids(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        layer = model.model.layers[1]
        tensors = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        source_of = value_channel_of(4, 2, 16)
        folded = fold(tensors, STAGE["qkv"], random_scale(64, 1))
        folded = fold(folded, STAGE["o"], random_scale(32, 2), source_of)
        folded = fold(folded, STAGE["gate_up"], random_scale(64, 3))
        folded = fold(folded, STAGE["down"], random_scale(128, 4))
        layer.load_state_dict(folded)
        found = model(input_ids=ids).logits
        # float64 throughout: only the order of a few roundings differs
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

        # Negative control: one stage undone, and the function is another.
        layer.load_state_dict(folded | {"mlp.down_proj.weight": given["mlp.down_proj.weight"]})
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert set(folded) == set(given)
    moved = {name for name in given if not torch.equal(folded[name], given[name])}
    linears = {f"{name}.weight" for stage in STAGES for name in stage.linears}
    assert linears | {"input_layernorm.weight", "post_attention_layernorm.weight"} <= moved
    for bias in ("self_attn.v_proj.bias", "mlp.up_proj.bias"):
        assert (bias in given) == (bias in moved)


def test_query_heads_share_the_channels_of_their_value_head_as_in_transformers():
    from transformers.models.llama.modeling_llama import repeat_kv

    channels = torch.arange(3 * 8).view(1, 3, 1, 8)  # [batch, value heads, tokens, head_dim]
    expected = repeat_kv(channels, 4).transpose(1, 2).reshape(-1)
    assert torch.equal(value_channel_of(12, 3, 8), expected)
    assert torch.equal(value_channel_of(4, 4, 8), torch.arange(32))


def output_error(weight, gram, scale, recipe):
    """tr(D gram D^T) in float64 after rounding weight * scale to the nearest of its grid and undoing the scale."""
    scaled = (weight * scale).T.contiguous()
    groups = scaled.view(-1, recipe.group_size, scaled.shape[1])
    importance = (gram.diagonal() / scale.square()).view(groups.shape[:2])
    grid = find_grid(groups, importance, bits=recipe.bits, sym=recipe.sym, search=recipe.scale_search)
    codes = quantize_to_codes(groups, grid.scales[:, None], grid.zeros[:, None], grid.max_code)
    values = ((codes - grid.zeros[:, None]) * grid.scales[:, None]).reshape(scaled.shape).T
    change = (values / scale - weight).double()
    return float((change @ gram.double() * change).sum())


def statistics_of(x):
    return InputStatistics(gram_of(x), x.mean(0), x.abs().mean(0))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_found_is_never_worse_than_none(sym, bits, seed):
    x = correlated_inputs(400, 96, seed)
    x[:, 5] *= 30  # a salient channel, which AWQ is for
    gram = gram_of(x)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(seed + 9))
    kept = weight.clone(), gram.clone()
    recipe = Recipe(method="awq", group_size=32, bits=bits, sym=sym, scale_search="minmax")
    scale = find_scale(weight, statistics_of(x), recipe)
    assert torch.equal(weight, kept[0]) and torch.equal(gram, kept[1])
    assert scale.shape == (96,) and (scale > 0).all()
    error = output_error(weight, gram, scale, recipe)
    plain = output_error(weight, gram, torch.ones(96), recipe)
    # candidates may be compared with products rounded to bf16, whose sums of thousands of terms are exact to 1 %
    assert error <= 1.01 * plain
    assert error < 0.9 * plain  # and with a salient channel it is clearly better


def test_where_no_scale_helps_it_is_one():
    """White inputs of one size: every exponent gives the same scale."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        find_scale(weight, InputStatistics(torch.eye(64), torch.zeros(64), torch.ones(64)), RECIPE), torch.ones(64)
    )


def test_channels_that_share_a_source_share_a_scale():
    x = correlated_inputs(400, 64, 2)
    source_of = value_channel_of(4, 2, 16)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scale = find_scale(weight, statistics_of(x), RECIPE, source_of)
    assert scale.shape == (32,)


@pytest.mark.parametrize("dead", [[3], list(range(64))])
def test_dead_channels_give_finite_scales(dead):
    x = correlated_inputs(200, 64, 3)
    x[:, dead] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scale = find_scale(weight, statistics_of(x), RECIPE)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert float(scale.max()) <= 1000 and float(scale.min()) >= 1 / 1000
