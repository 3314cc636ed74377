import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.models.architectures import LINEARS_PER_LAYER
from edgetool.progress import NullProgress
from edgetool.quantizers import assemble
from edgetool.quantizers.recipe import Recipe
from tests.unit.models.reference import stirred_model
from tests.unit.quantizers.finished import finished_run

RECIPE = Recipe(method="rtn", group_size=32)
GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def whole(directory):
    return {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("format_name", "suffixes"),
    [("gptq", GPTQ), ("awq", GPTQ[:3]), ("compressed-tensors", ("weight_packed", "weight_scale", "weight_shape"))],
)
def test_the_output_has_every_name_the_format_asks_for_and_no_other(format_name, suffixes, tied, tmp_path):
    source = stirred_model(tmp_path / "model", "qwen2", tied=tied)
    finished_run(source, tmp_path / "out", RECIPE, format_name=format_name)
    before, after = whole(source), whole(tmp_path / "out")
    linears = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS_PER_LAYER}
    kept = set(before) - {f"{name}.weight" for name in linears}
    assert set(after) == kept | {f"{name}.{suffix}" for name in linears for suffix in suffixes}
    assert ("lm_head.weight" in after) == (not tied)
    for name in kept:
        assert after[name].dtype == torch.float16 and torch.equal(after[name], before[name])


def test_layers_stand_where_they_stood_in_the_original(tmp_path):
    """So that a shard holds neighbours: with a file for every tensor, the files' order is the order of all."""
    source = stirred_model(tmp_path / "model", "llama", layers=3, tied=False)
    finished_run(source, tmp_path / "out", RECIPE, max_shard_bytes=1)

    def places(names):
        return list(dict.fromkeys(".".join(name.split(".")[:3]) if ".layers." in name else name for name in names))

    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert places(name for path in files for name in load_file(path)) == places(Checkpoint.open(source).tensors)


def test_shards_hold_at_most_what_was_asked_and_the_index_names_all(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", tied=False)
    finished_run(source, tmp_path / "one", RECIPE)
    finished_run(source, tmp_path / "many", RECIPE, max_shard_bytes=70_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    total = 0
    for name in files:
        tensors = load_file(tmp_path / "many" / name)
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 70_000
        total += size
    assert index["metadata"]["total_size"] == total
    one, many = whole(tmp_path / "one"), whole(tmp_path / "many")
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_lm_head_takes_the_place_of_the_other(tied, tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1, tied=tied)
    run = finished_run(source, tmp_path / "out", RECIPE, lm_head=True)
    after = whole(tmp_path / "out")
    assert {name for name in after if name.startswith("lm_head.")} == {f"lm_head.{suffix}" for suffix in GPTQ}
    assert torch.equal(after["model.embed_tokens.weight"], whole(source)["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    assert len(run.reports) == 8


def test_the_config_says_how_it_is_quantised_and_spells_rope_for_old_and_new_readers(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
    source = stirred_model(tmp_path / "model", "llama", layers=1, dtype="bfloat16", rope_parameters=rope)
    finished_run(source, tmp_path / "out", RECIPE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    claim = config["quantization_config"]
    assert (claim["quant_method"], claim["bits"], claim["group_size"], claim["sym"]) == ("gptq", 4, 32, True)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == claim
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 50000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == rope
    original = json.loads((source / "config.json").read_text())
    assert all(config[key] == value for key, value in original.items() if key != "dtype")


def test_a_vlm_keeps_its_vision_tower_and_says_it_is_not_quantised(tmp_path):
    source = stirred_model(tmp_path / "model", "qwen2_vl", layers=1)
    run = finished_run(source, tmp_path / "out", RECIPE)
    before, after = whole(source), whole(tmp_path / "out")
    vision = [name for name in before if "visual." in name]
    assert vision and all(torch.equal(after[name], before[name]) for name in vision)
    assert all("language_model" in report["module"] or "visual" not in report["module"] for report in run.reports)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert any("visual" in rule for rule in config["quantization_config"]["dynamic"])
    run.audit()


def test_side_files_come_along_and_working_files_go(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    (source / "LICENSE").write_text("free")
    out = tmp_path / "out"
    finished_run(source, out, RECIPE)
    assert list(out.glob("layer-*.safetensors"))
    assemble.remove_working_files(out)
    left = {path.name for path in out.iterdir()}
    assert left >= {"LICENSE", "tokenizer.json", "config.json", "model.safetensors", "ledger.jsonl"}
    assert not {name for name in left if name.startswith(("layer-", "activations-", "lm-head"))}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_float32_tensors_become_16_bit(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    path = source / "model.safetensors"
    wide = {name: tensor.float() * 1.0001 for name, tensor in load_file(path).items()}
    save_file(wide, path)
    run = finished_run(source, tmp_path / "out", RECIPE)
    after = whole(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], wide["model.embed_tokens.weight"].half())
    assert torch.equal(after["model.norm.weight"], wide["model.norm.weight"].half())
    run.audit()


def test_tensors_of_layers_that_config_json_does_not_count_are_kept(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    run = finished_run(source, tmp_path / "out", RECIPE)
    before, after = whole(source), whole(tmp_path / "out")
    extra = [name for name in before if ".layers.1." in name]
    assert extra and all(torch.equal(after[name], before[name]) for name in extra)
    run.audit()


def test_assembling_again_gives_the_same_bytes(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    run = finished_run(source, tmp_path / "out", RECIPE)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(first[:1000])  # as a kill in the middle leaves it
    assemble.assemble(run.job, 10**9, NullProgress())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
