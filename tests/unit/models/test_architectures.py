import pytest

from edgetool.errors import BadInput
from edgetool.models.architectures import FAMILIES, LINEARS_PER_LAYER, map_layers

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512}
LAYERS = ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", *LAYERS]
TIED = ["model.embed_tokens.weight", *LAYERS]


def config(model_type="llama", **more):
    return {"model_type": model_type, **SIZES, **more}


def test_a_plain_decoder_is_found_with_its_sizes_and_names():
    found = map_layers(config(), NAMES)
    assert (found.n_layers, found.hidden_size, found.vocab_size) == (2, 64, 512)
    assert [found.embedding, found.lm_head, found.final_norm] == NAMES[:3]
    assert found.linear_names(1) == [f"model.layers.1.{name}" for name in LINEARS_PER_LAYER]
    assert len(LINEARS_PER_LAYER) == 7


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_the_decoder_of_a_vlm_is_found_under_each_of_its_names(prefix):
    names = [name.replace("model.", prefix) for name in NAMES]
    found = map_layers({"model_type": "qwen2_vl", "text_config": SIZES}, names)
    assert found.layer_prefix(1) == f"{prefix}layers.1."
    assert found.hidden_size == 64


def test_the_text_configs_sizes_win_over_those_beside_it():
    document = config("qwen2_5_vl", hidden_size=999, text_config=SIZES)
    assert map_layers(document, NAMES).hidden_size == 64


def test_layers_that_config_json_does_not_count_are_told():
    names = [*NAMES, "model.layers.7.mlp.up_proj.weight", "model.layers.norm.weight"]
    assert map_layers(config(), names).uncounted(names) == [7]
    assert map_layers(config(num_hidden_layers=1), names).uncounted(names) == [1, 7]
    assert map_layers(config(), NAMES).uncounted(NAMES) == []


def test_a_tied_model_has_no_lm_head_even_if_one_is_stored():
    assert map_layers(config(tie_word_embeddings=True), NAMES).lm_head is None
    assert map_layers(config(tie_word_embeddings=True), TIED).lm_head is None


def test_a_quantised_lm_head_counts_as_one():
    assert map_layers(config(), [*TIED, "lm_head.qweight"]).lm_head == "lm_head.weight"


def test_every_family_is_known_by_its_model_type():
    for family in FAMILIES:
        assert map_layers(config(family), NAMES).model_type == family


@pytest.mark.parametrize(
    ("document", "names", "message"),
    [
        (config("gpt2"), NAMES, "architecture 'gpt2' is not supported"),
        (SIZES, NAMES, "architecture 'none given' is not supported"),
        (config("mixtral", num_local_experts=8), NAMES, r"mixture-of-experts .*'mixtral'"),
        (config("qwen3_moe"), NAMES, r"mixture-of-experts .*'qwen3_moe'"),
        (config("llama", num_local_experts=4), NAMES, r"mixture-of-experts .*'llama', num_local_experts"),
        (config("deepseek_v3", n_routed_experts=64), NAMES, "mixture-of-experts .*'deepseek_v3', n_routed_experts"),
        (config(), ["transformer.wte.weight"], r"no model\.embed_tokens\.weight"),
        (config(), TIED, r"no lm_head\.weight in the checkpoint, and tie_word_embeddings is not set"),
        ({"model_type": "llama", "hidden_size": 64, "vocab_size": 8}, NAMES, "num_hidden_layers is None"),
        (config(hidden_size="wide"), NAMES, "hidden_size is 'wide'; must be a whole number"),
        (config(num_hidden_layers=0), NAMES, "num_hidden_layers is 0; must be a whole number, 1 or more"),
        (config(num_hidden_layers=True), NAMES, "num_hidden_layers is True"),
        (config(vocab_size=float("inf")), NAMES, "vocab_size is inf"),
        (config(num_hidden_layers=10**12), NAMES, r"promises 1000000000000 layers.* no tensor of model\.layers\.2"),
        (config(text_config=["llama"]), NAMES, r"text_config is \['llama'\]; must be an object"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(document, names, message):
    with pytest.raises(BadInput, match=message):
        map_layers(document, names)


def test_a_refused_architecture_is_told_what_is_supported():
    with pytest.raises(BadInput) as refusal:
        map_layers(config("gpt2"), NAMES)
    assert all(family in refusal.value.hint for family in FAMILIES)
    with pytest.raises(BadInput) as refusal:
        map_layers(config(), TIED)
    assert '"tie_word_embeddings": true' in refusal.value.hint


def test_a_dense_model_with_one_expert_in_its_config_is_dense():
    assert map_layers(config("qwen3", num_experts=1), NAMES).model_type == "qwen3"
