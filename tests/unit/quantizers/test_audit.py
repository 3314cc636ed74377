import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgetool.errors import VerificationFailed
from edgetool.progress import NullProgress
from edgetool.quantizers import audit as audit_module
from edgetool.quantizers.audit import smoke
from edgetool.quantizers.recipe import Recipe
from tests.unit.models.reference import stirred_model, streamed
from tests.unit.quantizers.finished import finished_run

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit")
    recipe = Recipe(method="rtn", group_size=32, sym=False, min_zero=1)
    source = stirred_model(root / "model", "qwen2", layers=1, tied=False, dtype="bfloat16")
    return finished_run(source, root / "out", recipe)


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of the output whose tensors a test may change before it is audited."""

    def audit(change):
        copy = tmp_path / "copy"
        shutil.copytree(run.directory, copy)
        path = copy / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return run.audit(copy)

    return audit


def test_what_the_engine_wrote_passes_and_is_counted(run, damaged):
    counts = run.audit()
    assert counts["quantized_modules"] == 7
    assert counts["tensors"] == len(load_file(run.directory / "model.safetensors"))
    damaged(lambda tensors: None)  # writing the same again is no damage


@pytest.mark.parametrize("bit", [0, 13, 31])
@pytest.mark.parametrize("suffix", ["qweight", "qzeros"])
def test_one_flipped_bit_in_codes_or_zeros_is_found(bit, suffix, damaged):
    def flip(tensors):
        words = tensors[f"{UP}.{suffix}"].view(-1)
        words[len(words) // 2] ^= -(2**31) if bit == 31 else 1 << bit

    with pytest.raises(VerificationFailed, match=f"{UP}: the values read back are not those"):
        damaged(flip)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_two_modules_that_changed_places_are_found(suffix, damaged):
    def swap(tensors):
        a, b = f"{GATE}.{suffix}", f"{UP}.{suffix}"
        assert not torch.equal(tensors[a], tensors[b])
        tensors[a], tensors[b] = tensors[b], tensors[a]

    with pytest.raises(VerificationFailed, match=f"{GATE}: the values read back"):
        damaged(swap)


def test_a_scale_one_step_off_is_found(damaged):
    def nudge(tensors):
        tensors[f"{Q}.scales"].view(torch.int16)[1, 5] += 1

    with pytest.raises(VerificationFailed, match=f"{Q}: the values read back"):
        damaged(nudge)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{Q}.scales", NORM, "lm_head.weight", f"{K}.bias"])
def test_nan_and_infinity_are_found_anywhere(value, name, damaged):
    def poison(tensors):
        tensors[name].view(-1)[3] = value

    with pytest.raises(VerificationFailed, match=rf"{name}|{Q}"):
        damaged(poison)


@pytest.mark.parametrize("name", [NORM, f"{K}.bias", "model.embed_tokens.weight", "lm_head.weight"])
def test_one_changed_value_of_a_16_bit_tensor_is_found(name, damaged):
    def nudge(tensors):
        tensors[name].view(torch.int16).view(-1)[7] += 1

    with pytest.raises(VerificationFailed, match=f"{name} is not the source's tensor"):
        damaged(nudge)


@pytest.mark.parametrize(
    "name", [f"{Q}.qweight", f"{Q}.qzeros", f"{Q}.scales", f"{Q}.g_idx", NORM, f"{K}.bias", "lm_head.weight"]
)
def test_a_dropped_tensor_is_found(name, damaged):
    with pytest.raises(VerificationFailed, match=f"{name}|{Q}"):
        damaged(lambda tensors: tensors.pop(name))


def test_a_whole_module_that_is_missing_is_found(damaged):
    def drop(tensors):
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{Q}.{suffix}"]

    with pytest.raises(VerificationFailed, match=f"{Q} is not quantised in the output"):
        damaged(drop)


@pytest.mark.parametrize(
    "name", [f"{Q}.weight", f"{Q}.extra", "model.layers.0.mystery", "model.layers.1.mlp.up_proj.weight"]
)
def test_an_added_tensor_is_found(name, damaged):
    def add(tensors):
        tensors[name] = torch.zeros(64, 64, dtype=torch.bfloat16)

    with pytest.raises(VerificationFailed, match=f"{name} should not be in the output"):
        damaged(add)


def test_a_tensor_of_another_dtype_or_shape_is_found(damaged):
    def widen(tensors):
        tensors[NORM] = tensors[NORM].float()

    with pytest.raises(VerificationFailed, match=rf"{NORM} is F32 \[64\], meant BF16 \[64\]"):
        damaged(widen)


def test_a_tensor_of_another_shape_is_found(damaged):
    def reshape(tensors):
        tensors[NORM] = tensors[NORM].view(8, 8)

    with pytest.raises(VerificationFailed, match=rf"{NORM} is BF16 \[8, 8\], meant BF16 \[64\]"):
        damaged(reshape)


@pytest.mark.parametrize("key", ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method"])
def test_a_config_that_says_something_else_is_found(key, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.directory, copy)
    config = json.loads((copy / "config.json").read_text())
    wrong = {
        "bits": 8,
        "group_size": 64,
        "sym": True,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
        "quant_method": "awq",
    }
    config["quantization_config"][key] = wrong[key]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match=r"disagree: .*config\.json says"):
        run.audit(copy)


def test_a_config_without_quantisation_is_found(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.directory, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match="not recognised"):
        run.audit(copy)


def test_tensors_that_were_meant_to_change_may(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.directory, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[NORM] = tensors[NORM] * 2
    save_file(tensors, copy / "model.safetensors")
    run.audit(copy, changed={NORM})
    with pytest.raises(VerificationFailed):
        run.audit(copy, changed={f"{K}.bias"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_is_written_passes_whatever_its_codes_average_to(bits, sym, group_size, tmp_path):
    """Few weights with a mean far from zero: their codes do not betray the version of the zeros, and need not."""
    source = stirred_model(tmp_path / "model", "llama", layers=1)
    path = source / "model.safetensors"
    save_file({n: t + (0.05 if ".layers." in n else 0) for n, t in load_file(path).items()}, path)
    recipe = Recipe(method="rtn", bits=bits, group_size=group_size, sym=sym, min_zero=0 if sym else 1)
    finished_run(source, tmp_path / "out", recipe).audit()


def test_the_smoke_test_refuses_babble_where_the_original_speaks(run, monkeypatch):
    output, source = streamed(run.directory), streamed(run.source)
    babble, speech = [5] * 16, list(range(20, 36))
    answers = {id(output): babble, id(source): speech}
    monkeypatch.setattr(audit_module.generation, "generate", lambda model, *_, **__: torch.tensor([answers[id(model)]]))
    with pytest.raises(VerificationFailed, match="does not generate language: token 5 makes up 16 of 16"):
        smoke(output, source, NullProgress())
    answers[id(source)] = babble  # an untrained model
    assert smoke(output, source, NullProgress())["degenerate"] == "token 5 makes up 16 of 16 tokens"
    answers[id(output)] = speech
    assert smoke(output, source, NullProgress())["degenerate"] is None
