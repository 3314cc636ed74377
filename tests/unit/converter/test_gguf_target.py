"""GGUF files as they are written, read back by the gguf package and by transformers; and what is refused before."""

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.converter.gguf_source import GgufSource
from edgetool.converter.gguf_target import plan_gguf, write_gguf
from edgetool.converter.source import CheckpointSource
from edgetool.errors import BadInput, Stopped
from edgetool.progress import RecordingProgress
from tests.fakes.packed_checkpoints import Layer, random_layer, write_safetensors
from tests.fakes.tiny_gguf import NAMES, write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model

Kind = gguf.GGMLQuantizationType
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    made = {family: make_tiny_model(directory / family, family, tied=False) for family in FAMILIES}
    for model in made.values():
        if "qwen" in model.name:
            _use_qwen2_tokenizer(model)
    return made


def _use_qwen2_tokenizer(model: Path) -> None:
    from edgetool.checkpoints.gguf.tokenizer import NORMALIZERS, PRE_TOKENIZERS

    document = json.loads((model / "tokenizer.json").read_text())
    document |= {"pre_tokenizer": PRE_TOKENIZERS["qwen2"], "normalizer": NORMALIZERS["qwen2"]}
    (model / "tokenizer.json").write_text(json.dumps(document))


def _quantize(
    model: Path, directory: Path, kind: str = "gptq", layers: Mapping[str, Layer] | None = None, **options: Any
) -> tuple[Path, dict[str, Layer]]:
    """`model` with random codes for its linears, stored as `kind` by hand, and those codes."""
    directory.mkdir()
    tensors = {name: tensor.numpy() for name, tensor in load_file(model / "model.safetensors").items()}
    made = dict(layers or {})
    for seed, name in enumerate(name for name in list(tensors) if "_proj.weight" in name):
        weight, module = tensors.pop(name), name.removesuffix(".weight")
        made.setdefault(module, random_layer(seed, *weight.shape, **options))
        packed = made[module].tensors(kind)
        tensors |= {f"{module}.{suffix}": array for suffix, array in packed.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    return directory, made


def _write(source: Any, path: Path, **options: Any) -> dict[str, Any]:
    """Write, and read back with the gguf package: name -> tensor."""
    plan = plan_gguf(source)
    write_gguf(source, plan, path, **options)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _gguf_name(module: str) -> str:
    number, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[part]}.weight"


def _interleaved(rows: np.ndarray, module: str, family: str) -> np.ndarray:
    """The order of rows in a llama's GGUF, written as a loop over heads and halves."""
    if family not in ("llama", "mistral") or not module.endswith(("q_proj", "k_proj")):
        return rows
    half = HEAD_DIM // 2
    heads = HEADS if module.endswith("q_proj") else KV_HEADS
    return np.stack(
        [rows[h * HEAD_DIM + side * half + i] for h in range(heads) for i in range(half) for side in (0, 1)]
    )


def _same_bits(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_array_equal(left.view(np.uint32), np.ascontiguousarray(right).view(np.uint32))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gguf_package_reads_the_very_same_weights(tmp_path: Path, models: dict[str, Path], family: str) -> None:
    checkpoint, layers = _quantize(models[family], tmp_path / "q", sym=True)
    found = _write(CheckpointSource.open(checkpoint), tmp_path / "m.gguf")
    for module, layer in layers.items():
        tensor = found.pop(_gguf_name(module))
        assert tensor.tensor_type == Kind.Q4_0
        values = gguf.dequantize(tensor.data, Kind.Q4_0)
        _same_bits(values, _interleaved(layer.weight(), module, family))
    for name, expected in load_file(models[family] / "model.safetensors").items():
        if "_proj.weight" not in name:
            stem, _, suffix = name.rpartition(".")
            gguf_name = f"{NAMES[stem]}.{suffix}" if stem in NAMES else _gguf_name(stem).replace("weight", suffix)
            tensor = found.pop(gguf_name)
            # matrices as they were, all else as float32, which llama.cpp multiplies and adds with
            assert tensor.tensor_type == (Kind.F16 if expected.ndim == 2 else Kind.F32)
            np.testing.assert_array_equal(tensor.data, expected.numpy())
    assert not found


@pytest.mark.parametrize(
    ("kind", "bits", "sym", "expected"),
    [
        ("gptq", 4, True, Kind.Q4_0),
        ("gptq_v2", 8, True, Kind.Q8_0),
        ("awq", 4, False, Kind.Q5_0),
        ("compressed-tensors", 4, False, Kind.Q5_0),
        ("gptq", 2, True, Kind.Q4_0),
        ("gptq", 3, False, Kind.Q4_0),
    ],
)
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_every_format_and_width_has_a_type_that_holds_it(
    tmp_path: Path, models: dict[str, Path], kind: str, bits: int, sym: bool, expected: Kind, group_size: int
) -> None:
    options = {"bits": bits, "group_size": group_size, "sym": sym}
    checkpoint, layers = _quantize(models["qwen3"], tmp_path / "q", kind, **options)
    found = _write(CheckpointSource.open(checkpoint), tmp_path / "m.gguf")
    for module, layer in layers.items():
        tensor = found[_gguf_name(module)]
        assert tensor.tensor_type == expected
        _same_bits(gguf.dequantize(tensor.data, expected), layer.weight())


def test_minima_that_are_float16_make_q4_1(tmp_path: Path, models: dict[str, Path]) -> None:
    layer = random_layer(7, 64, 64)
    layer.scales[:] = np.ldexp(np.float16(1), np.random.default_rng(0).integers(-9, -5, layer.scales.shape))
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", layers={Q_PROJ: layer})
    tensor = _write(CheckpointSource.open(checkpoint), tmp_path / "m.gguf")[_gguf_name(Q_PROJ)]
    assert tensor.tensor_type == Kind.Q4_1
    _same_bits(gguf.dequantize(tensor.data, Kind.Q4_1), _interleaved(layer.weight(), Q_PROJ, "llama"))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_blocks_go_to_gptq_and_come_back_byte_for_byte(
    tmp_path: Path, models: dict[str, Path], family: str, kind: Kind
) -> None:
    pre = "smollm" if family == "llama" else "qwen2"
    original = write_tiny_gguf(tmp_path / "m.gguf", models[family], pre=pre, kind=kind)
    source = GgufSource.open(original)
    layers = {}
    for module in source.layouts:
        linear = source.linear(module)
        g_idx = np.arange(linear.in_features, dtype=np.int32) // 32
        layers[module] = Layer(linear.codes, linear.zeros, linear.scales, g_idx, linear.bits)
    (tmp_path / "side").mkdir()
    source.write_side_files(tmp_path / "side")
    (tmp_path / "side" / "config.json").write_text(json.dumps(dict(source.config)))
    (tmp_path / "side" / "model.safetensors").write_bytes((models[family] / "model.safetensors").read_bytes())
    checkpoint, _ = _quantize(tmp_path / "side", tmp_path / "q", "gptq_v2", layers)
    made = _write(CheckpointSource.open(checkpoint), tmp_path / "again.gguf")
    for tensor in gguf.GGUFReader(original).tensors:
        if tensor.name.endswith("norm.weight") or ".bias" in tensor.name or tensor.name.startswith("blk."):
            assert made[tensor.name].tensor_type == tensor.tensor_type
            assert made[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_the_same_from_the_gguf_file(tmp_path: Path, family: str) -> None:
    # transformers believes every Qwen3 GGUF to have a head dimension of 128
    overrides = {"head_dim": 128} if family == "qwen3" else {"rope_theta": 50000.0}
    model = make_tiny_model(tmp_path / "model", family, tied=False, **overrides)
    if family != "llama":
        _use_qwen2_tokenizer(model)
    checkpoint, layers = _quantize(model, tmp_path / "q", sym=True)
    _write(CheckpointSource.open(checkpoint), tmp_path / "m.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for module, layer in layers.items():
        ours.get_submodule(module).weight.data = torch.from_numpy(layer.weight())
    tokens = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    text = "The lazy dog, again and 12 times."
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(text).input_ids == tokenizer(text).input_ids


def test_metadata_describe_the_model_and_its_tokenizer(tmp_path: Path, models: dict[str, Path]) -> None:
    checkpoint, _ = _quantize(models["mistral"], tmp_path / "q", sym=True)
    source = CheckpointSource.open(checkpoint)
    plan = plan_gguf(source)
    write_gguf(source, plan, tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_0),
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 4096,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
    }
    assert {key: fields[key] for key in expected} == expected
    assert "<|im_start|>" in fields["tokenizer.chat_template"]
    assert plan.types == {"F16": 2, "F32": 5, "Q4_0": 14}
    # header and padding come on top
    assert plan.output_bytes < (tmp_path / "m.gguf").stat().st_size < plan.output_bytes + 50_000


def test_llama_3_s_scaled_rotation_goes_into_a_tensor_and_comes_back(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = make_tiny_model(tmp_path / "model", "llama", tied=False, rope_parameters=rope)
    found = _write(CheckpointSource.open(model), tmp_path / "m.gguf")
    tensor = found[gguf_rope.TENSOR]
    assert (tensor.tensor_type, tensor.shape.tolist()) == (Kind.F32, [HEAD_DIM // 2])
    np.testing.assert_array_equal(tensor.data, gguf_rope.divisors(rope, 500000.0, HEAD_DIM))
    again = GgufSource.open(tmp_path / "m.gguf")
    assert again.config["rope_parameters"] == rope
    assert set(again.plain) == set(load_file(model / "model.safetensors"))
    _write(again, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_the_same_source_gives_the_same_bytes_whatever_the_threads_and_the_format(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    one, layers = _quantize(models["llama"], tmp_path / "a", "gptq", sym=True)
    other, _ = _quantize(models["llama"], tmp_path / "b", "compressed-tensors", layers)
    _write(CheckpointSource.open(one), tmp_path / "1.gguf", threads=1)
    _write(CheckpointSource.open(one), tmp_path / "2.gguf", threads=4)
    _write(CheckpointSource.open(other), tmp_path / "3.gguf")
    whole = (tmp_path / "1.gguf").read_bytes()
    assert whole == (tmp_path / "2.gguf").read_bytes()
    assert whole == (tmp_path / "3.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_floats_keeps_every_value(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = make_tiny_model(tmp_path / "model", "llama", tied=tied, dtype=dtype)
    found = _write(CheckpointSource.open(model), tmp_path / "m.gguf")
    assert ("output.weight" in found) is not tied
    kind = {"float16": Kind.F16, "bfloat16": Kind.BF16, "float32": Kind.F32}[dtype]
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            stored = found[_gguf_name(module)]
            assert stored.tensor_type == kind
            expected = _interleaved(tensor.float().numpy(), module, "llama")
            _same_bits(gguf.dequantize(stored.data, kind).astype(np.float32), expected)


def _change(directory: Path, **config: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\.\S+' is missing"),
        ({"num_hidden_layers": 10**12}, "tensors are too few for 1000000000000 layers"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.\S+' \(and 8 others\) has no place"),
        ({"vocab_size": 100}, "number 435, the embeddings have 100 rows"),
    ],
)
def test_models_that_have_no_gguf_form_are_refused(
    tmp_path: Path, models: dict[str, Path], changes: dict[str, Any], message: str
) -> None:
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", sym=True)
    _change(checkpoint, **changes)
    with pytest.raises(BadInput, match=message):
        plan_gguf(CheckpointSource.open(checkpoint))


def test_untied_embeddings_without_an_output_matrix_are_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "llama", tied=True)
    _change(model, tie_word_embeddings=False)
    with pytest.raises(BadInput, match=r"'lm_head\.weight' is missing"):
        plan_gguf(CheckpointSource.open(model))


def test_a_damaged_tokenizer_is_named_without_the_directory_it_was_copied_to(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "llama", layers=1)
    (model / "tokenizer.json").write_text("[]")
    with pytest.raises(BadInput, match=r"^tokenizer\.json: must hold a JSON object"):
        plan_gguf(CheckpointSource.open(model))


def test_every_layer_that_does_not_fit_is_named_with_its_reason(tmp_path: Path, models: dict[str, Path]) -> None:
    act_order = random_layer(1, 64, 64, sym=True, act_order=True)
    wide = random_layer(2, 32, 64, sym=True)
    wide = replace(wide, scales=np.random.default_rng(0).normal(0, 0.02, wide.scales.shape).astype(np.float32))
    layers = {Q_PROJ: act_order, "model.layers.0.self_attn.k_proj": wide}
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", layers=layers, sym=True)
    source = CheckpointSource.open(checkpoint)
    _change(checkpoint, intermediate_size=96)
    plan = plan_gguf(CheckpointSource.open(checkpoint))
    assert "activation order (g_idx)" in plan.refused[Q_PROJ]
    assert "F32 scales are not exact in float16" in plan.refused["model.layers.0.self_attn.k_proj"]
    assert plan.refused["model.layers.1.mlp.up_proj"] == "has shape [128, 64], config.json asks for [96, 64]"
    assert len(plan.refused) == 2 + 6
    with pytest.raises(ValueError, match="refused"):
        write_gguf(source, plan, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tensor_of_another_dtype_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", sym=True)
    source = CheckpointSource.open(checkpoint)
    for name, dtype, reason in (("lm_head.weight", "F64", "llama.cpp"), ("model.norm.weight", "F64", "F32 does not")):
        other = replace(source.plain[name], dtype=dtype)
        plan = plan_gguf(replace(source, plain={**source.plain, name: other}))
        assert list(plan.refused) == [name]
        assert reason in plan.refused[name]


def test_k_quants_and_the_like_are_refused_with_their_reason(tmp_path: Path, models: dict[str, Path]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q5_1)
    plan = plan_gguf(GgufSource.open(path))
    assert len(plan.refused) == 14
    assert "type Q5_1 has no integer codes" in plan.refused[Q_PROJ]


def test_a_stop_or_an_error_leaves_no_file(tmp_path: Path, models: dict[str, Path]) -> None:
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", sym=True)
    source = CheckpointSource.open(checkpoint)
    plan = plan_gguf(source)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        write_gguf(source, plan, tmp_path / "m.gguf", stop_requested=stop.is_set)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    with pytest.raises(BadInput, match="cut off"):
        write_gguf(source, plan, tmp_path / "m.gguf", threads=2)
    assert not (tmp_path / "m.gguf").exists()


def test_progress_covers_every_byte(tmp_path: Path, models: dict[str, Path]) -> None:
    checkpoint, _ = _quantize(models["llama"], tmp_path / "q", sym=True)
    progress = RecordingProgress()
    source = CheckpointSource.open(checkpoint)
    plan = plan_gguf(source, progress=progress)
    write_gguf(source, plan, tmp_path / "m.gguf", progress=progress)
    totals = [value for event, _, value in progress.events if event == "start"]
    assert totals == [21, plan.output_bytes]
    assert sum(value for event, _, value in progress.events if event == "advance") == sum(totals)
