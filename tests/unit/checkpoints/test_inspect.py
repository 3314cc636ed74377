"""What inspect reports, against transformers' own counts; and that every kind of disagreement is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.inspect import inspect_checkpoint
from edgetool.errors import BadInput
from edgetool.progress import RecordingProgress
from tests.fakes.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pristine"), "llama")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def _quantize(model: Path, name: str, spec: Spec, claim: dict[str, Any] | None = None) -> None:
    """Replace every linear by random codes in the format `name`; `claim` overrides what config.json says of it."""
    random = np.random.default_rng(0)
    stored = {}
    for tensor_name, tensor in load_file(model / "model.safetensors").items():
        if not tensor_name.endswith("_proj.weight"):
            stored[tensor_name] = tensor
            continue
        rows, columns = tensor.shape
        size = columns if spec.group_size == -1 else spec.group_size
        middle = 1 << (spec.bits - 1)
        groups = np.arange(columns, dtype=np.int32) // size
        g_idx = random.permutation(groups) if spec.desc_act else groups
        zeros = np.full((rows, columns // size), middle)
        if not spec.sym:
            zeros -= random.integers(0, 2, zeros.shape)
        # codes scatter around their zero as those of real weights do
        codes = np.rint(random.normal(zeros[:, g_idx], middle / 4))
        linear = QuantizedLinear(
            codes=np.clip(codes, 0, 2 * middle - 1).astype(np.uint8),
            scales=np.full(zeros.shape, 0.01, np.float16),
            zeros=zeros.astype(np.uint8),
            g_idx=g_idx if spec.desc_act else None,
            bits=spec.bits,
            group_size=size,
        )
        module = tensor_name.removesuffix(".weight")
        for suffix, array in FORMATS[name].write(linear, spec, module).items():
            stored[f"{module}.{suffix}"] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(stored, model / "model.safetensors")
    section = FORMATS[name].quantization_config(spec, ["lm_head"])
    _change_config(model, quantization_config=section | (claim or {}))


def _change_config(model: Path, **values: Any) -> None:
    document = json.loads((model / "config.json").read_text()) | values
    document = {key: value for key, value in document.items() if value is not None}
    (model / "config.json").write_text(json.dumps(document))


def _change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"])
def test_a_sound_checkpoint_is_described_and_nothing_is_wrong(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_tiny_model(tmp_path, family, tied=tied, dtype="bfloat16", shards=2)
    auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
    theirs = auto.from_pretrained(path)
    progress = RecordingProgress()
    report = inspect_checkpoint(path, progress)
    assert report.problems == []
    assert report.parameters == theirs.num_parameters()
    assert report.bytes == 2 * report.parameters
    assert (report.architecture, report.model_type) == (type(theirs).__name__, family)
    assert list(report.dtypes) == ["BF16"]
    assert report.files == {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    assert (report.quantization, report.tokenizer, report.chat_template) == (None, True, True)
    assert sum(value for kind, _, value in progress.events if kind == "advance") == report.bytes
    assert json.loads(json.dumps(report.to_dict()))["model_type"] == family


FOUND = [
    ("gptq", Spec(4, 32, sym=True)),
    ("gptq", Spec(4, 64, sym=True, desc_act=False)),
    ("gptq", Spec(4, 32, sym=True, desc_act=True)),
    ("gptq", Spec(8, 32, sym=True)),
    ("gptq", Spec(3, 32, sym=False)),
    ("gptq", Spec(2, 64, sym=False)),
    ("gptq_v2", Spec(4, 32, sym=False)),
    ("awq", Spec(4, 32, sym=False)),
    ("compressed-tensors", Spec(4, 32, sym=True)),
    ("compressed-tensors", Spec(8, 64, sym=True)),
]


@pytest.mark.parametrize(("name", "spec"), FOUND, ids=lambda value: str(value))
def test_quantisation_is_found_in_the_tensors_and_counted_out_of_the_parameters(
    model: Path, name: str, spec: Spec
) -> None:
    before = inspect_checkpoint(model)
    _quantize(model, name, spec)
    report = inspect_checkpoint(model)
    assert report.problems == []
    assert report.parameters == before.parameters
    assert report.bytes < before.bytes
    assert report.quantization is not None
    assert report.quantization | {"modules": 14} == {
        "format": name,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": spec.sym,
        "desc_act": spec.desc_act,
        "modules": 14,
    }


def test_a_configuration_that_says_otherwise_is_not_believed(model: Path) -> None:
    _quantize(model, "gptq", Spec(4, 32, sym=True), claim={"bits": 8, "group_size": 128, "desc_act": True})
    report = inspect_checkpoint(model)
    assert report.quantization is not None
    assert (report.quantization["bits"], report.quantization["group_size"]) == (4, 32)
    for word in ("bits 8", "group_size 128", "desc_act True"):
        assert any(word in problem for problem in report.problems), word


def test_a_nan_among_the_scales_is_named(model: Path) -> None:
    _quantize(model, "gptq", Spec(4, 32, sym=True))
    name = "model.layers.1.mlp.down_proj.scales"
    _change_tensors(model, lambda tensors: tensors[name].view(-1).__setitem__(5, float("nan")))
    assert inspect_checkpoint(model).problems == [
        f"model.safetensors: tensor {name}: 1 of 256 values are NaN or infinite"
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_no_numbers_are_found_in_every_float_type(tmp_path: Path, dtype: str, value: str) -> None:
    model = make_tiny_model(tmp_path, "llama", dtype=dtype)
    _change_tensors(model, lambda tensors: tensors["model.norm.weight"].__setitem__(63, float(value)))
    [problem] = inspect_checkpoint(model).problems
    assert "model.norm.weight: 1 of 64 values" in problem


def test_the_largest_finite_values_are_no_problem(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "llama", dtype="float16")
    _change_tensors(model, lambda tensors: tensors["model.norm.weight"].fill_(65504.0))
    assert inspect_checkpoint(model).problems == []


def _drop(name: str) -> Callable[[Path], None]:
    return lambda model: _change_tensors(model, lambda tensors: tensors.pop(name))


def _set(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda model: _change_tensors(model, lambda tensors: tensors.update({name: torch.zeros(*shape).half()}))


def _tokenizer_with(token_id: int) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        document = json.loads((model / "tokenizer.json").read_text())
        document["added_tokens"][-1]["id"] = token_id
        (model / "tokenizer.json").write_text(json.dumps(document))

    return change


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "too few layers": (lambda m: _change_config(m, num_hidden_layers=3), "promises 3 layers; layers 2 have no tensors"),
    "too many layers": (lambda m: _change_config(m, num_hidden_layers=1), "there are tensors of layers 1"),
    "layers without number": (
        lambda m: _change_config(m, num_hidden_layers=10**12),
        "layers 2, 3, 4, 5, 6 and 999999999993 more have no tensors",
    ),
    "a layer count that is none": (
        lambda m: _change_config(m, num_hidden_layers="two"),
        "num_hidden_layers is 'two'; must be a whole number, 1 or more",
    ),
    "heads that are no number": (
        lambda m: _change_config(m, num_attention_heads="x"),
        "num_attention_heads is 'x'; must be a whole number",
    ),
    "a list of model types": (lambda m: _change_config(m, model_type=["llama"]), "no model_type"),
    "no layer count": (lambda m: _change_config(m, num_hidden_layers=None), "no num_hidden_layers"),
    "no model type": (lambda m: _change_config(m, model_type=None), "no model_type"),
    "a linear missing": (
        _drop("model.layers.1.mlp.up_proj.weight"),
        "1 tensors are missing: model.layers.1.mlp.up_proj",
    ),
    "a norm missing": (_drop("model.norm.weight"), "missing: model.norm.weight"),
    "the embedding missing": (_drop("model.embed_tokens.weight"), "no tensor model.embed_tokens.weight"),
    "a linear of odd shape": (
        _set("model.layers.0.self_attn.q_proj.weight", 64, 32),
        "q_proj.weight has shape [64, 32], config.json asks for [64, 64]",
    ),
    "vocabulary of another size": (lambda m: _change_config(m, vocab_size=600), "asks for [600, 64]"),
    "untied without a head": (lambda m: _change_config(m, tie_word_embeddings=False), "no lm_head.weight"),
    "tied with a head": (
        _set("lm_head.weight", 512, 64),
        "ties the output to the embedding; the stored lm_head.weight",
    ),
    "another dtype": (
        lambda m: _change_config(m, dtype="bfloat16"),
        "says dtype bfloat16, most weights are stored as F16",
    ),
    "positions": (
        lambda m: _change_config(m, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "rope_theta 500000.0 in rope_parameters and nothing beside it",
    ),
    "claims to be quantised": (
        lambda m: _change_config(m, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        "no quantised tensors",
    ),
    "quantised in an unknown way": (
        lambda m: _change_config(m, quantization_config={"quant_method": "aqlm"}),
        "no quantised tensors",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer files"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text('{"model": '), "tokenizer.json: not valid JSON"),
    "something else as tokenizer": (
        lambda m: (m / "tokenizer.json").write_text("[1]"),
        "tokenizer.json: not a tokenizer",
    ),
    "tokenizer beyond the vocabulary": (_tokenizer_with(512), "token id 512, vocab_size in config.json is 512"),
    "broken generation settings": (lambda m: (m / "generation_config.json").write_text("{,"), "generation_config.json"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_every_disagreement_is_reported(model: Path, case: str) -> None:
    change, sentence = PROBLEMS[case]
    assert inspect_checkpoint(model).problems == []
    change(model)
    problems = inspect_checkpoint(model).problems
    assert any(sentence in problem for problem in problems), problems


def test_an_index_with_a_wrong_total_is_reported(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "llama", shards=2)
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_size"] += 1
    index.write_text(json.dumps(document))
    [problem] = inspect_checkpoint(model).problems
    assert "total_size" in problem


@pytest.mark.parametrize("template", ["jinja", "config", "none"])
def test_a_chat_template_is_found_in_either_place(model: Path, template: str) -> None:
    if template != "jinja":
        (model / "chat_template.jinja").unlink()
    if template == "config":
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert inspect_checkpoint(model).chat_template == (template != "none")


def test_an_unknown_architecture_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "architectures": ["Strange"]}))
    save_file({"a": torch.zeros(3, 4), "rotary.inv_freq": torch.zeros(8)}, tmp_path / "model.safetensors")
    report = inspect_checkpoint(tmp_path)
    assert (report.architecture, report.parameters) == ("Strange", 12)
    assert report.problems == ["no tokenizer files"]


def test_damage_is_an_error_and_not_a_report(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated"):
        inspect_checkpoint(model)


@pytest.mark.parametrize("config", [{"architectures": 3}, {"text_config": 3}, {"vocab_size": "x"}, {"hidden_size": []}])
def test_an_odd_configuration_does_not_break_the_report(model: Path, config: dict[str, Any]) -> None:
    _change_config(model, **config)
    assert inspect_checkpoint(model).parameters > 0
