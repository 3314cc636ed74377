"""Opening whole and damaged checkpoint directories."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgetool.checkpoints.checkpoint import INDEX_NAME, Checkpoint, shard_index, write_index
from edgetool.errors import BadInput
from tests.fakes.tiny_models import make_tiny_model

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pristine"), "llama", dtype="bfloat16", shards=3)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def _change_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((model / INDEX_NAME).read_text())
    change(document["weight_map"])
    (model / INDEX_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_tensor_is_what_transformers_loads(tmp_path: Path, shards: int, dtype: str) -> None:
    path = make_tiny_model(tmp_path, "qwen2", tied=False, shards=shards, dtype=dtype)
    checkpoint = Checkpoint.open(path)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.read_float32(name), tensor.numpy())
    assert len(checkpoint.weight_files) == shards
    assert checkpoint.config == json.loads((path / "config.json").read_text())


def test_rows_are_those_of_the_stored_tensor(pristine: Path) -> None:
    checkpoint = Checkpoint.open(pristine)
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(checkpoint.read_rows(name, np.array([5, 1])), checkpoint.read(name)[[5, 1]])


def test_hashes_are_those_of_the_files(pristine: Path) -> None:
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pristine.glob("*.safetensors")}
    assert Checkpoint.open(pristine).sha256() == hashes


def test_side_files_are_all_but_weights_indexes_and_what_is_written_anew(model: Path) -> None:
    for name in ("README.md", "modeling_own.py", "vocab.txt"):
        (model / name).write_text("x")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "edgetool.json", ".gitattributes", "x.gguf"):
        (model / name).write_text("x")
    (model / "original").mkdir()
    assert [path.name for path in Checkpoint.open(model).side_files] == [
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_own.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_a_directory_of_links_as_in_the_hubs_cache_is_read(model: Path, tmp_path: Path) -> None:
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    assert set(Checkpoint.open(links).tensors) == set(Checkpoint.open(model).tensors)
    (model / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json: is a link to a file that is not there"):
        Checkpoint.open(links)


def test_one_safetensors_file_of_any_name_is_taken(model: Path) -> None:
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(model / shard).items()}
    for name in (*SHARDS, INDEX_NAME):
        (model / name).unlink()
    save_file(tensors, model / "gptq_model-4bit-128g.safetensors")
    assert set(Checkpoint.open(model).tensors) == set(tensors)


def test_a_tensor_that_is_not_there_is_refused_by_name(pristine: Path) -> None:
    with pytest.raises(BadInput, match=r"no tensor 'model\.nothing'"):
        Checkpoint.open(pristine).read("model.nothing")


def _drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / SHARDS[2])
    del tensors["model.norm.weight"]
    save_file(tensors, model / SHARDS[2])


def _add_a_tensor(model: Path) -> None:
    save_file({**load_file(model / SHARDS[1]), "stray": torch.zeros(1)}, model / SHARDS[1])


def _repeat_a_tensor(model: Path) -> None:
    save_file({**load_file(model / SHARDS[1]), "model.norm.weight": torch.zeros(64)}, model / SHARDS[1])


def _truncate(model: Path) -> None:
    shard = model / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-5])


def _only_bin(model: Path) -> None:
    for name in (*SHARDS, INDEX_NAME):
        (model / name).unlink()
    (model / "pytorch_model.bin").write_bytes(b"PK")


def _no_weights(model: Path) -> None:
    for name in (*SHARDS, INDEX_NAME):
        (model / name).unlink()


def _lost_shard_and_index(model: Path) -> None:
    (model / INDEX_NAME).unlink()
    (model / SHARDS[1]).unlink()


def _two_sets(model: Path) -> None:
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")


def _unclear_files(model: Path) -> None:
    _no_weights(model)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({name: torch.zeros(1)}, model / name)


def _point_index_at(name: object) -> Callable[[Path], None]:
    return lambda model: _change_index(model, lambda index: index.update({"model.norm.weight": name}))


NOT_PLAIN = r"index\.json: tensor 'model\.norm\.weight' lies in .* not a plain"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), r"no config\.json"),
    "config is not JSON": (lambda m: (m / "config.json").write_text('{"a": '), r"config\.json: not valid JSON.*line 1"),
    "config is not UTF-8": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: not valid JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
    "config is a directory": (
        lambda m: ((m / "config.json").unlink(), (m / "config.json").mkdir()),
        r"no config\.json",
    ),
    "index is not JSON": (lambda m: (m / INDEX_NAME).write_text("{"), r"index\.json: not valid JSON"),
    "index without map": (lambda m: (m / INDEX_NAME).write_text("{}"), r"index\.json: weight_map is missing"),
    "index with empty map": (lambda m: _change_index(m, dict.clear), r"index\.json: weight_map is missing, empty"),
    "shard missing": (lambda m: (m / SHARDS[1]).unlink(), rf"{SHARDS[1]}: shard is missing"),
    "shard is a dangling link": (
        lambda m: ((m / SHARDS[1]).unlink(), (m / SHARDS[1]).symlink_to("nowhere")),
        rf"{SHARDS[1]}: shard is missing",
    ),
    "shard empty": (lambda m: (m / SHARDS[1]).write_bytes(b""), rf"{SHARDS[1]}: 0 bytes long"),
    "shard truncated": (_truncate, rf"{SHARDS[1]}: truncated: tensor 'model\.layers\..*' ends at byte"),
    "shard missing without index": (_lost_shard_and_index, rf"{SHARDS[1]}: shard is missing"),
    "index names an absent tensor": (_drop_a_tensor, rf"index\.json: names tensor 'model\.norm\.weight'.*{SHARDS[2]}"),
    "index names the wrong shard": (_point_index_at(SHARDS[0]), rf"'model\.norm\.weight' in {SHARDS[0]}; it is in"),
    "tensor not in the index": (_add_a_tensor, rf"{SHARDS[1]}: tensor 'stray' is not named"),
    "tensor in two shards": (_repeat_a_tensor, rf"{SHARDS[2]}: tensor 'model\.norm\.weight' is also in {SHARDS[1]}"),
    "index leads out": (_point_index_at("../model.safetensors"), NOT_PLAIN),
    "index leads to the root": (_point_index_at("/etc/model.safetensors"), NOT_PLAIN),
    "index leads down": (_point_index_at("sub/model.safetensors"), NOT_PLAIN),
    "index leads out the other way": (_point_index_at("..\\model.safetensors"), NOT_PLAIN),
    "index names another kind of file": (_point_index_at("model.bin"), NOT_PLAIN),
    "index names no string": (_point_index_at(3), NOT_PLAIN),
    "index names nothing": (_point_index_at(""), NOT_PLAIN),
    "only pickled weights": (_only_bin, "no safetensors weights"),
    "no weights": (_no_weights, "no safetensors weights"),
    "two sets of weights": (_two_sets, r"holds both model\.safetensors and model\.safetensors\.index\.json"),
    "several files and no index": (_unclear_files, r"several weight files and no .*a\.safetensors, b\.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_naming_what_is_at_fault(model: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    Checkpoint.open(model)
    break_it(model)
    with pytest.raises(BadInput, match=message):
        Checkpoint.open(model)


def test_an_image_is_called_one_and_not_taken_for_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "hbm").mkdir()
    (tmp_path / "ddr.bin").touch()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match=r"no config\.json") as caught:
        Checkpoint.open(tmp_path)
    assert "compiled image" in (caught.value.hint or "")


def test_pickled_weights_come_with_the_command_that_converts_them(model: Path) -> None:
    _only_bin(model)
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(model)
    assert "save_pretrained" in (caught.value.hint or "")


def test_a_directory_around_a_gguf_file_says_to_give_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "m.gguf") in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_what_is_no_directory_with_a_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("x")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(BadInput, match=str(path)):
        Checkpoint.open(path)


def test_shards_hold_the_tensors_in_order_and_respect_the_limit() -> None:
    entries = [("a", 4), ("b", 4), ("c", 9), ("d", 1), ("e", 7), ("f", 1)]
    assert shard_index(entries, 8) == [
        ("model-00001-of-00004.safetensors", ["a", "b"]),
        ("model-00002-of-00004.safetensors", ["c"]),  # larger than the limit: alone
        ("model-00003-of-00004.safetensors", ["d", "e"]),
        ("model-00004-of-00004.safetensors", ["f"]),
    ]
    assert shard_index(entries, 26) == [("model.safetensors", ["a", "b", "c", "d", "e", "f"])]


def test_the_index_written_is_the_one_transformers_writes(pristine: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pristine)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=100_000)
    theirs = json.loads((tmp_path / "theirs" / INDEX_NAME).read_text())
    files = sorted(set(theirs["weight_map"].values()))
    shards = [(file, [name for name, place in theirs["weight_map"].items() if place == file]) for file in files]
    write_index(tmp_path, shards, theirs["metadata"]["total_size"])
    ours = json.loads((tmp_path / INDEX_NAME).read_text())
    assert ours["weight_map"] == theirs["weight_map"]
    assert len(files) > 1


def test_a_single_file_gets_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, [("model.safetensors", ["a"])], 4)
    assert not list(tmp_path.iterdir())
