"""What an image says of itself, and one clear error for each kind of damage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.errors import BadInput, EdgetoolError, VerificationFailed
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from tests.fakes.quantized_models import Made

Compiled = Callable[..., tuple[Made, Path]]


@pytest.fixture
def image(compiled: Compiled, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(compiled("qwen2")[1], tmp_path / "image"))


def edit(image: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = image / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_program(image: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Damage the program and let the manifest agree, so that what is found is not the hash."""
    document = json.loads((image / "program.json").read_text())
    change(document)
    raw = json.dumps(document).encode()
    (image / "program.json").write_bytes(raw)
    edit(image, lambda manifest: manifest["program"].update(sha256=hashlib.sha256(raw).hexdigest()))


def test_an_image_holds_every_file_of_the_format_and_they_are_what_it_says(image: Path) -> None:
    opened = Image.open(image)
    manifest = opened.manifest
    assert (manifest["format"], manifest["version"], manifest["numerics"]) == ("edgetool-vcu128", [1, 0], "et1")
    assert manifest["hardware"] == VCU128.to_dict()
    assert len(list((image / "hbm").iterdir())) == 32
    files = [image / segment["file"] for segment in manifest["segments"]]
    assert [path.stat().st_size for path in files] == [segment["bytes"] for segment in manifest["segments"]]
    for segment in manifest["segments"]:
        assert segment["sha256"] == hashlib.sha256((image / segment["file"]).read_bytes()).hexdigest()
    assert [segment["pc"] for segment in manifest["segments"] if segment["space"] == "hbm"] == list(range(32))
    assert {path.name for path in (image / "tokenizer").iterdir()} == {"tokenizer.json"}
    order = [record["name"] for record in manifest["tensors"]]
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    assert order == [f"layers.{layer}.{role}" for layer in range(2) for role in roles] + ["lm_head"]
    keys = {"name", "role", "N", "K", "Np", "Kp", "group", "addr", "bytes_per_pc"}
    assert all(keys <= set(record) for record in manifest["tensors"])
    assert {"base", "bytes_per_pc_layer", "max_ctx"} <= set(manifest["kv"])
    assert opened.check_hashes(2) == 32 + 2 + 1 + 1


def test_what_is_between_matrices_is_zero(image: Path) -> None:
    opened = Image.open(image)
    port = np.array(opened.port(7))
    for record in opened.manifest["tensors"]:
        port[record["addr"] : record["addr"] + record["bytes_per_pc"]] = 0
    assert not port.any()


def test_an_image_can_be_moved(image: Path, tmp_path: Path) -> None:
    text = (image / "manifest.json").read_text() + (image / "program.json").read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text
    Image.open(Path(shutil.move(image, tmp_path / "elsewhere")), hashes=True)


def tensor(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(record for record in manifest["tensors"] if record["name"] == name)


def segment(manifest: dict[str, Any], space: str) -> dict[str, Any]:
    return next(record for record in manifest["segments"] if record["space"] == space)


def put(record: dict[str, Any], **values: Any) -> None:
    record.update(values)


MANIFEST_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda m: put(m, format="onnx"), "format is 'onnx'"),
    "a later major version": (lambda m: put(m, version=[2, 0]), "image version 2.0; this edgetool reads version 1"),
    "no version": (lambda m: m.pop("version"), "version is None"),
    "version as text": (lambda m: put(m, version="1.0"), "version is '1.0'"),
    "an unknown encoding": (lambda m: put(m, int4_encoding="gray"), "unknown int4_encoding 'gray'"),
    "another board": (lambda m: put(m["hardware"], pc_bytes=1 << 27), "hardware.pc_bytes is 134217728"),
    "a missing key": (lambda m: m.pop("kv"), "'kv' is missing"),
    "a tensor without N": (lambda m: tensor(m, "layers.0.q").pop("N"), "'N' is missing"),
    "a PC twice": (lambda m: put(segment(m, "hbm"), pc=1), "there must be one for each of 0 .. 31"),
    "no DDR": (lambda m: m["segments"].remove(segment(m, "ddr")), "exactly one DDR segment"),
    "one file for two segments": (lambda m: put(segment(m, "hbm"), file="hbm/pc01.bin"), "two segments name one file"),
    "a path upwards": (lambda m: put(segment(m, "ddr"), file="../ddr.bin"), "leads out of the image"),
    "an absolute path": (lambda m: put(segment(m, "ddr"), file="/etc/hostname"), "leads out of the image"),
    "a path upwards inside": (lambda m: put(segment(m, "ddr"), file="hbm/../../x"), "leads out of the image"),
    "a backslash path": (lambda m: put(segment(m, "ddr"), file="..\\ddr.bin"), "is no file name"),
    "a tokenizer path upwards": (lambda m: put(m, tokenizer={"../../x": "0" * 64}), "leads out of the image"),
    "a segment beyond its PC": (lambda m: put(segment(m, "hbm"), bytes=(1 << 28) + 1), "outside a PC"),
    "a segment that starts later": (lambda m: put(segment(m, "hbm"), addr=32), "outside a PC"),
    "DDR at another place": (lambda m: put(segment(m, "ddr"), addr=0x1_0000_0000), "outside DDR"),
    "DDR too large": (lambda m: put(segment(m, "ddr"), bytes=5 << 30), "outside DDR"),
    "no hash": (lambda m: put(segment(m, "ddr"), sha256=None), "sha256 is None"),
    "a negative size": (lambda m: put(segment(m, "hbm"), bytes=-1), "bytes is -1"),
    "a size that is no number": (lambda m: put(segment(m, "hbm"), bytes="12"), "bytes is '12'"),
    "true for a number": (lambda m: put(segment(m, "hbm"), bytes=True), "bytes is True"),
    "a size of 2**70": (lambda m: put(tensor(m, "layers.0.q"), addr=1 << 70), "addr is"),
    "tensors that overlap": (lambda m: put(tensor(m, "layers.0.k"), addr=0), "overlaps tensor"),
    "a tensor in the KV cache": (lambda m: put(m["kv"], base=0x4000), "overlaps"),
    "a tensor twice": (lambda m: put(tensor(m, "layers.0.k"), name="layers.0.q"), "is there twice"),
    "an unaligned tensor": (lambda m: put(tensor(m, "lm_head"), addr=0x20), "not a multiple of 0x4000"),
    "a tensor beyond its segment": (lambda m: put(tensor(m, "lm_head"), addr=0x4000000), "beyond its segment"),
    "another N": (lambda m: put(tensor(m, "layers.0.q"), N=9999), "its N, K and group give"),
    "another K": (lambda m: put(tensor(m, "layers.0.q"), K=9999), "its N, K and group give"),
    "a group of 48": (lambda m: put(tensor(m, "layers.0.q"), group=48), "group 48"),
    "zeros from nowhere": (lambda m: put(tensor(m, "layers.0.q"), zeros=True), "its N, K and group give"),
    "fp16 with groups": (lambda m: put(tensor(m, "layers.0.q"), dtype="fp16"), "dtype 'fp16'"),
    "a cache beyond the PC": (lambda m: put(m["kv"], bytes_per_pc_layer=1 << 28), "KV cache ends at"),
    "a context over its capacity": (lambda m: put(m["kv"], max_ctx=65), "over its capacity"),
    "constants that overlap": (lambda m: put(m["constants"][1], addr=VCU128.ddr_base), "overlaps constant"),
    "a constant below DDR": (lambda m: put(m["constants"][0], addr=64), "outside its segment"),
    "a constant of another size": (lambda m: put(m["constants"][0], bytes=2), "its dtype and shape give"),
    "a constant of another dtype": (lambda m: put(m["constants"][0], dtype="object"), "unknown dtype 'object'"),
    "a constant of negative shape": (lambda m: put(m["constants"][0], shape=[-1]), "shape"),
    "a role that is no text": (lambda m: put(tensor(m, "layers.0.q"), role=None), "role is None"),
    "a tensor from nowhere": (lambda m: tensor(m, "layers.0.q").pop("source"), "'source' is missing"),
    "rows that are no range": (lambda m: put(tensor(m, "layers.0.q")["source"], rows=[5, 5]), "must be module, rows"),
    "one row for two": (lambda m: put(tensor(m, "layers.0.q")["source"], rows=[5]), "not enough values"),
    "a module that is no text": (lambda m: put(tensor(m, "layers.0.q")["source"], module=[]), "must be module, rows"),
    "no profile": (lambda m: m.pop("profile"), "'profile' is missing"),
    "a program without a hash": (lambda m: m["program"].pop("sha256"), "'sha256' is missing"),
    "a tokenizer that is a list": (lambda m: put(m, tokenizer=[]), "tokenizer must be a table"),
    "no family": (lambda m: m["model"].pop("family"), "'family' is missing"),
    "an end that is no number": (lambda m: put(m["model"], eos_token_ids=["x"]), "must be whole numbers"),
    "one end for a list": (lambda m: put(m["model"], eos_token_ids=2), "must be whole numbers"),
    "a beginning that is no number": (lambda m: put(m["model"], bos_token_id="<s>"), "must be whole numbers"),
    "a constant of no known role": (lambda m: put(m["constants"][0], role=None), "unknown role None"),
    "a bias of nothing": (lambda m: put(m["constants"][0], role="bias"), "is the bias of no tensor"),
    "a norm from nowhere": (lambda m: put(m["constants"][0], source=None), "source is None"),
    "a source that is a list": (lambda m: put(m["constants"][0], source=[]), "source is []"),
    "an embedding from nowhere": (lambda m: m["embedding"].pop("source"), "'source' is missing"),
    "another embedding": (lambda m: put(m["embedding"], shape=[1, 2]), "does not fit segment"),
    "tensors that are no list": (lambda m: put(m, tensors=7), ""),
    "a tensor that is no object": (lambda m: put(m, tensors=[3]), ""),
    "segments of null": (lambda m: put(m, segments=None), ""),
    "a program elsewhere": (lambda m: put(m["program"], file="tokenizer/tokenizer.json"), "not 'program.json'"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_one_clear_error(image: Path, damage: str) -> None:
    change, words = MANIFEST_DAMAGE[damage]
    edit(image, change)
    with pytest.raises(BadInput) as refused:
        Image.open(image)
    assert words in refused.value.message
    assert "\n" not in refused.value.message


PROGRAM_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another major version": (lambda p: put(p, version=[2, 0]), "version [2, 0]"),
    "other numerics": (lambda p: put(p, numerics="et9"), "numerics 'et9'"),
    "an unknown operation": (lambda p: put(p["layer"][0], op="CONV"), "layer[0]: unknown operation 'CONV'"),
    "a missing field": (lambda p: p["layer"][0].pop("gamma"), "layer[0]: RMSNORM has fields"),
    "a field too many": (lambda p: put(p["layer"][0], trick=1), "layer[0]: RMSNORM has fields"),
    "a weight that is not there": (
        lambda p: put(p["layer"][1], weight="layers.{layer}.z"),
        "weight 'layers.0.z', which is not in the image",
    ),
    "more layers than weights": (lambda p: put(p, layers=3), "'layers.2.input_norm', which is not in the image"),
    "a buffer that is not there": (lambda p: put(p["layer"][1], out="y"), "out 'y'"),
    "no layers": (lambda p: put(p, layers=0), "layers is 0"),
    "an operation whose name is a list": (lambda p: put(p["layer"][0], op=["MVM"]), "unknown operation ['MVM']"),
    "buffers that are numbers": (lambda p: put(p, buffers=[1, 2]), "buffers is not a list of records"),
    "a buffer whose name is a list": (lambda p: put(p["buffers"][0], name=["x"]), "buffers is not a list of records"),
    "no buffers": (lambda p: p.pop("buffers"), "buffers is not a list of records"),
    "no list": (lambda p: put(p, layer="all"), "layer is not a list"),
    "a table that is not there": (
        lambda p: put(next(op for op in p["layer"] if op["op"] == "ACT"), table="table.gelu"),
        "table 'table.gelu'",
    ),
}


@pytest.mark.parametrize("damage", PROGRAM_DAMAGE)
def test_a_damaged_program_is_one_clear_error(image: Path, damage: str) -> None:
    change, words = PROGRAM_DAMAGE[damage]
    edit_program(image, change)
    with pytest.raises(BadInput) as refused:
        Image.open(image)
    assert words in refused.value.message


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link_outside(path: Path) -> None:
    outside = path.parent.parent.parent / "outside.bin"
    shutil.move(path, outside)
    path.symlink_to(outside)


FILE_DAMAGE: dict[str, tuple[str, Callable[[Path], Any], type[EdgetoolError], str]] = {
    "a PC is missing": ("hbm/pc05.bin", Path.unlink, BadInput, "pc05.bin: missing"),
    "a PC is cut short": ("hbm/pc31.bin", cut, BadInput, "the manifest says"),
    "DDR is missing": ("ddr.bin", Path.unlink, BadInput, "ddr.bin: missing"),
    "a PC is a link out of the image": ("hbm/pc00.bin", link_outside, BadInput, "a link that leads out of the image"),
    "the tokenizer is missing": ("tokenizer/tokenizer.json", Path.unlink, BadInput, "tokenizer.json: missing"),
    "the program is missing": ("program.json", Path.unlink, BadInput, "program.json: missing"),
    "the program is another": ("program.json", lambda p: p.write_text("{}"), VerificationFailed, "SHA-256"),
    "the manifest is cut short": ("manifest.json", cut, BadInput, "not valid JSON"),
    "the manifest is a list": ("manifest.json", lambda p: p.write_text("[]"), BadInput, "must hold a JSON object"),
    "there is no manifest": ("manifest.json", Path.unlink, BadInput, "not a compiled image"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_damaged_file_is_one_clear_error(image: Path, damage: str) -> None:
    name, change, kind, words = FILE_DAMAGE[damage]
    if name == "manifest.json" and change is cut:
        (image / name).write_text((image / name).read_text()[:-20])
    else:
        change(image / name)
    with pytest.raises(kind) as refused:
        Image.open(image)
    assert words in refused.value.message


@pytest.mark.parametrize("name", ["hbm/pc00.bin", "hbm/pc31.bin", "ddr.bin", "host/embed.f16.bin"])
def test_one_flipped_bit_is_found_by_its_hash(image: Path, name: str) -> None:
    with (image / name).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 0x10]))
    Image.open(image)  # sizes and shapes are whole
    with pytest.raises(VerificationFailed, match=name):
        Image.open(image, hashes=True)


def test_two_swapped_ports_are_found_by_their_hashes(image: Path) -> None:
    first, second = image / "hbm/pc03.bin", image / "hbm/pc04.bin"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(VerificationFailed, match=r"pc03\.bin"):
        Image.open(image, hashes=True)


def test_a_tensor_is_found_by_name_or_by_module_and_a_typo_is_answered(image: Path) -> None:
    opened = Image.open(image)
    assert opened.tensor("layers.1.down")["source"]["module"] == "model.layers.1.mlp.down_proj"
    assert opened.tensor("model.layers.1.mlp.down_proj.weight")["name"] == "layers.1.down"
    with pytest.raises(BadInput) as refused:
        opened.tensor("layers.1.donw")
    assert refused.value.hint == "did you mean layers.1.down?"


def test_a_fused_module_names_its_parts(compiled: Compiled) -> None:
    opened = Image.open(compiled("chatglm")[1])
    with pytest.raises(BadInput, match=r"layers\.0\.q, layers\.0\.k, layers\.0\.v"):
        opened.tensor("transformer.encoder.layers.0.self_attention.query_key_value")


def test_only_a_directory_with_a_manifest_is_an_image(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        Image.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="not a directory"):
        Image.open(tmp_path / "file")
