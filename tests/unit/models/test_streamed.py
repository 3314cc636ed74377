import gc
import json
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.errors import BadInput
from edgetool.models import streamed as streamed_module
from edgetool.models.architectures import LINEARS_PER_LAYER
from edgetool.models.streamed import load_tokenizer
from tests.parity.test_layouts import random_linear
from tests.unit.models.reference import all_states, logits, some_ids, stirred_model, streamed, transformers_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

CASES = {
    "llama, tied": ("llama", {}),
    "llama, untied": ("llama", {"tied": False}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, bfloat16 in three shards": ("llama", {"dtype": "bfloat16", "shards": 3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding window": ("mistral", {"sliding_window": 8, "tied": False}),
    "qwen2": ("qwen2", {}),
    "qwen2, window in its last layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"tied": False}),
    "qwen3, head_dim other than hidden / heads": ("qwen3", {"head_dim": 32}),
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {"tied": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_read_one_by_one_compute_what_the_whole_model_computes(case, tmp_path):
    family, options = CASES[case]
    directory = stirred_model(tmp_path, family, **options)
    ids = some_ids(2, 24)
    with torch.no_grad():
        expected = transformers_model(directory)(input_ids=ids, output_hidden_states=True)
    model = streamed(directory)
    states = all_states(model, ids)
    # Both compute in float32, the one with sdpa and the other with eager attention: sums in another order.
    for ours, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # transformers gives the last state behind the final norm
    torch.testing.assert_close(model.final_norm(states[-1]), expected.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, states[-1]), expected.logits, rtol=1e-3, atol=1e-3)
    # The comparison means something only if the logits are far from constant.
    assert expected.logits.std() > 0.05


@pytest.mark.parametrize(
    ("family", "options", "without"),
    [
        ("mistral", {"sliding_window": 8}, {"sliding_window": None}),
        ("llama", {"rope_parameters": YARN}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ],
)
def test_window_and_rope_scaling_do_change_the_states_of_these_models(family, options, without, tmp_path):
    """Negative control of the test above."""
    ids = some_ids(1, 24)
    with_it = all_states(streamed(stirred_model(tmp_path / "a", family, **options)), ids)[-1]
    without_it = all_states(streamed(stirred_model(tmp_path / "b", family, **without)), ids)[-1]
    assert (with_it - without_it).abs().max() > 0.01


def test_states_stay_float32_while_products_run_in_the_compute_dtype(tmp_path):
    model = streamed(stirred_model(tmp_path, "qwen3"), torch.bfloat16)
    states = all_states(model, some_ids(1, 12))
    assert {state.dtype for state in states} == {torch.float32}
    assert model.layer(0).mlp.up_proj.weight.dtype == torch.bfloat16
    exact = all_states(streamed(tmp_path), some_ids(1, 12))[-1]
    # bf16 has 8 significant bits; two layers of products keep the error near 2**-8 of the states' size
    assert (states[-1] - exact).norm() < 0.03 * exact.norm()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return stirred_model(tmp_path_factory.mktemp("llama"), "llama", tied=False, shards=2)


def test_a_layer_that_is_let_go_leaves_nothing_behind(llama):
    model = streamed(llama)
    layer = model.layer(0)
    kept = [weakref.ref(tensor) for tensor in (*layer.parameters(), layer.mlp.up_proj.weight)]
    assert all(not parameter.is_meta for parameter in layer.parameters())
    del layer
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_reading_a_layer_reads_no_tensor_of_another(llama, monkeypatch):
    model = streamed(llama)
    _ = model.skeleton
    asked = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: asked.append(name) or read(self, name))
    model.quantization  # noqa: B018
    asked.clear()
    model.layer(1)
    assert sorted(asked) == sorted(name for name in model.checkpoint.tensors if name.startswith("model.layers.1."))


def test_a_layer_can_be_had_without_its_linears(llama):
    layer = streamed(llama).layer(0, linears=False)
    assert all(layer.get_submodule(name.rpartition(".")[0]) is not None for name in LINEARS_PER_LAYER)
    assert layer.self_attn.q_proj is None and layer.mlp.down_proj is None
    assert not layer.input_layernorm.weight.is_meta


def test_embedding_reads_only_the_rows_it_needs(llama, monkeypatch):
    model = streamed(llama)
    rows = []
    read_rows = Checkpoint.read_rows
    monkeypatch.setattr(Checkpoint, "read_rows", lambda self, n, r: rows.append(r.tolist()) or read_rows(self, n, r))
    ids = torch.tensor([[7, 300, 7], [301, 7, 300]])
    states = model.embed(ids)
    assert rows == [[7, 300, 301]]
    whole = load_file(model.checkpoint.tensors["model.embed_tokens.weight"].path)["model.embed_tokens.weight"]
    assert torch.equal(states, whole.float()[ids])


def test_a_token_outside_the_vocabulary_is_named(llama):
    with pytest.raises(BadInput, match=r"token id 512 is outside the vocabulary \(512 rows\)"):
        streamed(llama).embed(torch.tensor([[3, 512]]))


def test_the_output_matrix_comes_in_chunks_that_cover_it(llama, monkeypatch):
    monkeypatch.setattr(streamed_module, "VOCAB_CHUNK", 100)
    model = streamed(llama)
    chunks = list(model.output_chunks())
    assert [start for start, _ in chunks] == [0, 100, 200, 300, 400, 500]
    whole = torch.cat([rows for _, rows in chunks])
    assert np.array_equal(whole.numpy(), model.checkpoint.read_float32("lm_head.weight"))


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_quantised_linears_read_back_as_scale_times_code_minus_zero(name, tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    spec = Spec(4, 32, sym=False)
    linears = {}
    for number, module in enumerate(LINEARS_PER_LAYER):
        full = f"model.layers.0.{module}"
        out_features, in_features = tensors.pop(f"{full}.weight").shape
        linear = random_linear(number, out_features, in_features, 4, 32, sym=False, lowest_zero=1)
        linears[full] = linear
        for suffix, array in FORMATS[name].write(linear, spec, full).items():
            tensors[f"{full}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = FORMATS[name].quantization_config(spec, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))

    model = streamed(directory)
    assert model.quantization is not None and model.quantization.format == name
    layer = model.layer(0)
    for full, linear in linears.items():
        scales = np.repeat(linear.scales.astype(np.float64), 32, axis=1)
        zeros = np.repeat(linear.zeros.astype(np.float64), 32, axis=1)
        # an 11-bit scale times a 5-bit integer is exact in float32
        expected = (scales * (linear.codes - zeros)).astype(np.float32)
        assert np.array_equal(model.weight(full).numpy(), expected)
        built = layer.get_submodule(full.removeprefix("model.layers.0."))
        assert np.array_equal(built.weight.numpy(), expected)


def test_a_missing_tensor_and_a_norm_of_the_wrong_size_are_named(tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    norm = "model.layers.0.input_layernorm.weight"
    save_file(tensors | {norm: torch.ones(63)}, path)
    with pytest.raises(BadInput, match=rf"{norm} has shape \[63\], config.json asks for \[64\]"):
        streamed(directory).layer(0)
    del tensors[norm]
    save_file(tensors, path)
    with pytest.raises(BadInput, match=f"tensor {norm} is missing"):
        streamed(directory).layer(0)


def test_a_linear_whose_shape_is_not_what_config_json_asks_for_is_named(tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    config = json.loads((directory / "config.json").read_text())
    config["num_key_value_heads"] = 4
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"layers\.0\.self_attn\.k_proj.*\[32, 64\], config\.json asks for \[64, 64\]"):
        streamed(directory).layer(0)


def test_weights_that_are_no_floats_are_refused_by_their_dtype(tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64, dtype=torch.int8)}, path)
    with pytest.raises(BadInput, match="cannot compute with weights stored as I8"):
        streamed(directory).layer(0)


def test_a_config_transformers_cannot_use_is_an_error_about_that_file(tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 1.0}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"config\.json"):
        _ = streamed(directory).skeleton


def test_a_checkpoint_without_tokenizer_says_so_and_a_broken_one_too(tmp_path):
    directory = stirred_model(tmp_path, "llama", layers=1)
    assert load_tokenizer(Checkpoint.open(directory)).eos_token_id == 1
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="the tokenizer cannot be read"):
        load_tokenizer(Checkpoint.open(directory))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        load_tokenizer(Checkpoint.open(directory))
