import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetool.config import CommonConfig, QuantizeConfig
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from edgetool.quantizers.job import run_quantize
from edgetool.quantizers.prepare import recipe_of
from tests.unit.models.reference import all_states, some_ids, stirred_model, streamed

SMALL = {"group_size": 32, "calib_samples": 4, "calib_seqlen": 32, "threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def threads_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quantize(source, output, **options):
    config = QuantizeConfig(**({"model": str(source), "output": output} | SMALL | options))
    return run_quantize(config, CommonConfig(), NullProgress())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"bits": 8, "sym": False}),  # codes that do not betray the version of their zeros
        ("llama", {"bits": 3, "group_size": -1}),
        ("qwen3", {"bits": 2, "quantize_lm_head": True, "calib": "self"}),
        ("qwen2", {"method": "awq", "sym": False}),
        ("mistral", {"method": "rtn", "format": "compressed-tensors", "sym": False}),
        ("qwen2_vl", {"bias_correction": True}),
        ("qwen2_5_vl", {"method": "awq", "format": "compressed-tensors"}),
    ],
)
def test_a_model_goes_in_and_a_verified_checkpoint_comes_out(family, options, tmp_path):
    source = stirred_model(tmp_path / "model", family)
    result = quantize(source, tmp_path / "out", **options)
    head = bool(options.get("quantize_lm_head"))
    assert result["quantized_modules"] == 14 + head
    assert len(result["worst_modules"]) == 5
    manifest = json.loads((tmp_path / "out" / "edgetool.json").read_text())
    assert manifest["result"] == result
    assert manifest["verified"]["quantized_modules"] == 14 + head
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert not list(tmp_path.glob("*.partial"))
    ids = some_ids(2, 24)
    before, after = (all_states(streamed(path), ids)[-1] for path in (source, tmp_path / "out"))
    # Loose on purpose (test_engine.py compares exactly): 2 bits are far off in random weights.
    allowed = {8: 0.05, 4: 0.5, 3: 0.8, 2: 1.2}[options.get("bits", 4)]
    assert (after - before).norm() < allowed * before.norm()


def test_the_result_says_how_large_the_weights_are_over_all_shards(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", shards=2)
    result = quantize(source, tmp_path / "out", max_shard_size_bytes=100_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert result["output_bytes"] == sum(sizes) and len(sizes) > 1


def test_a_dry_run_writes_nothing(tmp_path):
    source = stirred_model(tmp_path / "model", "llama")
    found = quantize(source, tmp_path / "out", dry_run=True)
    assert found["plan"]["quantized_modules"] == 14
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_quantised_already_is_refused(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    quantize(source, tmp_path / "out", method="rtn")
    with pytest.raises(BadInput, match="is quantised already: gptq, 4 bits, group 32"):
        quantize(tmp_path / "out", tmp_path / "again", method="rtn")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"quantised already, says config\.json: fp8"):
        quantize(source, tmp_path / "again", method="rtn")


@pytest.mark.parametrize("failure", ["short", "nan", "group"])
def test_a_run_that_fails_early_leaves_nothing_behind(failure, tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    (tmp_path / "short.txt").write_text("Too short.")
    options = {"short": {"calib": str(tmp_path / "short.txt")}, "group": {"group_size": 128}}.get(failure, {})
    if failure == "nan":
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, source / "model.safetensors")
    words = {
        "short": "gives 3 tokens|gives .* tokens",
        "nan": "model.norm.weight holds NaN",
        "group": "does not divide",
    }
    with pytest.raises(BadInput, match=words[failure]):
        quantize(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "short.txt"]


def test_an_output_asked_for_twice_has_the_same_bytes(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    for name in ("a", "b"):
        quantize(source, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_one_group_for_a_row_has_no_activation_order_to_store(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    result = quantize(source, tmp_path / "out", desc_act=True, group_size=-1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert result["desc_act"] is False and config["quantization_config"]["desc_act"] is False
    assert quantize(source, tmp_path / "grouped", desc_act=True)["desc_act"] is True


def test_the_recipe_follows_the_configuration():
    assert recipe_of(QuantizeConfig()).method == "gptq"
    assert not recipe_of(QuantizeConfig()).awq_scaling
    assert recipe_of(QuantizeConfig(method="awq")).awq_scaling
    assert not recipe_of(QuantizeConfig(method="rtn", awq_scaling=True)).awq_scaling
    # GPTQ version 1 stores zero - 1, so an asymmetric zero must not be 0 there; other formats may have it
    assert recipe_of(QuantizeConfig(sym=False)).min_zero == 1
    assert recipe_of(QuantizeConfig(sym=False, format="awq")).min_zero == 0
