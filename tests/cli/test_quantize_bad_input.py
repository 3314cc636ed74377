"""What `edgetool quantize` refuses: one clear error, the contract's exit code, and nothing at the output's place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Quantize = Callable[..., Any]
Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy to damage, in one file."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy to damage, in three shards."""
    return Path(shutil.copytree(tiny("llama", shards=3), tmp_path / "model"))


def refused(result: Any, code: int, kind: str, *words: str) -> dict[str, Any]:
    """Check the form of a refusal: exit code, exactly one document, one line of words on stderr, no traceback."""
    assert result.exit_code == code, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert list(document) == ["schema", "ok", "type", "message", "hint", "exit_code"]
    assert (document["schema"], document["ok"]) == ("edgetool.quantize/1", False)
    assert (document["type"], document["exit_code"]) == (kind, code)
    said = f"{document['message']} {document['hint']}"
    for word in words:
        assert word in said, said
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return document


def nothing_left(output: Path) -> None:
    """Neither the output nor a partial directory nor a lock."""
    names = [path.name for path in output.parent.iterdir()] if output.parent.is_dir() else []
    assert [name for name in names if "out" in name] == []


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | changes))


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def first_becomes(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


# --- damaged checkpoints


def missing_shard(model: Path) -> str:
    (model / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors"


def truncated_shard(model: Path) -> str:
    path = model / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def empty_shard(model: Path) -> str:
    (model / "model-00001-of-00003.safetensors").write_bytes(b"")
    return "model-00001-of-00003.safetensors"


def absent_tensor(model: Path) -> str:
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(document))
    return "model.layers.9.mlp.up_proj.weight"


def index_is_no_json(model: Path) -> str:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "model.safetensors.index.json"


def no_config(model: Path) -> str:
    (model / "config.json").unlink()
    return "config.json"


def config_is_no_json(model: Path) -> str:
    (model / "config.json").write_text("{")
    return "config.json"


def no_tokenizer(model: Path) -> str:
    for path in model.glob("tokenizer*"):
        path.unlink()
    return "no tokenizer"


def tokenizer_is_no_json(model: Path) -> str:
    (model / "tokenizer.json").write_text("{")
    return "tokenizer"


def unknown_architecture(model: Path) -> str:
    edit_json(model / "config.json", model_type="mamba")
    return "mamba"


def no_architecture(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    return "model_type"


def more_layers_than_tensors(model: Path) -> str:
    edit_json(model / "config.json", num_hidden_layers=3)
    return "promises 3 layers, and there is no tensor of model.layers.2"


def another_vocabulary(model: Path) -> str:
    edit_json(model / "config.json", vocab_size=600)
    return "model.embed_tokens.weight has shape [512, 64], config.json asks for [600, 64]"


def heads_that_do_not_divide(model: Path) -> str:
    edit_json(model / "config.json", num_attention_heads=3)
    return "is not a multiple of the number of attention heads (3)"


def no_heads(model: Path) -> str:
    edit_json(model / "config.json", num_attention_heads=0)
    return "config.json: transformers cannot use it: ZeroDivisionError"


def a_text_where_a_number_belongs(model: Path) -> str:
    edit_json(model / "config.json", rms_norm_eps="small")
    return "'rms_norm_eps' expected float, got str (value: 'small')"


def a_norm_less_in_the_last_layer(model: Path) -> str:
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        tensors.pop("model.layers.1.post_attention_layernorm.weight", None)
        save_file(tensors, path, metadata={"format": "pt"})
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.layers.1.post_attention_layernorm.weight"]
    index.write_text(json.dumps(document))
    return "tensor model.layers.1.post_attention_layernorm.weight is missing"


def biases_that_are_not_there(model: Path) -> str:
    edit_json(model / "config.json", attention_bias=True)
    return "tensor model.layers.0.self_attn.q_proj.bias is missing"


def no_key_heads(model: Path) -> str:
    edit_json(model / "config.json", num_key_value_heads=0)
    return "config.json: transformers cannot use it: ZeroDivisionError"


def an_unknown_activation(model: Path) -> str:
    edit_json(model / "config.json", hidden_act="tanhish")
    return "config.json: transformers cannot use it: KeyError 'tanhish'"


def an_unknown_dtype(model: Path) -> str:
    edit_json(model / "config.json", dtype="float17")
    return "config.json: transformers cannot use it"


def only_pickled(model: Path) -> str:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return "save_pretrained"


@pytest.mark.parametrize(
    "damage",
    [
        missing_shard,
        truncated_shard,
        empty_shard,
        absent_tensor,
        index_is_no_json,
        no_config,
        config_is_no_json,
        no_tokenizer,
        tokenizer_is_no_json,
        unknown_architecture,
        no_architecture,
        more_layers_than_tensors,
        another_vocabulary,
        heads_that_do_not_divide,
        no_heads,
        a_text_where_a_number_belongs,
        an_unknown_dtype,
        a_norm_less_in_the_last_layer,
        biases_that_are_not_there,
        no_key_heads,
        an_unknown_activation,
        only_pickled,
    ],
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_damaged_checkpoint_is_refused_naming_what_is_wrong(
    quantize: Quantize, sharded: Path, damage: Callable[[Path], str], method: str
) -> None:
    output = sharded.parent / "out"
    named = damage(sharded)
    refused(quantize(sharded, output, "--method", method), 4, "BadInput", named)
    nothing_left(output)
    refused(quantize(sharded, output, "--method", method, "--dry-run"), 4, "BadInput", named)


def test_layers_that_config_json_does_not_count_are_not_left_alone_in_silence(quantize: Quantize, model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=1)
    result = quantize(model, model.parent / "out")
    assert result.exit_code == 0, result.stderr
    assert "the tensors of layer 1 and 0 more were copied as they are" in json.loads(result.stdout)["warnings"][0]


def test_a_bias_that_the_config_knows_nothing_of_is_refused_unless_it_is_zero(quantize: Quantize, model: Path) -> None:
    path = model / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.bias"
    for value in (1.0, 0.0):
        save_file({**load_file(path), name: torch.full((128,), value).half()}, path, metadata={"format": "pt"})
        result = quantize(model, model.parent / "out")
        if value:
            refused(result, 4, "BadInput", f"{name} is stored, and config.json asks for none")
        else:
            assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize(("method", "value"), [("gptq", float("nan")), ("awq", float("-inf")), ("rtn", float("nan"))])
def test_nan_and_infinite_weights_are_found_before_any_work(
    quantize: Quantize, model: Path, tensor: str, method: str, value: float
) -> None:
    output = model.parent / "out"
    edit_tensor(model, tensor, first_becomes(value))
    result = quantize(model, output, "--method", method)
    refused(result, 4, "BadInput", tensor, "NaN")
    assert "quantise:" not in result.stderr
    nothing_left(output)


def test_weights_that_do_not_fit_the_stored_dtype_are_found_before_any_work(quantize: Quantize, model: Path) -> None:
    output = model.parent / "out"
    edit_tensor(model, "model.embed_tokens.weight", lambda tensor: first_becomes(1e5)(tensor.float()))
    result = quantize(model, output)
    refused(result, 4, "BadInput", "model.embed_tokens.weight", "100000", "float16", "bfloat16")
    assert "quantise:" not in result.stderr
    nothing_left(output)
    edit_json(model / "config.json", dtype="bfloat16")  # what the hint says
    assert quantize(model, output).exit_code == 0


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "qwen3_moe", "num_experts": 128},
        {"model_type": "deepseek_v3", "n_routed_experts": 256},
    ],
)
def test_mixture_of_experts_models_are_refused_by_name(quantize: Quantize, model: Path, config: dict[str, Any]) -> None:
    edit_json(model / "config.json", **config)
    refused(quantize(model, model.parent / "out"), 4, "BadInput", "mixture-of-experts", config["model_type"])
    nothing_left(model.parent / "out")


@pytest.mark.parametrize("format_name", ["gptq", "awq", "compressed-tensors"])
def test_a_model_that_is_quantised_already_is_refused(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    assert quantize(tiny("llama"), tmp_path / "first", "--method", "rtn", "--format", format_name).exit_code == 0
    refused(quantize(tmp_path / "first", tmp_path / "out"), 4, "BadInput", "quantised already", "4 bits", "group 32")
    nothing_left(tmp_path / "out")
    # the tensors decide, not the config, and the other way round
    edit_json(tmp_path / "first" / "config.json", quantization_config=None)
    refused(quantize(tmp_path / "first", tmp_path / "out"), 4, "BadInput", "quantised already")


def test_a_quantisation_that_only_the_config_tells_of_is_refused(quantize: Quantize, model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(quantize(model, model.parent / "out"), 4, "BadInput", "quantised already", "bitsandbytes")


def test_a_model_that_is_not_there_is_refused(quantize: Quantize, tmp_path: Path) -> None:
    refused(quantize(tmp_path / "nowhere", tmp_path / "out"), 4, "BadInput", "nowhere")
    refused(quantize("someone/some-model", tmp_path / "out"), 4, "BadInput", "hf:someone/some-model")
    nothing_left(tmp_path / "out")


# --- options that the model or the format cannot do


@pytest.mark.parametrize(
    ("hidden", "asked", "fitting"), [(96, "64", "use --group-size 32"), (64, "128", "use --group-size 64 or 32")]
)
def test_a_group_that_does_not_divide_names_the_width_and_the_sizes_that_fit(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, hidden: int, asked: str, fitting: str
) -> None:
    model = tiny("llama", hidden_size=hidden)
    for more in ((), ("--dry-run",)):
        result = quantize(model, tmp_path / "out", "--group-size", asked, *more)
        document = refused(result, 4, "BadInput", f"group_size {asked}", f"in_features {hidden}", "q_proj")
        assert document["hint"] == fitting
        nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--format", "awq", "--bits", "8"), 3, ("awq", "4-bit")),
        (("--format", "awq", "--desc-act"), 3, ("desc_act",)),
        (("--method", "rtn", "--desc-act"), 3, ("desc_act", "rtn")),
        (("--bits", "5"), 3, ("bits", "2, 3, 4 or 8")),
        (("--group-size", "48"), 3, ("group_size", "-1, 32, 64 or 128")),
        (("--group-size", "0"), 3, ("group_size",)),
        (("--calib-samples", "0"), 3, ("calib_samples",)),
        (("--damp", "0"), 3, ("damp",)),
        (("--seed", "-1"), 3, ("seed",)),
        (("--device", "tpu"), 3, ("device",)),
        (("--method", "magic"), 3, ("method", "gptq, awq or rtn")),
        (("--max-shard-size", "huge"), 3, ("max_shard_size_bytes",)),
    ],
    ids=lambda value: "".join(value) if isinstance(value, tuple) else None,
)
def test_options_that_cannot_be_used_are_refused(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, options: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    refused(quantize(tiny("llama"), tmp_path / "out", *options), code, "ConfigError", *words)
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("format_name", ["awq", "compressed-tensors"])
def test_a_quantised_lm_head_is_refused_where_the_format_cannot_hold_it(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    result = quantize(tiny("llama"), tmp_path / "out", "--quantize-lm-head", "--format", format_name)
    refused(result, 4, "BadInput", "lm_head", "--format gptq")
    nothing_left(tmp_path / "out")


# --- calibration


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


CALIBRATION = {
    "missing": ("nowhere.txt", None, (), ("nowhere.txt", "does not exist")),
    "empty": ("empty.txt", b"", (), ("empty.txt", "is empty")),
    "blank": ("blank.txt", b" \n\n\n \n", (), ("blank.txt", "0 tokens")),
    "empty list": ("empty.json", b"[]", (), ("empty.json", "0 tokens")),
    "too short": ("short.txt", b"only a few words", (), ("short.txt", "4 samples of 32 need 128")),
    "not UTF-8": ("latin.txt", "Größe ".encode("latin-1") * 900, (), ("latin.txt", "not UTF-8", "byte 2")),
    "binary": ("binary.jsonl", bytes(range(256)), (), ("binary.jsonl",)),
    "not JSON": ("broken.jsonl", b'{"text": "a"}\n{"text": ', (), ("broken.jsonl", "line 2")),
    "no list": ("object.json", b'{"text": "a"}', (), ("object.json", "list")),
    "column missing": ("chat.jsonl", b'{"text": "a"}\n', ("--calib-column", "body"), ("'body'", "'text'")),
    "no usual column": ("odd.jsonl", b'{"body": "a"}\n', (), ("'body'", "--calib-column")),
    "column missing in csv": ("t.csv", b"a,b\n1,2\n", ("--calib-column", "text"), ("'text'", "'a', 'b'")),
    "column without text": ("number.jsonl", b'{"text": 5}\n', ("--calib-column", "text"), ("'text'", "no text")),
    "records of nothing": ("numbers.jsonl", b"1\n2\n", (), ("record 1",)),
    "unknown ending": ("text.docx", b"abc", (), (".docx", ".jsonl")),
    "not parquet": ("t.parquet", b"PAR1 not really", (), ("t.parquet",)),
    "a directory": (".", None, (), ("does not exist",)),
}


@pytest.mark.parametrize(("name", "content", "options", "words"), CALIBRATION.values(), ids=list(CALIBRATION))
def test_a_calibration_file_that_cannot_be_used_is_refused(
    quantize: Quantize,
    tiny: Tiny,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "texts" / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    result = quantize(tiny("llama"), tmp_path / "out", "--calib", str(path), *options)
    refused(result, 4, "BadInput", *words)
    nothing_left(tmp_path / "out")


def test_a_hub_calibration_set_without_a_network_says_what_else_there_is(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    result = quantize(tiny("llama"), tmp_path / "out", "--calib", "hf:someone/texts", "--offline")
    refused(result, 6, "ResourceUnavailable", "someone/texts", "--calib builtin")
    nothing_left(tmp_path / "out")


def test_a_failed_run_is_not_in_the_way_of_the_next(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", b"too short")
    assert quantize(tiny("llama"), tmp_path / "out", "--calib", str(short)).exit_code == 4
    assert quantize(tiny("llama"), tmp_path / "out").exit_code == 0


# --- the output's place


def test_an_existing_output_is_refused_and_stays_as_it_was(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    refused(quantize(tiny("llama"), output), 4, "BadInput", "exists already", "--overwrite")
    refused(quantize(tiny("llama"), output, "--resume"), 4, "BadInput", "exists already", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "precious").read_text() == "mine"


def test_an_existing_output_is_refused_before_the_model_is_looked_at(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(quantize("hf:someone/very-large-model", tmp_path / "out", "--offline"), 4, "BadInput", "exists already")


def test_an_output_that_is_a_file_or_lies_below_one_is_refused(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    write(tmp_path / "file", b"mine")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        for option in ((), ("--overwrite",), ("--resume",), ("--dry-run",)):
            refused(quantize(tiny("llama"), output, *option), 4, "BadInput", "file", "--output")
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_directory_without_permission_is_refused(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    refused(quantize(tiny("llama"), closed / "out"), 4, "BadInput", "permission")


def test_an_output_on_a_file_system_that_is_read_only_is_refused(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    refused(quantize(tiny("llama"), tmp_path / "new" / "out"), 4, "BadInput", "Read-only file system", "--output")


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",), ("--dry-run",)], ids="".join)
@pytest.mark.parametrize("place", ["the model", "inside the model", "around the model", "a link to the model"])
def test_an_output_that_touches_the_model_is_refused_and_the_model_stays_whole(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, place: str, option: tuple[str, ...]
) -> None:
    parent = tmp_path / "parent"
    model = Path(shutil.copytree(tiny("llama"), parent / "model"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    output = {"the model": model, "inside the model": model / "out", "around the model": parent}.get(place)
    if output is None:
        (tmp_path / "link").symlink_to(parent)
        output = tmp_path / "link" / "model" / "out"
    refused(quantize(model, output, *option), 4, "BadInput")
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in parent.iterdir()] == ["model"]


def test_a_model_in_the_place_of_the_unfinished_output_is_not_deleted(
    quantize: Quantize, tiny: Tiny, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "out.partial"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    refused(quantize(model, tmp_path / "out", "--overwrite"), 4, "BadInput", "must not lie in one another")
    refused(quantize(model, tmp_path / "out", "--resume"), 4, "BadInput", "must not lie in one another")
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_overwriting_refuses_a_directory_of_other_work(quantize: Quantize, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out" / "src").mkdir(parents=True)
    refused(quantize(tiny("llama"), tmp_path / "out", "--overwrite"), 4, "BadInput", "not written by edgetool")
    assert (tmp_path / "out" / "src").is_dir()


# --- what the machine does not have


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_exits_6(quantize: Quantize, tiny: Tiny, tmp_path: Path, device: str) -> None:
    result = quantize(tiny("llama"), tmp_path / "out", "--device", device)
    refused(result, 6, "ResourceUnavailable", device, "--device cpu")
    nothing_left(tmp_path / "out")


CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB.\nsecond line"


@pytest.mark.parametrize(
    ("where", "error", "kept"),
    [
        ("engine.solve_gptq", torch.OutOfMemoryError(CUDA_SAYS), False),
        ("engine.Moments", torch.OutOfMemoryError(CUDA_SAYS), False),
        ("audit.smoke", torch.OutOfMemoryError(CUDA_SAYS), True),
        ("engine.solve_gptq", MemoryError(), False),
        ("audit.audit", MemoryError(), True),
    ],
    ids=["solving", "statistics", "trying-the-result", "host-memory", "host-memory-later"],
)
def test_running_out_of_memory_exits_6_and_says_what_to_do(
    quantize: Quantize,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
    kept: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"edgetool.quantizers.{where}", fail)
        document = refused(quantize(tiny("llama"), tmp_path / "out"), 6, "ResourceUnavailable", "out of memory")
    assert "second line" not in document["message"]
    assert "--calib-samples" in document["hint"]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == kept
    assert quantize(tiny("llama"), tmp_path / "out", "--resume").exit_code == 0


def test_memory_that_cannot_suffice_is_refused_before_starting(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Little:
        available = 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    for option in ((), ("--dry-run",)):
        refused(quantize(tiny("llama"), tmp_path / "out", *option), 6, "ResourceUnavailable", "1.0 MB are free")
        nothing_left(tmp_path / "out")


def test_a_disk_that_cannot_suffice_is_refused_before_starting(
    quantize: Quantize, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    for option in ((), ("--dry-run",)):
        refused(quantize(tiny("llama"), tmp_path / "out", *option), 6, "ResourceUnavailable", "1.0 kB free", "--output")
        nothing_left(tmp_path / "out")


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_torch_or_transformers_it_exits_5_and_names_the_extra(tiny: Tiny, tmp_path: Path, package: str) -> None:
    """In a process where the package cannot be imported, as on a machine that has the core alone."""
    program = f"import sys; sys.modules[{package!r}] = None; from edgetool.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 5, result.stderr
    document = json.loads(result.stdout)
    assert (document["ok"], document["type"], document["exit_code"]) == (False, "MissingDependency", 5)
    assert package in document["message"]
    assert document["hint"] == "pip install 'edgetool[quant]'"
    assert "Traceback" not in result.stderr
    nothing_left(tmp_path / "out")
