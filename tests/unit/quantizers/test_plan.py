import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.formats import Spec
from edgetool.config import QuantizeConfig
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.models.architectures import map_layers
from edgetool.quantizers import plan as plan_module
from edgetool.quantizers.plan import make_plan
from edgetool.quantizers.prepare import recipe_of
from tests.unit.models.reference import stirred_model
from tests.unit.quantizers.finished import finished_run


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return stirred_model(tmp_path_factory.mktemp("llama"), "llama", tied=False)


def plan(source, output, gpu_free_bytes=None, **options):
    config = QuantizeConfig(
        **(
            {"model": str(source), "output": output, "group_size": 32, "calib_samples": 4, "calib_seqlen": 500}
            | options
        )
    )
    checkpoint = Checkpoint.open(source)
    spec = Spec(config.bits, config.group_size, config.sym, config.desc_act)
    layers = map_layers(checkpoint.config, checkpoint.tensors)
    return make_plan(config, checkpoint, layers, recipe_of(config), spec, "F16", "cpu", gpu_free_bytes)


def test_a_plan_names_what_will_be_done(llama, tmp_path):
    found = plan(llama, tmp_path / "out")
    assert (found["quantized_modules"], found["calibration_tokens"], found["group_size"]) == (14, 2000, 32)
    assert (found["method"], found["format"], found["bits"]) == ("gptq", "gptq", 4)
    assert plan(llama, tmp_path / "out", quantize_lm_head=True)["quantized_modules"] == 15
    assert plan(llama, tmp_path / "out", method="rtn")["calibration_tokens"] == 0
    assert found["memory"]["needed_bytes"] < found["memory"]["available_bytes"]
    assert found["time"]["expected_s"] > 0
    assert any(kernel["ok"] for kernel in found["kernels"])


@pytest.mark.parametrize("format_name", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_size_of_the_output_is_foretold_to_the_byte(format_name, group_size, llama, tmp_path):
    found = plan(llama, tmp_path / "out", format=format_name, method="rtn", group_size=group_size)
    config = QuantizeConfig(method="rtn", group_size=group_size, format=format_name)
    finished_run(llama, tmp_path / "out", recipe_of(config), format_name=format_name)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found["disk"]["output_bytes"] == sum(tensor.nbytes for tensor in written.values())


@pytest.mark.parametrize(
    ("hidden_size", "group_size", "words", "hint"),
    [
        (64, 128, r"group_size 128 does not divide in_features 64 \(model\.layers\.0\.self_attn\.q_proj\)", "64 or 32"),
        (96, 64, r"group_size 64 does not divide in_features 96 \(model\.layers\.0\.self_attn\.q_proj\)", "32"),
        (48, 32, r"group_size 32 does not divide in_features 48 \(model\.layers\.0\.self_attn\.q_proj\)", "-1"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(
    hidden_size, group_size, words, hint, tmp_path
):
    source = stirred_model(tmp_path / "model", "llama", layers=1, hidden_size=hidden_size)
    with pytest.raises(BadInput, match=words) as refusal:
        plan(source, tmp_path / "out", group_size=group_size)
    assert f"--group-size {hint}" in refusal.value.hint
    assert "128" not in refusal.value.hint


def test_a_width_that_packing_does_not_divide_is_refused(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1, hidden_size=48)
    with pytest.raises(BadInput, match="in_features 48 is not a multiple of 32"):
        plan(source, tmp_path / "out", group_size=-1)


def rewritten(source, directory, change):
    directory.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_missing_or_unfit_weight_is_named(llama, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = rewritten(llama, tmp_path / "a", lambda tensors: tensors.pop(name))
    with pytest.raises(BadInput, match=rf"tensor {name} is missing \(config\.json promises 2 layers\)"):
        plan(source, tmp_path / "out")
    source = rewritten(llama, tmp_path / "b", lambda tensors: tensors.update({name: tensors[name].int()}))
    with pytest.raises(BadInput, match=f"{name} is stored as I32"):
        plan(source, tmp_path / "out")
    source = rewritten(llama, tmp_path / "c", lambda tensors: tensors.update({name: tensors[name].view(-1)}))
    with pytest.raises(BadInput, match=rf"{name} has shape \[8192\]"):
        plan(source, tmp_path / "out")


def test_formats_that_cannot_hold_the_result_are_refused(llama, tmp_path):
    with pytest.raises(BadInput, match="format awq cannot hold a quantised lm_head"):
        plan(llama, tmp_path / "out", method="awq", quantize_lm_head=True)
    with pytest.raises(BadInput, match="format compressed-tensors: "):
        plan(llama, tmp_path / "out", format="compressed-tensors", desc_act=True)


def test_too_little_memory_is_refused_with_both_numbers(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: 100 * 2**20)
    with pytest.raises(ResourceUnavailable, match=r"needs about .* of memory, 104\.9 MB are free"):
        plan(llama, tmp_path / "out")


def test_too_little_gpu_memory_is_refused_whatever_the_host_has(llama, tmp_path):
    with pytest.raises(ResourceUnavailable, match=r"on the GPU, 1\.0 kB are free"):
        plan(llama, tmp_path / "out", gpu_free_bytes=1000)
    assert plan(llama, tmp_path / "out", gpu_free_bytes=1 << 40)["memory"]["available_bytes"] == 1 << 40


def test_too_little_disk_is_refused_naming_the_place(llama, tmp_path, monkeypatch):
    asked = []
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage)
    with pytest.raises(ResourceUnavailable, match=r"of disk, .* has 1\.0 kB free") as refusal:
        plan(llama, tmp_path / "not" / "there" / "yet")
    assert asked == [tmp_path]  # the nearest directory that exists
    assert "--output" in refusal.value.hint
