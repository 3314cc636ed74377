"""GGUF files as sources: codes where blocks have them, the gguf package's values everywhere, rows in order."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32
from edgetool.checkpoints.formats import Spec
from edgetool.checkpoints.gguf.importing import import_gguf
from edgetool.converter import gguf_source
from edgetool.converter.gguf_source import GgufSource
from edgetool.converter.source import PlainTensor
from edgetool.errors import BadInput, EdgetoolError
from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model

Kind = gguf.GGMLQuantizationType
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}
Q_PROJ, DOWN_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(directory / family, family, tied=False) for family in PRE}


def _rows(tensor: PlainTensor) -> np.ndarray:
    return np.concatenate(list(tensor.chunks())).reshape(tensor.shape)


def _quantized(model: Path, name: str, kind: Kind) -> np.ndarray:
    """What the gguf package makes of the model's own tensor, in the model's own order of rows."""
    weight = load_file(model / "model.safetensors")[name].float().numpy()
    return gguf.dequantize(gguf.quantize(weight, kind), kind)


def _same_bits(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q8_0, 8)])
@pytest.mark.parametrize("family", PRE)
def test_codes_have_the_models_own_rows_and_values(
    tmp_path: Path, models: dict[str, Path], family: str, kind: Kind, bits: int
) -> None:
    model = models[family]
    source = GgufSource.open(write_tiny_gguf(tmp_path / "m.gguf", model, pre=PRE[family], kind=kind))
    assert source.spec == Spec(bits, 32, sym=True)
    assert (source.format, source.inexact, source.disagreements) == ("gguf", {}, ())
    tensors = load_file(model / "model.safetensors")
    assert {f"{module}.weight" for module in source.layouts} | set(source.plain) == set(tensors)
    assert set(source.order) == set(source.layouts) | set(source.plain)
    for module, layout in source.layouts.items():
        linear = source.linear(module)
        expected = _quantized(model, f"{module}.weight", kind)
        _same_bits(linear.dequantize(), expected)
        _same_bits(source.weight(module), expected)
        np.testing.assert_array_equal(source.rest(module).zeros, linear.zeros)
        assert (layout.out_features, layout.in_features) == linear.codes.shape
        assert (layout.bits, layout.group_size, layout.g_idx_trivial) == (bits, 32, True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # quantised there too, and rounded once here
        np.testing.assert_array_equal(_rows(source.plain[name]), _quantized(model, name, kind).astype(np.float16))
    for name, tensor in source.plain.items():
        assert tensor.dtype == "F16"
        if len(tensor.shape) == 1:
            np.testing.assert_array_equal(_rows(tensor), tensors[name].numpy())


def _on_the_grid(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Q4_1 blocks whose minimum is -d times an integer."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // 32, 20), dtype=np.uint8)
    scales = 2.0 ** rng.integers(-9, -5, (rows, columns // 32))
    minima = -scales * rng.integers(0, 16, scales.shape)
    pairs = np.stack([scales, minima], -1).astype("<f2")
    blocks[:, :, :4] = pairs.view(np.uint8).reshape(*scales.shape, 4)
    return blocks.reshape(rows, -1)


def test_q4_1_has_codes_only_where_every_minimum_is_on_the_grid(tmp_path: Path, models: dict[str, Path]) -> None:
    exact = {"blk.1.attn_q.weight": (Kind.Q4_1, _on_the_grid(64, 64))}
    source = GgufSource.open(write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_1, stored=exact))
    assert source.spec == Spec(4, 32, sym=False)
    assert set(source.layouts) - set(source.inexact) == {Q_PROJ}
    linear = source.linear(Q_PROJ)
    _same_bits(linear.dequantize(), source.weight(Q_PROJ))
    np.testing.assert_array_equal(source.rest(Q_PROJ).zeros, linear.zeros)
    _same_bits(source.weight(DOWN_PROJ), _quantized(models["llama"], f"{DOWN_PROJ}.weight", Kind.Q4_1))
    assert "no integer multiples" in source.inexact[DOWN_PROJ]
    for read in (source.linear, source.rest):
        with pytest.raises(BadInput, match=rf"m\.gguf: {DOWN_PROJ}: minima"):
            read(DOWN_PROJ)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL])
def test_other_types_have_values_and_say_so(tmp_path: Path, models: dict[str, Path], kind: Kind) -> None:
    columns = {"attn_q": 64, "ffn_down": 128}
    size = gguf.GGML_QUANT_SIZES[kind][1]
    dice = np.random.default_rng(3)
    stored = {
        f"blk.{layer}.{part}.weight": (kind, dice.integers(0, 60, (64, count // 32 * size), dtype=np.uint8))
        for part, count in columns.items()
        for layer in (0, 1)
    }
    source = GgufSource.open(write_tiny_gguf(tmp_path / "m.gguf", models["qwen2"], pre="qwen2", stored=stored))
    assert source.inexact == dict.fromkeys(source.layouts, source.inexact[DOWN_PROJ])
    assert f"type {kind.name} has no integer codes" in source.inexact[DOWN_PROJ]
    assert source.spec is not None
    assert not source.spec.sym
    _same_bits(source.weight(DOWN_PROJ), gguf.dequantize(stored["blk.0.ffn_down.weight"][1], kind))


def test_k_quants_have_values(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "llama", hidden_size=256, layers=1)
    dice = np.random.default_rng(3)
    stored = {
        "token_embd.weight": (Kind.Q6_K, dice.integers(0, 60, (512, 210), dtype=np.uint8)),
        "blk.0.attn_q.weight": (Kind.Q4_K, dice.integers(0, 60, (256, 144), dtype=np.uint8)),
    }
    source = GgufSource.open(write_tiny_gguf(tmp_path / "m.gguf", model, kind=Kind.Q4_0, stored=stored))
    module = "model.layers.0.self_attn.q_proj"
    assert set(source.inexact) == {module}
    assert (source.layouts[module].bits, source.spec) == (4, Spec(4, 32, sym=False))
    # llama.cpp's order: row 0 of a head, row 8, row 1, row 9, ... (heads of 16)
    order = [head * 16 + half * 8 + i for head in range(16) for i in range(8) for half in (0, 1)]
    theirs = gguf.dequantize(stored["blk.0.attn_q.weight"][1], Kind.Q4_K)
    _same_bits(source.weight(module)[order], theirs)
    embeddings = gguf.dequantize(stored["token_embd.weight"][1], Kind.Q6_K).astype(np.float16)
    np.testing.assert_array_equal(_rows(source.plain["model.embed_tokens.weight"]), embeddings)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.F32])
def test_floats_keep_their_values(tmp_path: Path, models: dict[str, Path], kind: Kind) -> None:
    source = GgufSource.open(write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=kind))
    assert (source.spec, source.layouts, source.format) == (None, {}, "gguf")
    # the model is of float16, which F32 holds exactly, so there float16 is delivered again
    assert source.plain[f"{Q_PROJ}.weight"].dtype == ("BF16" if kind == Kind.BF16 else "F16")
    rows = _rows(source.plain[f"{Q_PROJ}.weight"])
    values = bfloat16_to_float32(rows) if kind == Kind.BF16 else rows.astype(np.float32)
    if kind == Kind.BF16:
        np.testing.assert_array_equal(values, _quantized(models["llama"], f"{Q_PROJ}.weight", kind))
    else:
        original = load_file(models["llama"] / "model.safetensors")[f"{Q_PROJ}.weight"].numpy()
        np.testing.assert_array_equal(values, original)


def test_a_float32_tensor_that_float16_cannot_hold_stays_float32(tmp_path: Path, models: dict[str, Path]) -> None:
    norm = np.full(64, 1.0 + 2.0**-20, np.float32)
    source = GgufSource.open(
        write_tiny_gguf(tmp_path / "m.gguf", models["llama"], tensors={"output_norm.weight": norm})
    )
    tensor = source.plain["model.norm.weight"]
    assert tensor.dtype == "F32"
    np.testing.assert_array_equal(_rows(tensor), norm)


def test_quantised_embeddings_are_rounded_once_to_the_dtype_asked_for(tmp_path: Path, models: dict[str, Path]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_0)
    wide = _quantized(models["llama"], "lm_head.weight", Kind.Q4_0)
    source = GgufSource.open(path, "BF16")
    assert (source.config["torch_dtype"], source.config["dtype"]) == ("bfloat16", "bfloat16")
    rounded = bfloat16_to_float32(_rows(source.plain["lm_head.weight"]))
    # half a unit in the last of bfloat16's eight significant bits
    assert np.all(np.abs(rounded - wide) <= np.abs(wide) * 2.0**-8)
    assert not np.array_equal(rounded, wide)
    np.testing.assert_array_equal(_rows(GgufSource.open(path, "F32").plain["lm_head.weight"]), wide)


def test_configuration_and_side_files_are_those_of_the_import(tmp_path: Path, models: dict[str, Path]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q8_0)
    for name in ("imported", "converted"):
        (tmp_path / name).mkdir()
    import_gguf(path, tmp_path / "imported")
    source = GgufSource.open(path)
    source.write_side_files(tmp_path / "converted")
    assert dict(source.config) == json.loads((tmp_path / "imported" / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "imported" / name).read_bytes()
    assert len(list((tmp_path / "converted").iterdir())) == 3
    assert list(source.files) == [path]


def test_reading_in_small_blocks_changes_nothing(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_1)
    whole = GgufSource.open(path)
    expected = {name: _rows(tensor) for name, tensor in whole.plain.items()}, whole.weight(Q_PROJ)
    monkeypatch.setattr(gguf_source, "_CHUNK_VALUES", 64 * 5)
    source = GgufSource.open(path)
    for name, values in expected[0].items():
        np.testing.assert_array_equal(_rows(source.plain[name]), values)
    _same_bits(source.weight(Q_PROJ), expected[1])
    assert source.inexact == whole.inexact


DAMAGED: dict[str, dict[str, Any]] = {
    "architecture 'gemma'": {"metadata": {"general.architecture": "gemma"}},
    r"'blk\.1\.attn_q\.weight' is missing": {"tensors": {"blk.1.attn_q.weight": None}},
    "pre-tokenizer 'dbrx'": {"pre": "dbrx"},
    "block_count is 0": {"metadata": {"llama.block_count": 0}},
    "tensors are too few": {"metadata": {"llama.block_count": 1 << 31}},
    r"head_count is \[4, 2\]": {"metadata": {"llama.attention.head_count": [4, 2]}},
    "heads of 15": {"metadata": {"llama.attention.key_length": 15}},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_or_unknown_file_is_bad_input_before_anything_is_read(
    tmp_path: Path, models: dict[str, Path], message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], **DAMAGED[message])
    with pytest.raises(BadInput, match=message) as caught:
        GgufSource.open(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("kept", [0, 100, 5000, -20_000, -1])
def test_a_cut_off_file_is_bad_input(tmp_path: Path, models: dict[str, Path], kept: int) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EdgetoolError) as caught:
        GgufSource.open(path)
    assert caught.value.exit_code == 4


def test_a_scale_that_is_no_number_is_bad_input_and_names_the_layer(tmp_path: Path, models: dict[str, Path]) -> None:
    blocks = gguf.quantize(np.ones((64, 64), np.float32), Kind.Q4_0)
    blocks[3, :2] = np.array([np.nan], "<f2").view(np.uint8)
    path = write_tiny_gguf(
        tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_0, stored={"blk.1.attn_q.weight": (Kind.Q4_0, blocks)}
    )
    source = GgufSource.open(path)
    with pytest.raises(BadInput, match=rf"1 scales are NaN or infinite .*{Q_PROJ}"):
        source.linear(Q_PROJ)


@pytest.mark.demo
def test_the_real_demo_file_gives_its_values_and_says_why_it_has_no_codes(
    demo_gguf: Path, demo_model_dir: Path
) -> None:
    source = GgufSource.open(demo_gguf)
    assert len(source.layouts) == 210
    assert set(source.inexact) == set(source.layouts)  # Q4_1 with minima of their own, as llama-quantize makes them
    assert set(source.inexact.values()) == {
        "minima of its Q4_1 blocks are no integer multiples of their scales, so there are no integer zeros"
    }
    imported = load_file(demo_model_dir / "model.safetensors")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        np.testing.assert_array_equal(source.weight(module).astype(np.float16), imported[f"{module}.weight"].numpy())
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(_rows(source.plain[name]), imported[name].numpy())
