"""GGUF files into checkpoints: against the model they were written from, and against transformers' own GGUF reading."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.gguf import importing as gguf_import
from edgetool.checkpoints.gguf import rope as gguf_rope
from edgetool.checkpoints.gguf.importing import import_gguf
from edgetool.errors import BadInput, MissingDependency
from edgetool.progress import RecordingProgress
from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model

Kind = gguf.GGMLQuantizationType
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama", rope_theta=50000.0)


def _import(source: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "imported"
    directory.mkdir()
    import_gguf(source, directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_comes_back_bit_for_bit(tmp_path: Path, family: str, tied: bool) -> None:
    original = make_tiny_model(
        tmp_path / "original", family, tied=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    imported = _import(write_tiny_gguf(tmp_path / "m.gguf", original, pre=PRE[family]), tmp_path)
    before, after = load_file(original / "model.safetensors"), load_file(imported / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    tokens = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)(tokens).logits
        logits = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32)(tokens).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights_out_of_the_gguf_file(tmp_path: Path, family: str) -> None:
    # transformers believes every Qwen3 GGUF to have a head dimension of 128
    overrides = {"head_dim": 128} if family == "qwen3" else {}
    original = make_tiny_model(tmp_path / "original", family, tied=False, **overrides)
    source = write_tiny_gguf(tmp_path / "m.gguf", original, pre=PRE[family], kind=Kind.Q8_0)
    imported = load_file(_import(source, tmp_path) / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    for name, tensor in imported.items():
        assert torch.equal(tensor, theirs[name].half()), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_every_block_type_is_decoded_as_by_the_gguf_package(tmp_path: Path, llama: Path, kind: Kind) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama, kind=kind)
    imported = load_file(_import(source, tmp_path) / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"),
    ):
        expected = gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type).astype(np.float16)
        np.testing.assert_array_equal(imported[f"{ours}.weight"].numpy(), expected)


def test_reading_in_small_blocks_changes_nothing(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama, kind=Kind.Q8_0)
    for name, values in (("whole", 1 << 22), ("blocks", 64 * 7)):
        monkeypatch.setattr(gguf_import, "_CHUNK_VALUES", values)
        (tmp_path / name).mkdir()
        import_gguf(source, tmp_path / name)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "blocks" / path.name).read_bytes()


def test_the_configuration_says_the_same_to_transformers_4_and_5(tmp_path: Path, llama: Path) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama, metadata={"llama.rope.freq_base": 50000.0})
    config = json.loads((_import(source, tmp_path) / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["rms_norm_eps"] == 1e-6  # GGUF stores it as float32
    original = json.loads((llama / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    for key in (*sizes, "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert config[key] == original[key], key


def test_tokenizer_and_chat_template_load_in_transformers(tmp_path: Path, llama: Path) -> None:
    imported = _import(write_tiny_gguf(tmp_path / "m.gguf", llama), tmp_path)
    ours, original = AutoTokenizer.from_pretrained(imported), AutoTokenizer.from_pretrained(llama)
    chat = [{"role": "user", "content": "The lazy dog?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == original.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")
    assert ours.decode(ours("<|im_start|>the dog").input_ids, skip_special_tokens=True) == "the dog"


def test_it_opens_as_a_checkpoint_and_progress_covers_every_byte(tmp_path: Path, llama: Path) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama)
    (tmp_path / "out").mkdir()
    progress = RecordingProgress()
    facts = import_gguf(source, tmp_path / "out", progress)
    assert facts["gguf_types"] == {"F16": 15, "F32": 5}
    [total] = [value for event, _, value in progress.events if event == "start"]
    assert sum(value for event, _, value in progress.events if event == "advance") == total
    assert len(Checkpoint.open(tmp_path / "out").tensors) == 20


def test_llama_3s_scaled_rotation_is_imported_by_its_parameters(tmp_path: Path) -> None:
    scaled = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **scaled}
    original = make_tiny_model(tmp_path / "original", "llama", tied=False, rope_parameters=rope)
    divisors = gguf_rope.divisors(scaled, 500000.0, 16)
    source = write_tiny_gguf(tmp_path / "m.gguf", original, tensors={gguf_rope.TENSOR: divisors})
    imported = _import(source, tmp_path)
    config = json.loads((imported / "config.json").read_text())
    assert (config["rope_parameters"], config["rope_scaling"]) == (rope, {"rope_type": "llama3", **scaled})
    tokens = torch.arange(3, 300).reshape(1, -1)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
            for model in (original, imported)
        ]
    assert torch.equal(*logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"metadata": {"general.architecture": "mamba"}}, "architecture 'mamba' cannot be imported"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "MoE"),
    "rope scaling": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope scaling \(yarn"),
    "rope table": ({"tensors": {"rope_freqs.weight": np.arange(1, 9)}}, "rope_freqs"),
    "no block count": ({"metadata": {"llama.block_count": None}}, r"llama\.block_count is missing"),
    "tensor missing": ({"tensors": {"blk.1.attn_q.weight": None}}, r"'blk\.1\.attn_q\.weight' is missing"),
    "embedding missing": ({"tensors": {"token_embd.weight": None}}, r"'token_embd\.weight' is missing"),
    "tensor of another model": (
        {"tensors": {"blk.0.ssm_a.weight": np.ones((64, 64))}},
        r"does not have: blk\.0\.ssm_a",
    ),
    "wrong shape": ({"tensors": {"blk.0.attn_k.weight": np.ones((64, 64))}}, r"'blk\.0\.attn_k\.weight' has shape"),
    "beyond fp16": ({"tensors": {"output_norm.weight": np.full(64, 7e4)}}, r"'output_norm\.weight': holds 70000"),
    "infinite": ({"tensors": {"output_norm.weight": np.full(64, np.inf)}}, r"'output_norm\.weight': holds inf"),
    "not a number": ({"tensors": {"output_norm.weight": np.full(64, np.nan)}}, r"'output_norm\.weight': holds nan"),
    "sentencepiece": ({"metadata": {"tokenizer.ggml.model": "llama"}}, "tokenizer of kind 'llama'"),
    "pre-tokenizer": ({"pre": "dbrx"}, "pre-tokenizer 'dbrx' is not known; known are gpt-2, smollm, qwen2"),
    "merges": ({"metadata": {"tokenizer.ggml.merges": ["a zzz"]}}, "merge 'a zzz'"),
    "token types": ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, "2 token types"),
    "special token": ({"metadata": {"tokenizer.ggml.eos_token_id": 99999}}, "eos_token_id is 99999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_faithfully_is_refused_by_name(tmp_path: Path, llama: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    source = write_tiny_gguf(tmp_path / "model.gguf", llama, **arguments)
    with pytest.raises(BadInput, match=message) as caught:
        _import(source, tmp_path)
    assert str(source) in caught.value.message


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 5000, -20_000, -1])
def test_a_cut_off_file_is_refused(tmp_path: Path, llama: Path, kept: int) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama)
    source.write_bytes(source.read_bytes()[:kept])
    with pytest.raises(BadInput, match=str(source)):
        _import(source, tmp_path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(BadInput, match="not a GGUF file"):
        _import(tmp_path / "m.gguf", tmp_path)


def test_without_the_gguf_package_the_command_to_install_it_is_given(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency) as caught:
        _import(source, tmp_path)
    assert caught.value.hint == "pip install 'edgetool[demo]'"
