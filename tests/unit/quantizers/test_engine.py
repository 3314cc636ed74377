import contextlib
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from edgetool.quantizers import engine
from edgetool.quantizers.ledger import Ledger
from edgetool.quantizers.recipe import Recipe
from tests.unit.models.reference import all_states, some_ids, stirred_model, streamed, transformers_model
from tests.unit.quantizers.finished import finished_run, job_of

IDS = some_ids(6, 100)  # 600 tokens: two batches of unequal size
GPTQ = Recipe(group_size=32)
RECIPES = {
    "gptq": ("llama", GPTQ),
    "gptq, desc_act, asymmetric": ("qwen3", Recipe(group_size=32, desc_act=True, sym=False, min_zero=1)),
    "gptq towards the original": ("llama", Recipe(group_size=32, asymmetric_calibration=0.5)),
    "gptq, biases corrected": ("qwen2", Recipe(group_size=32, bias_correction=True)),
    "gptq after awq": ("qwen2", Recipe(group_size=32, awq_scaling=True)),
    "awq": ("qwen2", Recipe(method="awq", group_size=32, awq_scaling=True)),
    "awq, window": ("mistral", Recipe(method="awq", group_size=32, awq_scaling=True, sym=False, min_zero=1)),
}
OPTIONS = {"mistral": {"sliding_window": 8}}


def last_states(run, stream="quantised"):
    """The states behind the last layer, from the file the engine left."""
    path = run.directory / f"activations-{stream}-{run.job.model.map.n_layers % 2}.bin"
    return torch.from_numpy(np.fromfile(path, np.float32)).view(*IDS.shape, -1)


@pytest.mark.parametrize("case", RECIPES)
def test_the_engine_calibrates_on_the_very_states_the_written_checkpoint_computes(case, tmp_path):
    family, recipe = RECIPES[case]
    source = stirred_model(tmp_path / "model", family, **OPTIONS.get(family, {}))
    run = finished_run(source, tmp_path / "out", recipe, token_ids=IDS)
    states = last_states(run)
    expected = all_states(streamed(run.directory), IDS)[-1]
    # float32 both; norms and biases that were changed are stored in fp16: 2**-11 of each
    changed = recipe.awq_scaling or recipe.bias_correction
    assert (states - expected).norm() < (3e-3 if changed else 1e-5) * expected.norm()
    original = all_states(streamed(source), IDS)[-1]
    assert (states - original).norm() > 1e-2 * original.norm()  # it is the quantised model's states that are meant
    if recipe.asymmetric_calibration:
        assert (last_states(run, "original") - original).norm() < 1e-5 * original.norm()
    assert {report["method"] for report in run.reports} == {"gptq" if recipe.method == "gptq" else "rtn"}
    linears = {report["module"].rpartition(".")[2] for report in run.reports}
    assert len(run.reports) == 14 and len(linears) == 7
    names = Checkpoint.open(run.directory).tensors
    run.audit(changed={name for name in names if ".layers." in name} if changed else frozenset())


def test_the_reported_error_is_that_of_the_layers_outputs(tmp_path):
    """For the first layer, whose inputs are the same in both models: from transformers' own hooks, in float64."""
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    run = finished_run(source, tmp_path / "out", Recipe(method="rtn", group_size=32), token_ids=IDS)
    seen = {}
    whole = transformers_model(source)
    attention = whole.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        whole(input_ids=IDS)
    output = streamed(run.directory)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    before = torch.cat([whole.get_submodule(name).weight.detach() for name in names]).double()
    after = torch.cat([output.weight(name) for name in names]).double()
    expected = float((seen["x"] @ (after - before).T).norm() / (seen["x"] @ before.T).norm())
    found = {report["relative_error"] for report in run.reports if report["module"] in names}
    assert len(found) == 1  # linears that read one input are solved together
    # products for the Gram matrix may be rounded to bf16 on the way
    assert found.pop() == pytest.approx(expected, rel=1e-2)


def test_the_checksums_reported_are_of_the_values_in_the_checkpoint(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    run = finished_run(source, tmp_path / "out", GPTQ, token_ids=IDS, lm_head=True)
    output = streamed(run.directory)
    for report in run.reports:
        assert zlib.crc32(output.weight(report["module"]).numpy().tobytes()) == report["values_crc32"]
    assert run.reports[-1]["module"] == "lm_head"


def files_of(run):
    return {path.name: path.read_bytes() for path in run.directory.glob("model*.safetensors")}


@pytest.mark.parametrize("case", ["gptq", "gptq towards the original", "awq"])
def test_a_run_stopped_anywhere_and_taken_up_gives_the_same_bytes(case, tmp_path):
    family, recipe = RECIPES[case]
    source = stirred_model(tmp_path / "model", family, layers=3)
    undisturbed = finished_run(source, tmp_path / "whole", recipe, token_ids=IDS)
    out, kept = tmp_path / "out", []
    for stop_at in (3, 6, 14):  # a layer asks four times, and four times more with AWQ
        asks = iter(range(1, 1000))
        job = job_of(source, out, recipe, token_ids=IDS, stop_requested=lambda a=asks, n=stop_at: next(a) == n)
        ledger = Ledger.open(out / "ledger.jsonl", {})
        with contextlib.suppress(engine.Abandoned):
            engine.run(job, ledger, NullProgress())
        kept.append(len(ledger.layers))
    assert kept == ([0, 0, 1] if case == "awq" else [0, 1, 3])
    taken_up = finished_run(source, out, recipe, token_ids=IDS)
    assert files_of(taken_up) == files_of(undisturbed)
    assert taken_up.ledger.layers == undisturbed.ledger.layers


def test_damaged_activations_are_noticed_when_a_run_is_taken_up(tmp_path):
    source = stirred_model(tmp_path / "model", "llama")
    out, calls = tmp_path / "out", []
    job = job_of(source, out, GPTQ, token_ids=IDS, stop_requested=lambda: calls.append(1) or len(calls) > 5)
    ledger = Ledger.open(tmp_path / "out" / "ledger.jsonl", {})
    with pytest.raises(engine.Abandoned):
        engine.run(job, ledger, NullProgress())
    assert len(ledger.layers) == 1
    path = out / "activations-quantised-1.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 64
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"activations in .* are damaged") as refusal:
        engine.run(job_of(source, out, GPTQ, token_ids=IDS), ledger, NullProgress())
    assert "--overwrite" in refusal.value.hint


def test_the_same_input_gives_the_same_bytes_and_other_samples_give_others(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    one, two = (finished_run(source, tmp_path / name, GPTQ, token_ids=IDS) for name in "ab")
    other = finished_run(source, tmp_path / "c", GPTQ, token_ids=some_ids(6, 100, seed=8))
    assert files_of(one) == files_of(two) != files_of(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value, tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinite"):
        finished_run(source, tmp_path / "out", Recipe(method="rtn", group_size=32))


def test_activations_that_overflow_are_named_by_the_linear_that_reads_them(tmp_path):
    source = stirred_model(tmp_path / "model", "llama", layers=1, dtype="bfloat16")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"] *= 1e30
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"inputs of model\.layers\.0\.self_attn\.q_proj are not finite"):
        finished_run(source, tmp_path / "out", GPTQ, token_ids=IDS)


def test_gptq_and_awq_bring_the_models_states_nearer_to_the_original_than_rounding(tmp_path):
    source = stirred_model(tmp_path / "model", "llama")
    original = all_states(streamed(source), IDS)[-1]
    error = {}
    for name, recipe in {
        "rtn": Recipe(method="rtn", group_size=32, bits=3, scale_search="minmax"),
        "gptq": Recipe(group_size=32, bits=3, scale_search="minmax"),
        "awq": Recipe(method="awq", group_size=32, bits=3, scale_search="minmax", awq_scaling=True),
    }.items():
        run = finished_run(source, tmp_path / name, recipe, token_ids=IDS)
        error[name] = float((all_states(streamed(run.directory), IDS)[-1] - original).norm())
    assert error["gptq"] < error["rtn"]
    assert error["awq"] < error["rtn"]
