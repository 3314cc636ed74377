"""Extract, diff and verify: each finds what is there, and each notices one wrong nibble."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.checks import diff, extract
from edgetool.fpga.image import Image
from edgetool.fpga.scalar_reader import ScalarReader
from edgetool.fpga.verify import verify
from edgetool.progress import NullProgress
from tests.fakes.quantized_models import Made, make_quantized
from tests.unit.fpga.conftest import compile_into

Compiled = Callable[..., tuple[Made, Path]]
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "qwen2 with biases": ("qwen2", {}, {}),
    "asymmetric": ("llama", {"format": "awq", "sym": False}, {}),
    "activation order": ("llama", {"desc_act": ("q", "k", "v", "o", "gate", "up", "down"), "same_order": False}, {}),
    "chatglm": ("chatglm", {"desc_act": ("down",)}, {}),
    "fp16 head": ("llama", {}, {"lm_head": "fp16"}),
    "signmag": ("qwen2", {"lowest_code": 1}, {"int4": "signmag"}),
    "compressed-tensors, float32 scales": (
        "llama",
        {"format": "compressed-tensors", "scale_dtype": "F32", "group_size": 64},
        {},
    ),
    "bf16": ("qwen2", {"plain_dtype": "BF16", "tied": True}, {}),
    "rounded again": ("llama", {"format": "awq", "sym": False}, {"requant": "sym", "group_size": 64}),
}


def rewrite(image: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a segment and let its hash agree: what is found then is not the hash."""
    raw = np.frombuffer((image / name).read_bytes(), dtype=np.uint8).copy()
    change(raw)
    (image / name).write_bytes(raw.tobytes())
    manifest = json.loads((image / "manifest.json").read_text())
    for segment in manifest["segments"]:
        if segment["file"] == name:
            segment["sha256"] = hashlib.sha256(raw.tobytes()).hexdigest()
    (image / "manifest.json").write_text(json.dumps(manifest))


def check(image: Path, made: Made) -> dict[str, Any]:
    return verify(image, Checkpoint.open(made.path), 2, NullProgress())


@pytest.mark.parametrize("case", FAMILIES)
def test_a_fresh_image_verifies_against_its_checkpoint(compiled: Compiled, case: str) -> None:
    family, how, settings = FAMILIES[case]
    made, image = compiled(family, settings, **how)
    found = check(image, made)
    matrices = len(Image.open(image).manifest["tensors"])
    assert found["tensors_equal"] == found["tensors_compared"] > matrices


@pytest.mark.parametrize("case", ["llama", "activation order", "chatglm", "asymmetric", "fp16 head"])
def test_every_matrix_comes_back_as_the_checkpoint_has_it(compiled: Compiled, tmp_path: Path, case: str) -> None:
    family, how, settings = FAMILIES[case]
    made, image = compiled(family, settings, **how)
    for name, record in Image.open(image).tensors.items():
        if name == "lm_head" and case != "fp16 head":
            continue
        extract(image, name, tmp_path / f"{name}.safetensors", False)
        got = load_file(tmp_path / f"{name}.safetensors")[name]
        first, last = record["source"]["rows"]
        expected = made.weight(record["source"]["module"])[first:last]
        assert got.dtype == np.float32 and got.shape == expected.shape
        if case == "asymmetric":  # offsets (8 - z) * s are rounded to fp16: 2^-11 of at most 7 steps
            scales = made.linears[record["source"]["module"]].scales
            assert np.abs(got - expected).max() <= 7 * 2.0**-11 * np.abs(scales).max()
        else:
            assert np.array_equal(got, expected)


def test_extracting_writes_no_file_over_another(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    target = tmp_path / "x.safetensors"
    target.write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        extract(image, "lm_head", target, False)
    with pytest.raises(BadInput, match="is a directory"):
        extract(image, "lm_head", tmp_path, True)
    with pytest.raises(BadInput, match="is not a directory"):
        extract(image, "lm_head", tmp_path / "no" / "x", False)
    assert target.read_text() == "mine"
    extract(image, "lm_head", target, True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def at(image: Path, name: str) -> int:
    return int(Image.open(image).tensors[name]["addr"])


@pytest.mark.parametrize(
    ("name", "offset", "what"),
    [
        ("layers.1.down", 32 + 5, "layers.1.down: row 3, weight"),
        ("layers.1.down", 0, "layers.1.down: row 3, scale"),
        ("lm_head", 32, "lm_head: row 3, weight"),
    ],
)
def test_one_flipped_bit_is_named_by_matrix_and_row(
    compiled: Compiled, tmp_path: Path, name: str, offset: int, what: str
) -> None:
    made, original = compiled("llama")
    image = Path(shutil.copytree(original, tmp_path / "image"))
    start = at(image, name) + offset

    def flip(raw: np.ndarray) -> None:
        raw[start] ^= 0x10

    rewrite(image, "hbm/pc03.bin", flip)
    with pytest.raises(VerificationFailed, match=r"1 of .* tensors differ") as found:
        check(image, made)
    assert what in found.value.message


def test_two_swapped_ports_the_wrong_encoding_and_dirty_padding_are_found(compiled: Compiled, tmp_path: Path) -> None:
    made, original = compiled("llama")
    swapped = Path(shutil.copytree(original, tmp_path / "swapped"))
    first, second = (np.fromfile(original / f"hbm/pc0{pc}.bin", np.uint8) for pc in (3, 4))
    rewrite(swapped, "hbm/pc03.bin", lambda raw: np.copyto(raw, second))
    rewrite(swapped, "hbm/pc04.bin", lambda raw: np.copyto(raw, first))
    with pytest.raises(VerificationFailed):
        check(swapped, made)
    encoded = Path(shutil.copytree(original, tmp_path / "encoded"))
    manifest = json.loads((encoded / "manifest.json").read_text())
    (encoded / "manifest.json").write_text(json.dumps(manifest | {"int4_encoding": "signmag"}))
    with pytest.raises(VerificationFailed, match="weight"):
        check(encoded, made)
    dirty = Path(shutil.copytree(original, tmp_path / "dirty"))
    row_end = at(dirty, "layers.0.q") + 32 + 128 - 1  # K is 192, so the last bytes of 256 / 2 are padding

    def smear(raw: np.ndarray) -> None:
        raw[row_end] = 0x11

    rewrite(dirty, "hbm/pc00.bin", smear)
    with pytest.raises(VerificationFailed, match="padding"):
        check(dirty, made)


def test_a_bias_where_the_checkpoint_has_none_is_found(compiled: Compiled, tmp_path: Path) -> None:
    made, original = compiled("llama")
    image = Path(shutil.copytree(original, tmp_path / "image"))
    bias = Image.open(image).constants["layers.1.down.bias"]
    (ddr,) = [segment for segment in Image.open(image).manifest["segments"] if segment["space"] == "ddr"]

    def add(raw: np.ndarray) -> None:
        raw[bias["addr"] - ddr["addr"] + 1] = 0x3C  # 1.0 to the first channel

    rewrite(image, "ddr.bin", add)
    with pytest.raises(VerificationFailed, match=r"1 of .*layers\.1\.down\.bias"):
        check(image, made)


@pytest.mark.parametrize("space", ["ddr.bin", "host/embed.f16.bin"])
def test_a_wrong_norm_and_a_wrong_embedding_are_found(compiled: Compiled, tmp_path: Path, space: str) -> None:
    made, original = compiled("qwen2")
    image = Path(shutil.copytree(original, tmp_path / "image"))

    def flip(raw: np.ndarray) -> None:
        raw[1] ^= 0x01

    rewrite(image, space, flip)
    with pytest.raises(VerificationFailed, match=r"1 of .* layers\.0\.input_norm|embedding"):
        check(image, made)


def test_another_checkpoint_is_not_the_images(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    with pytest.raises(VerificationFailed, match="differ"):
        check(image, make_quantized(tmp_path / "other", "llama", seed=1))
    with pytest.raises(VerificationFailed, match="has no"):
        check(image, make_quantized(tmp_path / "glm", "chatglm"))


def test_the_scalar_reader_reads_one_element_as_it_reads_many(compiled: Compiled) -> None:
    for family, how, settings in FAMILIES.values():
        _, path = compiled(family, settings, **how)
        image = Image.open(path)
        ports = [image.port(pc) for pc in range(32)]
        record = image.tensors["layers.1.up"]
        reader = ScalarReader(ports, record, image.encoding)
        rows = np.array([0, 33, record["N"] - 1])
        codes, (scales, offsets) = reader.codes(rows), reader.scales(rows)
        for index, n in enumerate(rows):
            for k in (0, 1, 31, 32, 65, record["K"] - 1):
                group = k // record["group"]
                q, scale, offset = reader.weight(int(n), k)
                assert (q, scale, offset) == (codes[index, k], scales[index, group], offsets[index, group])


def test_images_of_one_checkpoint_are_identical_and_any_difference_is_named(compiled: Compiled, tmp_path: Path) -> None:
    made, image = compiled("llama")
    same = tmp_path / "same"
    compile_into(made.path, same)
    assert diff(image, same)["identical"] is True
    start = at(same, "layers.1.o")

    def flip(raw: np.ndarray) -> None:
        raw[start + 33] ^= 0x01

    rewrite(same, "hbm/pc09.bin", flip)
    found = diff(image, same)
    assert found["identical"] is False
    assert found["tensors_differing"] == [{"name": "layers.1.o", "bytes_differing": 1, "only_in": None}]
    assert found["files_differing"] == ["hbm/pc09.bin"]


def test_a_difference_of_settings_is_named(compiled: Compiled) -> None:
    _, first = compiled("llama")
    _, second = compiled("llama", {"lm_head": "fp16", "max_context": 96})
    found = diff(first, second)
    assert {"key": "kv.max_ctx", "first": 64, "second": 96} in found["settings_differing"]
    assert [one["name"] for one in found["tensors_differing"]] == ["lm_head"]
    assert {"rope.cos", "rope.sin"} <= set(found["constants_differing"])
