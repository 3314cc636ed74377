"""`edgetool quantize` from the command line on tiny models of every family: what it prints and what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.parity.scalar_layouts import awq_weight, compressed_weight, gptq_weight
from tests.parity.scalar_layouts import whole as every_weight

Quantize = Callable[..., Any]
Tiny = Callable[..., Path]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl"]
PACKED = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
LAYERS, LINEARS = 2, 7
KEYS = {
    "schema",
    "ok",
    "output",
    "method",
    "format",
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "quantized_modules",
    "seconds",
    "peak_rss_bytes",
    "output_bytes",
}  # from the issue, by hand


def succeeded(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["ok"] is True
    return document


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def is_packed(name: str) -> bool:
    return name.rpartition(".")[2] in PACKED


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(torch.int16), right.view(torch.int16))


def config_of(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return document


@pytest.mark.parametrize("format_name", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_method_and_format_gives_a_checkpoint(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, family: str, method: str, format_name: str
) -> None:
    model, output = tiny(family), tmp_path / "out"
    document = succeeded(quantize(model, output, "--method", method, "--format", format_name))
    assert set(document) >= KEYS
    assert document["schema"] == "edgetool.quantize/1"
    assert (document["method"], document["format"], document["bits"]) == (method, format_name, 4)
    assert (document["group_size"], document["sym"], document["desc_act"]) == (32, method != "awq", False)
    assert document["quantized_modules"] == LAYERS * LINEARS
    assert document["output"] == str(output)
    assert document["output_bytes"] == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert document["seconds"] > 0 and document["peak_rss_bytes"] > 50e6
    assert config_of(output)["quantization_config"]["quant_method"] == format_name

    before, after = tensors_of(model), tensors_of(output)
    modules = {name.rpartition(".")[0] for name in after if is_packed(name)}
    assert len(modules) == LAYERS * LINEARS
    assert all(".layers." in module and "visual" not in module for module in modules)
    others = {name for name in after if not is_packed(name)}
    assert others == {name for name in before if name.removesuffix(".weight") not in modules}
    changed = {name for name in others if not same_bits(before[name], after[name])}
    if method == "awq":  # what AWQ folds its scales into; everything else as it was
        assert all(re.search(r"\.layers\.\d+\.(input_layernorm|post_attention|self_attn\.v)", name) for name in changed)
    else:
        assert changed == set()


@pytest.mark.parametrize("bits", ["2", "3", "4", "8"])
@pytest.mark.parametrize("sym", ["--sym", "--asym"])
@pytest.mark.parametrize("group_size", ["32", "64", "-1"])
def test_bits_groups_and_zero_points_are_what_the_tensors_hold(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, bits: str, sym: str, group_size: str
) -> None:
    output = tmp_path / "out"
    options = ("--bits", bits, sym, "--group-size", group_size, "--method", "rtn")
    document = succeeded(quantize(tiny("llama"), output, *options))
    assert (document["bits"], document["group_size"]) == (int(bits), int(group_size))
    assert document["sym"] is (sym == "--sym")
    claim = config_of(output)["quantization_config"]
    assert (claim["bits"], claim["group_size"], claim["sym"]) == (int(bits), int(group_size), sym == "--sym")
    assert json.loads((output / "quantize_config.json").read_text()) == claim
    tensors = tensors_of(output)
    down = "model.layers.1.mlp.down_proj"  # 128 -> 64
    groups = {"32": 4, "64": 2, "-1": 1}[group_size]
    assert tensors[f"{down}.qweight"].shape == (128 * int(bits) // 32, 64)
    assert tensors[f"{down}.scales"].shape == (groups, 64)
    assert tensors[f"{down}.scales"].dtype == torch.float16
    assert tensors[f"{down}.qzeros"].shape == (groups, 64 * int(bits) // 32)
    inspected = json.loads(CliRunner().invoke(_app(), ["inspect", str(output), "--json"]).stdout)
    found = inspected["quantization"]
    assert (found["bits"], found["group_size"], found["sym"]) == (int(bits), int(group_size), sym == "--sym")
    assert inspected["problems"] == []


def _app() -> Any:
    from edgetool.cli import app

    return app


def test_a_true_activation_order_is_stored_and_the_default_is_trivial(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    succeeded(quantize(tiny("llama"), tmp_path / "plain"))
    assert succeeded(quantize(tiny("llama"), tmp_path / "ordered", "--desc-act"))["desc_act"] is True
    name = "model.layers.0.mlp.down_proj.g_idx"
    trivial = torch.arange(128, dtype=torch.int32) // 32
    assert torch.equal(tensors_of(tmp_path / "plain")[name], trivial)
    ordered = tensors_of(tmp_path / "ordered")[name]
    assert not torch.equal(ordered, trivial) and torch.equal(ordered.sort().values, trivial)
    assert config_of(tmp_path / "ordered")["quantization_config"]["desc_act"] is True


def test_all_formats_hold_the_same_weights_near_the_original(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    """Read back by the scalar definitions of the formats; with plain rounding each weight is off by half a step."""
    readers: dict[str, Callable[[dict[str, Any], int, int], Any]] = {
        "gptq": lambda t, o, i: gptq_weight(t, 4, 1, o, i),
        "awq": lambda t, o, i: awq_weight(t, 32, o, i),
        "compressed-tensors": lambda t, o, i: compressed_weight(t, 4, 32, o, i),
    }
    module = "model.layers.1.self_attn.k_proj"
    original = tensors_of(tiny("llama"))[f"{module}.weight"].float().numpy()
    found = {}
    for name, weight in readers.items():
        succeeded(
            quantize(tiny("llama"), tmp_path / name, "--method", "rtn", "--format", name, "--scale-search", "minmax")
        )
        tensors = load_numpy(tmp_path / name / "model.safetensors")
        parts = {
            key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")
        }
        found[name] = every_weight(lambda o, i, t=parts, w=weight: w(t, o, i), *original.shape)
    assert np.array_equal(found["gptq"], found["awq"]) and np.array_equal(found["gptq"], found["compressed-tensors"])
    largest = np.abs(original.reshape(32, 2, 32)).max(2)
    # A symmetric grid of 16 codes reaches -8 or +7 steps: a step is at most largest / 7, an error at most one step
    # (the end that has no code) and a little for the scale's rounding to fp16.
    assert (np.abs(found["gptq"] - original).reshape(32, 2, 32) <= (largest / 7 * 1.01)[:, :, None]).all()
    assert np.abs(found["gptq"] - original).mean() < (largest / 7).mean() / 2


def test_the_error_falls_with_every_bit(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    errors = []
    for bits in ("2", "3", "4", "8"):
        output = tmp_path / bits
        succeeded(quantize(tiny("llama"), output, "--bits", bits))
        modules = json.loads((output / "edgetool.json").read_text())["modules"]
        errors.append(max(module["relative_error"] for module in modules))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1 and errors[-1] < 0.01


# --- edgetool.json


def test_the_manifest_tells_what_went_in_what_was_done_and_what_was_checked(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    model, output = tiny("llama", shards=3), tmp_path / "out"
    document = succeeded(quantize(model, output, "--seed", "7", "--damp", "0.02"))
    manifest = json.loads((output / "edgetool.json").read_text())
    assert manifest["schema"] == "edgetool.quantize-record/1"
    assert manifest["source"]["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in model.iterdir()
        if path.name != "model.safetensors.index.json"
    }
    assert manifest["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")
    }
    assert manifest["source"]["spec"] == str(model)
    assert manifest["seed"] == 7
    config = manifest["config"]
    assert (config["model"], config["output"], config["damp"]) == (str(model), str(output), 0.02)
    assert (config["calib_samples"], config["calib_seqlen"], config["calib"]) == (4, 32, "builtin")
    assert {"edgetool", "python", "torch", "transformers", "numpy"} <= set(manifest["tools"])
    assert manifest["tools"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["calibration"]["samples"] == 4 and manifest["calibration"]["seqlen"] == 32
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["calibration"]["sha256_of_token_ids"])
    assert manifest["verified"]["quantized_modules"] == LAYERS * LINEARS
    assert manifest["verified"]["tensors"] == len(tensors_of(output))
    assert len(manifest["modules"]) == LAYERS * LINEARS
    assert {"module", "method", "relative_error"} <= set(manifest["modules"][0])
    result = manifest["result"]
    assert {key: result[key] for key in ("seconds", "peak_rss_bytes", "output_bytes")} == {
        key: document[key] for key in ("seconds", "peak_rss_bytes", "output_bytes")
    }


def test_the_five_worst_modules_are_reported_worst_first(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    worst = succeeded(quantize(tiny("llama"), tmp_path / "out"))["worst_modules"]
    modules = json.loads((tmp_path / "out" / "edgetool.json").read_text())["modules"]
    expected = sorted((module["relative_error"] for module in modules), reverse=True)[:5]
    assert [module["relative_error"] for module in worst] == expected


def test_without_json_a_table_names_the_worst_modules_and_the_answer(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--group-size", "32", "--method", "rtn"]
    result = CliRunner().invoke(_app(), [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    for word in ("quantised", "largest errors", "_proj  ", "asked: What is the capital"):
        assert word in result.stdout
    assert "quantise: done" in result.stderr and "verify: done" in result.stderr


# --- what goes along


@pytest.mark.parametrize("format_name", ["gptq", "awq", "compressed-tensors"])
def test_side_files_are_carried_over_and_nothing_else(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    model, output = Path(shutil.copytree(tiny("llama"), tmp_path / "model")), tmp_path / "out"
    (model / "README.md").write_text("about the model\n")
    (model / "LICENSE").write_text("its licence\n")
    (model / "preprocessor_config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    (model / ".git").mkdir()
    succeeded(quantize(model, output, "--format", format_name))
    sides = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    sides |= {"README.md", "LICENSE", "preprocessor_config.json"}
    for name in sides:
        assert (output / name).read_bytes() == (model / name).read_bytes(), name
    written = {"config.json", "edgetool.json", "model.safetensors"}
    extra = {path.name for path in output.iterdir()} - sides - written
    assert extra == ({"quantize_config.json"} if format_name == "gptq" else set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert oct((output / "model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_quantised_is_stored_in_16_bit(quantize: Quantize, tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    model, output = tiny("llama", dtype=dtype), tmp_path / "out"
    succeeded(quantize(model, output))
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    before = tensors_of(model)
    for name, tensor in tensors_of(output).items():
        if not is_packed(name):
            assert same_bits(tensor, before[name].to(stored)), name
    assert config_of(output)["dtype"] == str(stored).removeprefix("torch.")
    assert config_of(output)["torch_dtype"] == config_of(output)["dtype"]


def test_tied_embeddings_stay_tied_and_an_lm_head_of_its_own_stays_16_bit(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    succeeded(quantize(tiny("llama"), tmp_path / "tied"))
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    assert config_of(tmp_path / "tied")["tie_word_embeddings"] is True
    succeeded(quantize(tiny("llama", tied=False), tmp_path / "untied"))
    before, after = tensors_of(tiny("llama", tied=False)), tensors_of(tmp_path / "untied")
    assert same_bits(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_lm_head_is_quantised_on_request(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, tied: bool, method: str
) -> None:
    model, output = tiny("llama", tied=tied), tmp_path / "out"
    document = succeeded(quantize(model, output, "--quantize-lm-head", "--method", method, "--bits", "8"))
    assert document["quantized_modules"] == LAYERS * LINEARS + 1
    config, before, after = config_of(output), tensors_of(model), load_numpy(output / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    assert "lm_head.weight" not in after
    assert same_bits(before["model.embed_tokens.weight"], torch.from_numpy(after["model.embed_tokens.weight"]))
    head = before["model.embed_tokens.weight" if tied else "lm_head.weight"].float().numpy()
    parts = {key.removeprefix("lm_head."): value for key, value in after.items() if key.startswith("lm_head.")}
    rows = every_weight(lambda o, i: gptq_weight(parts, 8, 1, o, i), 16, 64)
    # 8 bits: a step is at most largest / 127; GPTQ may shift a weight by a few steps to make up for others
    assert np.abs(rows - head[:16]).max() <= np.abs(head).max() / 127 * (4 if method == "gptq" else 1.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_vision_tower_is_copied_bit_for_bit_and_named_as_not_quantised(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, family: str, dtype: str
) -> None:
    model, output = tiny(family, dtype=dtype), tmp_path / "out"
    succeeded(quantize(model, output, "--format", "compressed-tensors"))
    before, after = tensors_of(model), tensors_of(output)
    tower = {name for name in before if "visual" in name}
    assert len(tower) > 10
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    for name in tower:
        assert same_bits(before[name].to(stored), after[name]), name
    assert {name.rpartition(".")[0] for name in after if is_packed(name)}.isdisjoint(
        name.rpartition(".")[0] for name in tower
    )
    assert any("visual" in name for name in config_of(output)["quantization_config"]["ignore"])
    assert (
        config_of(output)["vision_config"].items()
        >= {key: value for key, value in config_of(model)["vision_config"].items() if "dtype" not in key}.items()
    )


def test_shards_are_cut_at_the_given_size_and_indexed(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    succeeded(quantize(tiny("llama"), output, "--max-shard-size", "40kB"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {name: path for path in files for name in load_file(output / path)} == index["weight_map"]
    tensors = tensors_of(output)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for path in files:
        shard = load_file(output / path)
        assert len(shard) == 1 or sum(t.numel() * t.element_size() for t in shard.values()) <= 40_000
    succeeded(quantize(tiny("llama"), tmp_path / "one"))
    one = tensors_of(tmp_path / "one")
    assert tensors.keys() == one.keys() and all(torch.equal(tensors[name], one[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_config_tokenizer_and_every_tensor_that_is_not_quantised(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, family: str
) -> None:
    import transformers

    model, output = tiny(family), tmp_path / "out"
    succeeded(quantize(model, output))
    config = transformers.AutoConfig.from_pretrained(output)
    assert config.model_type == family
    assert config.quantization_config["quant_method"] == "gptq"
    text = "The quick brown fox, ä ö ü."
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (model, output)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    # Without the plug-in for quantised linears, transformers still finds everything else by name.
    del config.quantization_config
    vision = family in ("qwen2_vl", "qwen2_5_vl")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    loaded = [auto.from_pretrained(model), auto.from_pretrained(output, config=config)]
    states = [one.state_dict() for one in loaded]
    quantized = {f"{name}.weight" for name, module in loaded[0].named_modules() if _is_text_linear(name, module)}
    assert len(quantized) == LAYERS * LINEARS
    for name, tensor in states[0].items():
        assert name in quantized or torch.equal(tensor, states[1][name]), name


def _is_text_linear(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and ".layers." in name and "visual" not in name


# --- plan


def test_a_dry_run_shows_the_plan_and_writes_nothing(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "below" / "out"
    plan = succeeded(quantize(tiny("llama"), output, "--dry-run"))["plan"]
    assert list(tmp_path.iterdir()) == []
    assert (plan["bits"], plan["group_size"], plan["quantized_modules"]) == (4, 32, LAYERS * LINEARS)
    assert plan["calibration_tokens"] == 4 * 32
    assert plan["memory"]["needed_bytes"] < plan["memory"]["available_bytes"]
    assert plan["disk"]["output_bytes"] < plan["disk"]["needed_bytes"] < plan["disk"]["free_bytes"]
    assert plan["time"]["expected_s"] > 0
    for part in ("kernels", "vcu128"):
        assert plan[part] and all({"name", "ok", "why"} <= set(verdict) for verdict in plan[part])
        assert all(verdict["why"] for verdict in plan[part] if not verdict["ok"])
    assert any(verdict["ok"] for verdict in plan["kernels"])
    # what the plan says the output will weigh is what it weighs, but for headers
    written = succeeded(quantize(tiny("llama"), output))["output_bytes"]
    assert plan["disk"]["output_bytes"] == pytest.approx(written, rel=0.15)


def test_a_comparison_is_planned_for_the_device_that_would_be_used(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetool.models.devices.resolve_device", lambda _: torch.device("cpu"))
    options = ("--compare", "native,auto-gptq", "--dry-run", "--device", "auto")
    planned = succeeded(quantize(tiny("llama"), tmp_path / "out", *options))["plan"]["backends"]
    assert planned[1]["failed"].endswith("quantises on CUDA only, and the device is cpu")


def test_a_comparison_that_was_stopped_goes_on_with_what_is_finished(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETOOL_ENVS_DIRECTORY", str(tmp_path / "envs"))
    options = ("--compare", "native,gptqmodel")
    first = succeeded(quantize(tiny("llama"), tmp_path / "out", *options))["comparison"]
    manifest = (tmp_path / "out" / "native" / "edgetool.json").read_bytes()
    again = succeeded(quantize(tiny("llama"), tmp_path / "out", *options, "--resume"))["comparison"]
    assert again == first
    assert "needs the environment gptqmodel" in again[1]["failed"]  # and not that it cannot be resumed
    assert (tmp_path / "out" / "native" / "edgetool.json").read_bytes() == manifest
    other = quantize(tiny("llama"), tmp_path / "out", *options, "--resume", "--bits", "8")
    assert (other.exit_code, json.loads(other.stdout)["type"]) == (4, "BadInput")


def test_a_dry_run_tells_which_kernels_a_recipe_rules_out(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    def ok(*options: str) -> set[str]:
        plan = succeeded(quantize(tiny("llama", hidden_size=128), tmp_path / "out", "--dry-run", *options))["plan"]
        return {verdict["name"] for verdict in plan["kernels"] if verdict["ok"]}

    plain = ok("--group-size", "64")
    assert ok("--group-size", "64", "--asym") < plain
    assert ok("--group-size", "64", "--bits", "3") < plain
    assert ok("--group-size", "64", "--desc-act") <= plain


def test_the_plan_as_a_table_names_kernels_and_the_board(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--group-size", "32", "--dry-run"]
    result = CliRunner().invoke(_app(), arguments)
    assert result.exit_code == 0, result.stderr
    for word in ("plan (nothing was written)", "kernels", "VCU128", "memory", "disk", "time"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


# --- calibration and configuration from outside


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_calibration_files_of_every_kind_give_the_same_tokens(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    texts = [f"Text number {number} is about checkpoints, foxes and ümlauts. " * 12 for number in range(8)]
    path = tmp_path / f"texts.{kind}"
    options = ["--calib", str(path)]
    if kind == "txt":
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    elif kind == "json":
        path.write_text(json.dumps(texts))
    elif kind == "csv":
        path.write_text("body\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    else:
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet = pytest.importorskip("pyarrow.parquet")
        arrow.parquet.write_table(arrow.table({"body": texts}), path)
    if kind in ("jsonl", "csv", "parquet"):
        options += ["--calib-column", "body"]
    succeeded(quantize(tiny("llama"), tmp_path / "out", *options))
    manifest = json.loads((tmp_path / "out" / "edgetool.json").read_text())
    assert manifest["calibration"]["source"] == str(path)
    ids = _tokens(tiny("llama"), texts)
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:4]]
    digest = hashlib.sha256(chosen.numpy().astype("<i8").tobytes()).hexdigest()
    assert manifest["calibration"]["sha256_of_token_ids"] == digest


def _tokens(model: Path, texts: list[str]) -> list[int]:
    """All texts, an end-of-text token between two; as many as eight times what 4 samples of 32 need."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for text in texts:
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(text)["input_ids"]
        if len(ids) >= 8 * 4 * 32:
            break
    return ids


def test_text_sampled_from_the_model_itself_depends_on_the_seed_alone(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    def digest(name: str, *options: str) -> Any:
        succeeded(quantize(tiny("llama"), tmp_path / name, "--calib", "self", "--calib-seqlen", "8", *options))
        return json.loads((tmp_path / name / "edgetool.json").read_text())["calibration"]["sha256_of_token_ids"]

    first = digest("a")
    assert digest("b") == first
    assert digest("c", "--seed", "1") != first


def test_a_recipe_file_and_the_environment_reach_the_job(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text("[quantize]\nmethod = 'rtn'\nbits = 8\nsym = false\n")
    monkeypatch.setenv("EDGETOOL_QUANTIZE_BITS", "3")
    document = succeeded(quantize(tiny("llama"), tmp_path / "out", "--config", str(tmp_path / "recipe.toml")))
    assert (document["method"], document["bits"], document["sym"]) == ("rtn", 3, False)


def test_overwriting_replaces_what_an_earlier_run_wrote(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    succeeded(quantize(tiny("llama"), output, "--method", "rtn", "--max-shard-size", "40kB"))
    succeeded(quantize(tiny("llama"), output, "--overwrite", "--bits", "8"))
    assert config_of(output)["quantization_config"]["bits"] == 8
    assert [path.name for path in output.glob("model*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_chat_template_that_cannot_be_rendered_does_not_cost_the_run(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('only with tools') }}")
    succeeded(quantize(model, tmp_path / "out"))


def test_the_demo_command_quantises_compares_and_may_be_run_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetool.checkpoints.sources import ResolvedSource

    model = tiny("llama", layers=1)

    def resolve(spec: str, **_: Any) -> ResolvedSource:
        assert spec == "demo"
        return ResolvedSource(model, spec, {})

    monkeypatch.setattr("edgetool.checkpoints.sources.resolve", resolve)
    monkeypatch.setattr("edgetool.quantizers.demo.EVALUATION_TOKENS", 1024)
    monkeypatch.setattr("edgetool.quantizers.demo.ANSWER_TOKENS", 4)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        document = succeeded(CliRunner().invoke(_app(), ["demo", "--json", "--threads", "1"]))
        assert document["schema"] == "edgetool.demo/1"
        assert [row["model"] for row in document["comparison"]] == ["original", "quantised"]
        # an untrained model is as lost before as after
        assert document["perplexity_ratio"] == pytest.approx(1, abs=0.05)
        assert document["size_ratio"] < 1
        assert [answer["model"] for answer in document["answers"]] == ["original", "quantised"]
        assert document["output"] == "demo-out"
    assert [path.name for path in tmp_path.iterdir()] == ["demo-out"]
    (tmp_path / "mine").mkdir()
    for record in ({"result": {"model": "hf:Qwen/Qwen2.5-7B"}}, {"schema": "edgetool.eval-record/1"}, []):
        (tmp_path / "mine" / "edgetool.json").write_text(json.dumps(record))
        refused = CliRunner().invoke(_app(), ["demo", "-o", "mine", "--json"])
        assert refused.exit_code == 4 and "holds no demo" in json.loads(refused.stdout)["message"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["edgetool.json"]
    table = CliRunner().invoke(_app(), ["demo", "--threads", "1"])
    assert table.exit_code == 0
    for word in ("perplexity", "original", "quantised", "Why is the sky blue?"):
        assert word in table.stdout
