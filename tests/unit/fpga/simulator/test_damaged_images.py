"""Negative controls: one wrong nibble, scale, port or encoding is seen, where it is; a senseless program is refused."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetool.fpga.simulator
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from tests.fakes.quantized_models import Made
from tests.unit.fpga.simulator.damage import with_byte, with_constant, with_manifest, with_program
from tests.unit.fpga.simulator.recording import Recording, bits
from tests.unit.fpga.simulator.shapes import SMALL

Compiled = Callable[..., tuple[Made, Path]]
Key = tuple[str, int, int]

IDS = [5, 60, 33]
UP_OF_LAYER_1 = ("layer", 1, 15)


def run(directory: Path) -> Recording:
    recording = Recording()
    Simulator(Image.open(directory), trace=recording).session().feed(IDS, logits="all")
    return recording


@pytest.fixture(scope="module")
def whole(compiled: Compiled) -> Path:
    return compiled("llama", shape=SMALL)[1]


@pytest.fixture(scope="module")
def expected(whole: Path) -> Recording:
    return run(whole)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "image"))


def first_difference(found: Recording, expected: Recording) -> Key | None:
    for key, calls in expected.calls.items():
        if expected.kinds[key] != "ARGMAX" and not np.array_equal(bits(found.calls[key][0]), bits(calls[0])):
            return key
    return None


def place(directory: Path, name: str, n: int, k: int) -> tuple[int, int, int]:
    """PC, address of the scale and of the nibble pair of weight (n, k), for rows of one package of groups of 32."""
    record = Image.open(directory).tensors[name]
    row = record["addr"] + n // 32 * (record["Kp"] // 2 + 32)
    return n % 32, row + 2 * (k // 32), row + 32 + k // 2


def test_an_unchanged_copy_gives_the_same_bits(copy: Path, expected: Recording) -> None:
    assert first_difference(run(copy), expected) is None
    assert expected.kinds[UP_OF_LAYER_1] == "MVM"


def test_one_flipped_nibble_is_seen_in_its_row_of_its_matrix(copy: Path, expected: Recording) -> None:
    pc, _, pair = place(copy, "layers.1.up", 100, 41)
    with_byte(copy, pc, pair, 0x40)
    found = run(copy)
    assert first_difference(found, expected) == UP_OF_LAYER_1
    differ = bits(found.calls[UP_OF_LAYER_1][0]) != bits(expected.calls[UP_OF_LAYER_1][0])
    assert set(np.flatnonzero(differ.any(axis=0))) == {100}
    with pytest.raises(VerificationFailed, match="pc04"):
        Image.open(copy, hashes=True)


def test_one_flipped_scale_is_seen_in_its_row_of_its_matrix(copy: Path, expected: Recording) -> None:
    pc, scale, _ = place(copy, "layers.1.up", 7, 64)
    with_byte(copy, pc, scale + 1, 0x80)
    found = run(copy)
    assert first_difference(found, expected) == UP_OF_LAYER_1
    differ = bits(found.calls[UP_OF_LAYER_1][0]) != bits(expected.calls[UP_OF_LAYER_1][0])
    assert set(np.flatnonzero(differ.any(axis=0))) == {7}


def test_two_swapped_ports_are_seen(copy: Path, expected: Recording) -> None:
    one, other = copy / "hbm" / "pc03.bin", copy / "hbm" / "pc21.bin"
    one.rename(copy / "spare")
    other.rename(one)
    (copy / "spare").rename(other)
    found = run(copy)
    key = first_difference(found, expected)
    assert key is not None and key[:2] == ("layer", 0) and expected.kinds[key] == "MVM"
    differ = bits(found.calls[key][0]) != bits(expected.calls[key][0])
    assert set(np.flatnonzero(differ.any(axis=0)) % 32) == {3, 21}


def test_the_wrong_encoding_is_seen(copy: Path, expected: Recording) -> None:
    with_manifest(copy, lambda manifest: manifest.update(int4_encoding="signmag"))
    key = first_difference(run(copy), expected)
    assert key is not None and expected.kinds[key] == "MVM" and key[:2] == ("layer", 0)


def test_an_order_one_place_off_is_seen(compiled: Compiled, tmp_path: Path) -> None:
    source = compiled("llama", shape=SMALL, desc_act=("o",))[1]
    image = Path(shutil.copytree(source, tmp_path / "image"))
    record = Image.open(image).constants["layers.1.o.order"]
    data = np.fromfile(image / "ddr.bin", dtype="<u4")
    start = (record["addr"] - 0x2_0000_0000) // 4
    data[start : start + record["shape"][0]] = np.roll(data[start : start + record["shape"][0]], 1)
    data.tofile(image / "ddr.bin")
    before = run(source)
    key = first_difference(run(image), before)
    assert key is not None and key[1] == 1 and before.kinds[key] == "PERM"


def test_an_order_that_names_no_channel_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    image = Path(shutil.copytree(compiled("llama", shape=SMALL, desc_act=("o",))[1], tmp_path / "image"))
    record = Image.open(image).constants["layers.1.o.order"]
    data = np.fromfile(image / "ddr.bin", dtype="<u4")
    data[(record["addr"] - 0x2_0000_0000) // 4] = 96
    data.tofile(image / "ddr.bin")
    with pytest.raises(BadInput, match=r"layers\.1\.o\.order' names channel 96 of 96"):
        Simulator(Image.open(image))


@pytest.mark.parametrize("memory", [None, {}, {"read_bytes_by_role": {"q": "much"}}, {"read_bytes_by_role": []}])
def test_a_manifest_without_a_plan_is_refused(copy: Path, memory: Any) -> None:
    with_manifest(copy, lambda manifest: manifest.update(memory=memory))
    with pytest.raises(BadInput, match="read_bytes_by_role"):
        Simulator(Image.open(copy))


def test_a_multiplier_that_is_not_one_is_refused(copy: Path) -> None:
    with_constant(copy, "layers.0.q.bias", lambda words: words ^ (1 << 20))
    with pytest.raises(BadInput, match=r"layers\.0\.q\.bias has multipliers"):
        Simulator(Image.open(copy))


def _op(program: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(op for part in ("prologue", "layer", "epilogue") for op in program[part] if op["op"] == kind)


SENSELESS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "heads that do not fit": (lambda p: _op(p, "ROPE").update(heads=4), "ROPE: sizes do not fit"),
    "heads of text": (lambda p: _op(p, "QK").update(heads="3"), "QK: heads is '3'"),
    "no heads": (lambda p: _op(p, "QK").update(heads=0), "heads is 0"),
    "heads that share no key heads": (lambda p: _op(p, "QK").update(kv_heads=2), "KV cache"),
    "a width of another size": (lambda p: _op(p, "RMSNORM").update(width=40), "RMSNORM: sizes do not fit"),
    "a gamma of another size": (lambda p: _op(p, "RMSNORM").update(width=32), r"must be float16 \[2, 32\]"),
    "eps of NaN": (lambda p: _op(p, "RMSNORM").update(eps=float("nan")), "eps is nan"),
    "an odd rotary_dim": (lambda p: _op(p, "ROPE").update(rotary_dim=31), "rotary_dim 31"),
    "another style": (lambda p: _op(p, "ROPE").update(style="spiral"), "spiral"),
    "another mask": (lambda p: _op(p, "QK").update(mask="none"), "mask is 'none'"),
    "a buffer that nothing wrote": (lambda p: p["layer"][0].update({"in": "inner"}), "no operation before"),
    "a table that is a norm": (lambda p: _op(p, "ACT").update(table="final_norm"), "ACT: table 'final_norm'"),
    "another weight": (lambda p: _op(p, "MVM").update(weight="layers.{layer}.down"), "MVM: sizes do not fit"),
    "rows of the last token in a layer": (lambda p: p["layer"][0].update(rows="last"), "rows is 'last'"),
    "no logits": (lambda p: p["epilogue"].remove(_op(p, "LOGITS")), "one LOGITS"),
    "no cache": (
        lambda p: p.update(layer=[op for op in p["layer"] if op["op"] in ("RMSNORM", "ACT")][:1]),
        "KV cache in its layers",
    ),
    "a chunk of nothing": (lambda p: p.update(chunk_tokens=0), "chunk_tokens is 0"),
    "a context beyond the cache": (lambda p: p.update(max_context=1000), "over the KV cache's 64"),
    "a buffer of no channels": (lambda p: p["buffers"][0].update(channels=None), "has None channels"),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_senseless_program_is_refused_naming_the_operation(copy: Path, case: str) -> None:
    change, message = SENSELESS[case]
    with_program(copy, change)
    with pytest.raises(BadInput, match=message):
        Simulator(Image.open(copy))


def test_the_simulator_shares_no_code_with_the_compiler() -> None:
    allowed = {"image", "program", "hardware", "image_format"}
    package = Path(edgetool.fpga.simulator.__file__).parent
    modules = sorted(package.glob("*.py"))
    assert len(modules) > 10
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            name = node.module if isinstance(node, ast.ImportFrom) else None
            if name and name.startswith("edgetool.fpga.") and not name.startswith("edgetool.fpga.simulator"):
                assert name.split(".")[2] in allowed, f"{module.name} imports {name}"
