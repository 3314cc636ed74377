"""`edgetool convert` as a user types it: chains of conversions, and what is found out, refused and repaired."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes.packed_checkpoints import (
    SIDE_FILES,
    bfloat16,
    config_of,
    make_checkpoint,
    other_tensors,
    quantization_config_of,
    random_layer,
    random_layers,
    read_checkpoint,
)

Convert = Callable[..., Any]


@pytest.fixture
def convert() -> Convert:
    """`edgetool convert ... --json` in this process; the parsed document and the exit code."""
    from edgetool.cli import app

    def invoke(*arguments: object, code: int = 0) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--threads", "2", "--quiet", "--json"])
        assert result.exit_code == code, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        assert document["schema"] == "edgetool.convert/1"
        assert document["ok"] is (code == 0)
        return document

    return invoke


def same_tensors(left: Path, right: Path) -> None:
    ours, theirs = read_checkpoint(left), read_checkpoint(right)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


# --- what is converted


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_comes_back_bit_identical_from_a_tour_of_all_formats(
    act_order: bool, tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers(sym=True, act_order=act_order, seed=7)
    here = make_checkpoint(tmp_path / "gptq", layers, "gptq", shards=2)
    for number, target in enumerate(["compressed-tensors", "gptq_v2", *([] if act_order else ["awq"]), "gptq"]):
        there = tmp_path / str(number)
        document = convert(here, "-o", there, "--to", target)
        assert document["format"] == target
        assert document["tensors_compared"] == document["tensors_equal"] == len(read_checkpoint(there))
        here = there
    same_tensors(here, tmp_path / "gptq")
    for name, text in SIDE_FILES.items():
        assert (here / name).read_text() == text
    assert (
        json.loads((here / "quantize_config.json").read_text())
        == (json.loads((here / "config.json").read_text())["quantization_config"])
    )


def test_what_quantize_writes_comes_back_bit_identical_and_dequantises_exactly(
    tmp_path: Path, convert: Convert, quantize: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    first = tmp_path / "first"
    assert quantize(tiny("qwen2", tied=False), first, "--method", "rtn").exit_code == 0
    here = first
    for target in ("awq", "compressed-tensors", "gptq_v2", "gptq"):
        convert(here, "-o", tmp_path / target, "--to", target)
        here = tmp_path / target
    same_tensors(first, here)
    convert(first, "-o", tmp_path / "fp16", "--to", "fp16")
    tensors, plain = read_checkpoint(first), read_checkpoint(tmp_path / "fp16")
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(modules) == 14
    for module in modules:
        assert np.array_equal(plain[f"{module}.weight"].view(np.uint16), gptq_values(tensors, module)), module


def gptq_values(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """float16 bits of the weights of a symmetric 4-bit GPTQ layer, a nibble at a time."""
    words = tensors[f"{module}.qweight"].view(np.uint32)
    codes = np.stack([(words >> np.uint32(4 * k)) & 15 for k in range(8)], axis=1).reshape(-1, words.shape[1])
    scales = tensors[f"{module}.scales"].astype(np.float32)[tensors[f"{module}.g_idx"]]
    return ((codes.astype(np.float32) - 8) * scales).T.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize(("target", "narrowed"), [("fp16", lambda w: w.astype(np.float16)), ("bf16", bfloat16)])
def test_dequantised_weights_are_the_definitions_rounded_once(
    target: str, narrowed: Callable[[Any], Any], tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers(act_order=True, seed=3)
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", target)
    tensors = read_checkpoint(tmp_path / "out")
    for module, layer in layers.items():
        assert tensors[f"{module}.weight"].tobytes() == narrowed(layer.weight()).tobytes(), module
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == config["torch_dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[target]
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert (document["bits"], document["group_size"], document["quantized_modules"]) == (16, None, len(layers))


def test_the_result_document_has_everything_that_scripts_read(tmp_path: Path, convert: Convert) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(), "gptq_v2")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq")
    sizes = {"source_bytes", "output_bytes", "peak_rss_bytes", "seconds"}
    assert document.keys() >= sizes and all(document[key] > 0 for key in sizes)
    assert {key: document[key] for key in ("source_format", "format", "bits", "group_size", "sym", "desc_act")} == {
        "source_format": "gptq_v2",
        "format": "awq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
    }
    assert (document["refused"], document["disagreements"], document["verify"]) == ([], [], "all")
    manifest = json.loads((tmp_path / "out" / "edgetool.json").read_text())
    assert manifest["schema"] == "edgetool.convert-record/1"
    assert manifest["source"]["sha256"].keys() == {"model.safetensors"} == manifest["files"].keys()
    assert manifest["config"]["to"] == "awq"


def test_shards_are_cut_between_linears_and_named_by_a_right_index(tmp_path: Path, convert: Convert) -> None:
    layers = random_layers()
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    convert(source, "-o", tmp_path / "out", "--to", "compressed-tensors", "--max-shard-size", "8KB")
    shards = {path.name: set(read_checkpoint_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in shards.items() for name in names}
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in read_checkpoint(tmp_path / "out").values())
    for module in layers:
        assert len({index["weight_map"][f"{module}.{part}"] for part in ("weight_packed", "weight_scale")}) == 1


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    from tests.fakes.packed_checkpoints import read_safetensors

    return read_safetensors(path)


# --- what the config says wrongly


@pytest.fixture
def mislabelled(tmp_path: Path) -> Path:
    """Zeros as version 2 stores them, in a checkpoint that says it is version 1."""
    layers = random_layers(sym=True, seed=11)
    wrong = quantization_config_of(layers, "gptq_v2") | {"checkpoint_format": "gptq"}
    source = make_checkpoint(tmp_path / "mislabelled", layers, "gptq_v2", quantization_config=wrong)
    (source / "quantize_config.json").write_text(json.dumps(wrong | {"damp_percent": 0.1}))
    return source


def test_version_2_zeros_labelled_version_1_are_found_out_and_converted_right(
    mislabelled: Path, tmp_path: Path, convert: Convert
) -> None:
    document = convert(mislabelled, "-o", tmp_path / "out", "--to", "fp16")
    assert document["source_format"] == "gptq_v2"
    assert any("format gptq, the tensors say gptq_v2" in note for note in document["disagreements"])
    tensors = read_checkpoint(tmp_path / "out")
    for module, layer in random_layers(sym=True, seed=11).items():
        assert tensors[f"{module}.weight"].tobytes() == layer.weight().astype(np.float16).tobytes()


def test_a_wrong_label_is_repaired_in_place_and_nothing_else(mislabelled: Path, convert: Convert) -> None:
    weights = (mislabelled / "model.safetensors").read_bytes()
    before = json.loads((mislabelled / "config.json").read_text())
    document = convert("--fix-config", mislabelled)
    assert any("format gptq, the tensors say gptq_v2" in note for note in document["fixed"])
    after = json.loads((mislabelled / "config.json").read_text())
    assert after["quantization_config"]["checkpoint_format"] == "gptq_v2"
    for key in ("bits", "group_size", "sym", "desc_act", "lm_head"):
        assert after["quantization_config"][key] == before["quantization_config"][key]
    assert {k: v for k, v in after.items() if k != "quantization_config"} == {
        k: v for k, v in before.items() if k != "quantization_config"
    }
    assert json.loads((mislabelled / "quantize_config.json").read_text())["checkpoint_format"] == "gptq_v2"
    assert (mislabelled / "model.safetensors").read_bytes() == weights
    again = convert("--fix-config", mislabelled)
    assert again["fixed"] == [] == again["disagreements"]


def test_from_decides_where_the_zeros_leave_a_doubt(tmp_path: Path, convert: Convert) -> None:
    layers = random_layers(seed=5)
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq", "--from", "gptq_v2")
    assert document["source_format"] == "gptq_v2"
    shifted = read_checkpoint(tmp_path / "out")
    convert(source, "-o", tmp_path / "right", "--to", "awq")
    assert any(not np.array_equal(shifted[name], array) for name, array in read_checkpoint(tmp_path / "right").items())
    wrong = convert(source, "-o", tmp_path / "no", "--to", "fp16", "--from", "awq", code=4)
    assert "the shapes of its tensors are those of gptq" in wrong["message"]


# --- what is refused


def test_a_refusal_names_the_first_tensor_lists_all_and_leaves_nothing(tmp_path: Path, convert: Convert) -> None:
    layers = random_layers(sym=True)
    ordered = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"}
    for name in ordered:
        layers[name] = random_layer(1, *layers[name].codes.shape, sym=True, act_order=True)
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq", code=4)
    assert {entry["module"] for entry in document["refused"]} == ordered
    assert document["message"].startswith("model.layers.0.mlp.down_proj has no lossless form in awq")
    assert "2 of 22 tensors" in document["message"]
    assert "--fold-act-order" in document["hint"]
    assert (document["source_format"], document["format"]) == ("gptq", "awq")
    assert document["tensors_compared"] == document["tensors_equal"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_mixed_checkpoint_dequantises_and_is_refused_as_quantised(tmp_path: Path, convert: Convert) -> None:
    layers = random_layers(sym=True)
    odd = "model.layers.1.mlp.up_proj"
    layers[odd] = random_layer(4, *layers[odd].codes.shape, bits=8, sym=True)
    source = make_checkpoint(tmp_path / "source", layers, "compressed-tensors")
    document = convert(source, "-o", tmp_path / "out", "--to", "gptq", code=4)
    assert document["refused"] == [{"module": odd, "reason": "it has 8 bits, most linears have 4"}]
    convert(source, "-o", tmp_path / "out", "--to", "fp16")
    made = read_checkpoint(tmp_path / "out")[f"{odd}.weight"]
    assert made.tobytes() == layers[odd].weight().astype(np.float16).tobytes()


def test_other_tensors_that_the_target_cannot_hold_are_refused_or_rounded_as_asked(
    tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers()
    others = other_tensors(layers)
    others["model.norm.weight"][3] = np.float16(1.0009765625)  # eleven significant bits
    source = make_checkpoint(tmp_path / "source", layers, "gptq", others=others)
    document = convert(source, "-o", tmp_path / "out", "--to", "bf16", code=4)
    assert document["refused"] == [
        {"module": "model.norm.weight", "reason": "1 of its 64 F16 values do not exist in bf16"}
    ]
    document = convert(source, "-o", tmp_path / "out", "--to", "bf16", "--requant")
    assert document["warnings"] == ["1 values of 1 tensors (model.norm.weight ...) are rounded to bf16"]
    assert read_checkpoint(tmp_path / "out")["model.norm.weight"][3] == 0x3F80


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["SRC", "-o", "OUT"], 2, "convert needs --to FORMAT: gptq, gptq_v2, awq, compressed-tensors, fp16, bf16"),
        (["SRC", "--to", "awq"], 2, "convert needs --output"),
        ([], 2, "convert needs SRC"),
        (["SRC", "-o", "OUT", "--to", "gptq-v2"], 3, "did you mean gptq_v2?"),
        (["SRC", "-o", "OUT", "--to", "ct"], 3, "did you mean compressed-tensors?"),
        (["SRC", "-o", "OUT", "--to", "GPTQ"], 3, "did you mean gptq?"),
        (["SRC", "-o", "OUT", "--to", "llamafile"], 3, "no format is called 'llamafile'"),
        (["SRC", "-o", "OUT", "--to", "awq", "--group-size", "64"], 3, "add --requant"),
        (["SRC", "-o", "OUT", "--to", "fp16", "--sym"], 3, "leave --sym out"),
        (["--fix-config", "SRC", "--to", "awq"], 3, "--fix-config"),
        (["--fix-config", "SRC", "--dry-run"], 3, "--dry-run writes nothing"),
        (["SRC", "-o", "OUT.gguf", "--to", "gguf"], 3, "a directory is written"),
        (["--fix-config", "demo"], 4, "demo is none"),
        (["SRC", "-o", "SRC/inside", "--to", "awq"], 4, "must not lie in one another"),
        (["SRC", "-o", "SRC", "--to", "awq"], 4, "exists already"),
        (["SRC/config.json", "-o", "OUT", "--to", "awq"], 4, "a model is a directory or a .gguf file"),
        (["PLAIN", "-o", "OUT", "--to", "awq"], 4, "edgetool quantize"),
        (["NOWHERE", "-o", "OUT", "--to", "awq"], 4, "no such file or directory"),
    ],
)
def test_a_wrong_first_try_is_told_what_to_type(
    arguments: list[str], code: int, words: str, tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers(layers=1, sym=True)
    places = {"SRC": make_checkpoint(tmp_path / "src", layers, "gptq"), "OUT": tmp_path / "out"}
    places["PLAIN"] = make_checkpoint(tmp_path / "plain", layers, "fp16")

    def place(argument: str) -> str:
        word, slash, rest = argument.partition("/")
        return f"{places[word]}{slash}{rest}" if word in places else argument

    document = convert(*map(place, arguments), code=code)
    assert words in f"{document['message']} {document['hint']}"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["plain", "src"]


def test_a_copy_into_the_same_format_is_verified_and_said_to_be_one(tmp_path: Path, convert: Convert) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(), "awq")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq")
    assert document["warnings"] == ["source and output are both awq: the output is a copy with the same weights"]
    same_tensors(source, tmp_path / "out")


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, convert: Convert) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(sym=True), "gptq")
    plan = convert(source, "-o", tmp_path / "out", "--to", "compressed-tensors", "--dry-run")["plan"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    convert(source, "-o", tmp_path / "out", "--to", "compressed-tensors")
    made = read_checkpoint(tmp_path / "out")
    assert plan["tensors"] == len(made)
    assert plan["output_bytes"] == sum(array.nbytes for array in made.values())
    assert (plan["sym"], plan["bits"], plan["group_size"], plan["weight_files"]) == (True, 4, 32, 1)


def test_an_output_that_vllm_cannot_run_comes_with_the_reason(tmp_path: Path, convert: Convert) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(), "awq")
    plan = convert(source, "-o", tmp_path / "out", "--to", "gptq", "--dry-run")["plan"]
    assert any("no kernel of vLLM" in warning and "sym only" in warning for warning in plan["warnings"])
    plan = convert(source, "-o", tmp_path / "out", "--to", "compressed-tensors", "--dry-run")["plan"]
    assert plan["warnings"] == []


# --- with more allowed


def test_act_order_of_a_down_projection_is_folded_and_the_model_computes_the_same(
    tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers(layers=1, sym=True)
    down, up, gate = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up", "gate"))
    layers[down] = random_layer(1, *layers[down].codes.shape, sym=True, act_order=True)
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq", "--fold-act-order")
    assert (document["folded"], document["not_folded"]) == ([down], [])
    assert document["tensors_equal"] == document["tensors_compared"]
    convert(tmp_path / "out", "-o", tmp_path / "fp16", "--to", "fp16")
    made = {name: array.astype(np.float64) for name, array in read_checkpoint(tmp_path / "fp16").items()}
    before = {name: layers[name].weight().astype(np.float16).astype(np.float64) for name in (down, up, gate)}
    x = np.random.default_rng(0).integers(-4, 5, (3, layers[up].codes.shape[1])).astype(np.float64)

    def mlp(weights: dict[str, Any], suffix: str) -> Any:
        g, u, d = (weights[name + suffix] for name in (gate, up, down))
        return (np.maximum(x @ g.T, 0) * (x @ u.T)) @ d.T

    # float64 sums of the same products in another order
    np.testing.assert_allclose(mlp(made, ".weight"), mlp(before, ""), rtol=1e-12, atol=1e-12)


def test_requant_rounds_only_what_has_no_lossless_form_and_says_how_far_it_is_off(
    tmp_path: Path, convert: Convert
) -> None:
    layers = random_layers(sym=True)
    odd = "model.layers.1.self_attn.o_proj"
    layers[odd] = random_layer(1, *layers[odd].codes.shape, sym=True, act_order=True)
    source = make_checkpoint(tmp_path / "source", layers, "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", "awq", "--requant")
    report = document["requantized"]
    assert (report["modules"], [entry["module"] for entry in report["worst"]]) == (1, [odd])
    convert(tmp_path / "out", "-o", tmp_path / "fp16", "--to", "fp16")
    made = read_checkpoint(tmp_path / "fp16")
    for name, layer in layers.items():
        off = np.abs(made[f"{name}.weight"].astype(np.float64) - layer.weight().astype(np.float16)).max()
        if name == odd:
            # the report is of float32 weights, these were rounded to float16 (half a unit in eleven bits)
            assert off == pytest.approx(report["worst"][0]["max"], abs=float(np.abs(layer.weight()).max()) * 2**-10)
            assert off > 0
        else:
            assert off == 0


def test_requant_into_larger_groups_changes_all_linears(tmp_path: Path, convert: Convert) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(sym=True), "gptq")
    document = convert(source, "-o", tmp_path / "out", "--to", "gptq", "--requant", "--group-size", "64")
    assert (document["group_size"], document["requantized"]["modules"]) == (64, 14)
    assert document["tensors_equal"] == document["tensors_compared"] == 14 * 4 + 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["group_size"], config["sym"], config["bits"]) == (64, True, 4)
    wide = convert(source, "-o", tmp_path / "no", "--to", "gptq", "--requant", "--group-size", "128", code=4)
    assert "group_size 128 does not divide its in_features 64" in wide["refused"][0]["reason"]


def test_into_gguf_and_back_keeps_every_weight(tmp_path: Path, convert: Convert, quantize: Any, tiny: Any) -> None:
    first = tmp_path / "first"
    assert quantize(tiny("llama"), first, "--method", "rtn").exit_code == 0
    document = convert(first, "-o", tmp_path / "gguf", "--to", "gguf")
    assert document["gguf_types"]["Q4_0"] == 14
    convert(tmp_path / "gguf" / "model.gguf", "-o", tmp_path / "back", "--to", "gptq")
    ours, theirs = read_checkpoint(tmp_path / "back"), read_checkpoint(first)
    packed = [name for name in theirs if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert len(packed) == 14 * 4
    for name in packed:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


# --- what it needs


def test_converting_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", random_layers(), "gptq")
    script = (
        "import sys\n"
        f"sys.argv = ['edgetool', 'convert', {str(source)!r}, '-o', {str(tmp_path / 'out')!r}, '--to', 'awq', '-q']\n"
        "from edgetool.__main__ import main\n"
        "try:\n    main()\nfinally:\n"
        "    print('HEAVY', [name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in result.stdout, result.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_linked_cache_is_not_repaired(mislabelled: Path, tmp_path: Path, convert: Convert) -> None:
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in mislabelled.iterdir():
        (cache / path.name).symlink_to(path)
    before = (mislabelled / "config.json").read_bytes()
    document = convert("--fix-config", cache, code=4)
    assert "is a link" in document["message"]
    assert (mislabelled / "config.json").read_bytes() == before


def test_a_repair_of_an_unquantised_checkpoint_takes_a_left_over_section_away(tmp_path: Path, convert: Convert) -> None:
    layers = random_layers(layers=1)
    left_over = quantization_config_of(layers, "gptq")
    source = make_checkpoint(tmp_path / "source", layers, "fp16", quantization_config=left_over)
    document = convert("--fix-config", source)
    assert document["fixed"] == ["config.json says gptq, the tensors are plain fp16"]
    assert json.loads((source / "config.json").read_text()) == config_of(layers, "fp16")
    shutil.rmtree(source)
