"""`edgetool convert` with damaged input or damaged output: one clear error, the contract's exit code, nothing left."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes.packed_checkpoints import (
    Layer,
    make_checkpoint,
    other_tensors,
    random_layers,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
    write_shards,
)

DOWN, GATE, UP = (f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))
NORM = "model.layers.1.input_layernorm.weight"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]

Convert = Callable[..., Any]


@pytest.fixture
def convert() -> Convert:
    """`edgetool convert ... --json`, in this process."""
    from edgetool.cli import app

    def invoke(source: Path | str, output: Path, *options: str) -> Any:
        return CliRunner().invoke(app, ["convert", str(source), "-o", str(output), *options, "--json"])

    return invoke


@pytest.fixture(scope="module")
def layers() -> dict[str, Layer]:
    return random_layers()


@pytest.fixture
def model(layers: dict[str, Layer], tmp_path: Path) -> Path:
    """GPTQ in one file."""
    return make_checkpoint(tmp_path / "model", layers, "gptq")


@pytest.fixture
def sharded(layers: dict[str, Layer], tmp_path: Path) -> Path:
    """The same in three shards."""
    return make_checkpoint(tmp_path / "model", layers, "gptq", shards=3)


def failed(result: Any, code: int, kind: str, *words: str) -> dict[str, Any]:
    """Check the form of a failure: exit code, one document (returned), one sentence on stderr, no traceback."""
    assert result.exit_code == code, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert (document["schema"], document["ok"]) == ("edgetool.convert/1", False)
    assert (document["type"], document["exit_code"]) == (kind, code)
    for word in words:
        assert word in document["message"], document["message"]
    assert "\n" not in document["message"]
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    return document


def nothing_left(output: Path) -> None:
    """Neither the output nor a partial directory nor a lock nor a ledger."""
    assert [path.name for path in output.parent.iterdir() if "out" in path.name] == []


# --- damaged input: exit 4


def rewritten(model: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def index_of(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def truncated_shard(model: Path) -> tuple[str, ...]:
    path = model / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    return SHARDS[1], "truncated"


def half_a_shard(model: Path) -> tuple[str, ...]:
    path = model / SHARDS[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return SHARDS[2], "truncated"


def empty_shard(model: Path) -> tuple[str, ...]:
    (model / SHARDS[0]).write_bytes(b"")
    return (SHARDS[0],)


def bytes_behind_the_data(model: Path) -> tuple[str, ...]:
    with (model / SHARDS[1]).open("ab") as file:
        file.write(b"x")
    return SHARDS[1], "belong to no tensor"


def missing_shard(model: Path) -> tuple[str, ...]:
    (model / SHARDS[1]).unlink()
    return SHARDS[1], "missing"


def index_names_a_missing_shard(model: Path) -> tuple[str, ...]:
    index_of(model, lambda document: document["weight_map"].update({NORM: "model-00004-of-00004.safetensors"}))
    return "model-00004-of-00004.safetensors", "missing"


def index_escapes_upwards(model: Path) -> tuple[str, ...]:
    (model.parent / "secret.safetensors").write_bytes((model / SHARDS[0]).read_bytes())
    index_of(model, lambda document: document["weight_map"].update({NORM: "../secret.safetensors"}))
    return "model.safetensors.index.json", NORM, "../secret.safetensors"


def index_escapes_absolutely(model: Path) -> tuple[str, ...]:
    place = str(model.parent / "secret.safetensors")
    (model.parent / "secret.safetensors").write_bytes((model / SHARDS[0]).read_bytes())
    index_of(model, lambda document: document["weight_map"].update({NORM: place}))
    return "model.safetensors.index.json", NORM, place


def index_names_a_number(model: Path) -> tuple[str, ...]:
    index_of(model, lambda document: document["weight_map"].update({NORM: 7}))
    return "model.safetensors.index.json", NORM


def index_names_a_missing_tensor(model: Path) -> tuple[str, ...]:
    index_of(model, lambda document: document["weight_map"].update({"model.extra": SHARDS[0]}))
    return "model.safetensors.index.json", "model.extra"


def index_forgets_a_tensor(model: Path) -> tuple[str, ...]:
    index_of(model, lambda document: document["weight_map"].pop(NORM))
    return NORM, "model.safetensors.index.json"


def index_is_no_json(model: Path) -> tuple[str, ...]:
    (model / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json", "JSON"


def duplicate_tensor(model: Path) -> tuple[str, ...]:
    first, last = (read_safetensors(model / SHARDS[number]) for number in (0, 2))
    name = next(iter(first))
    write_safetensors(model / SHARDS[2], last | {name: first[name]})
    return name, SHARDS[0], SHARDS[2]


def header_over_its_file(model: Path) -> tuple[str, ...]:
    path = model / SHARDS[0]
    path.write_bytes(struct.pack("<Q", path.stat().st_size) + path.read_bytes()[8:])
    return SHARDS[0], "header length", "beyond the file's end"


def header_of_exabytes(model: Path) -> tuple[str, ...]:
    path = model / SHARDS[0]
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + path.read_bytes()[8:])
    return SHARDS[0], "header length", "over the limit"


def header_is_no_json(model: Path) -> tuple[str, ...]:
    path = model / SHARDS[0]
    whole = bytearray(path.read_bytes())
    whole[8] = ord("[")
    path.write_bytes(whole)
    return SHARDS[0], "not valid JSON"


def no_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return ("config.json",)


def config_is_no_object(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("[]")
    return ("config.json",)


def not_a_checkpoint(model: Path) -> tuple[str, ...]:
    for path in list(model.iterdir()):
        path.unlink()
    return ("config.json",)


FILES = [
    truncated_shard,
    half_a_shard,
    empty_shard,
    bytes_behind_the_data,
    missing_shard,
    index_names_a_missing_shard,
    index_escapes_upwards,
    index_escapes_absolutely,
    index_names_a_number,
    index_names_a_missing_tensor,
    index_forgets_a_tensor,
    index_is_no_json,
    duplicate_tensor,
    header_over_its_file,
    header_of_exabytes,
    header_is_no_json,
    no_config,
    config_is_no_object,
    not_a_checkpoint,
]


@pytest.mark.parametrize("damage", FILES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_by_name(
    convert: Convert, sharded: Path, damage: Callable[[Path], tuple[str, ...]]
) -> None:
    words = damage(sharded)
    before = {path.name: path.stat().st_mtime_ns for path in sharded.iterdir()}
    for option in ((), ("--dry-run",), ("--verify", "none")):
        failed(convert(sharded, sharded.parent / "out", "--to", "awq", *option), 4, "BadInput", *words)
        nothing_left(sharded.parent / "out")
    assert {path.name: path.stat().st_mtime_ns for path in sharded.iterdir()} == before


def without(*names: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in names:
            del tensors[name]

    return change


def turned(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(how(tensors[name]))

    return change


def with_value(name: str, place: int, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[place] = value

    return change


TENSORS = {
    "no qzeros": ("gptq", without(f"{DOWN}.qzeros"), (DOWN, "qzeros")),
    "no scales": ("awq", without(f"{DOWN}.scales"), (DOWN, "scales")),
    "no shape": ("compressed-tensors", without(f"{DOWN}.weight_shape"), (DOWN, "weight_shape")),
    "qweight of another": ("gptq", turned(f"{DOWN}.qweight", lambda a: a[:, :32]), (DOWN, "qweight")),
    "qweight cut": ("gptq", turned(f"{DOWN}.qweight", lambda a: a[:-1]), (DOWN,)),
    "qweight flat": ("awq", turned(f"{DOWN}.qweight", lambda a: a.reshape(-1)), (DOWN, "two dimensions")),
    "qzeros of another": ("awq", turned(f"{DOWN}.qzeros", lambda a: a[:1]), (DOWN, "qzeros")),
    "scales turned": ("gptq", turned(f"{DOWN}.scales", lambda a: a.T), (DOWN, "scales")),
    "a group too few": ("gptq", turned(f"{DOWN}.scales", lambda a: a[1:]), (DOWN, "scales")),
    "packed cut": ("compressed-tensors", turned(f"{DOWN}.weight_packed", lambda a: a[:, 1:]), (DOWN, "weight_packed")),
    "a shape that lies": ("compressed-tensors", with_value(f"{DOWN}.weight_shape", 0, 63), (DOWN, "weight_scale")),
    "a huge shape": ("compressed-tensors", with_value(f"{DOWN}.weight_shape", 1, 2**62), (DOWN,)),
    "a negative shape": ("compressed-tensors", with_value(f"{DOWN}.weight_shape", 1, -128), (DOWN,)),
    "a short zero point": (
        "compressed-tensors",
        turned(f"{DOWN}.weight_zero_point", lambda a: a[1:]),
        (DOWN, "zero_point"),
    ),
    "wide words": ("gptq", turned(f"{DOWN}.qweight", lambda a: a.astype(np.int64)), (DOWN, "qweight")),
    "integer scales": ("awq", turned(f"{DOWN}.scales", lambda a: a.astype(np.int32)), (DOWN,)),
    "a NaN scale": ("gptq", with_value(f"{DOWN}.scales", 5, np.nan), (DOWN, "NaN")),
    "an infinite scale": ("awq", with_value(f"{UP}.scales", 5, np.inf), (UP, "infinite")),
    "a NaN scale, compressed": ("compressed-tensors", with_value(f"{UP}.weight_scale", 5, np.nan), (UP, "NaN")),
    "a group that is not there": ("gptq", with_value(f"{DOWN}.g_idx", 77, 4), (f"{DOWN}.g_idx", "0..3")),
    "a negative group": ("gptq", with_value(f"{DOWN}.g_idx", 77, -3), (f"{DOWN}.g_idx",)),
    "a short g_idx": ("gptq", turned(f"{DOWN}.g_idx", lambda a: a[:-1]), (f"{DOWN}.g_idx",)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_damaged_tensors_are_refused_by_name(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path, name: str
) -> None:
    kind, change, words = TENSORS[name]
    model = make_checkpoint(tmp_path / "model", layers, kind)
    rewritten(model, change)
    for target in ("gptq_v2", "fp16", "compressed-tensors"):
        for verify in ("all", "none"):
            failed(convert(model, tmp_path / "out", "--to", target, "--verify", verify), 4, "BadInput", *words)
            nothing_left(tmp_path / "out")


def test_a_failed_run_is_not_in_the_way_of_the_next(convert: Convert, model: Path, tmp_path: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    assert convert(model, tmp_path / "out", "--to", "awq").exit_code == 4
    (model / "model.safetensors").write_bytes(whole)
    assert convert(model, tmp_path / "out", "--to", "awq").exit_code == 0


def test_an_output_that_was_there_stays_when_its_replacement_fails(
    convert: Convert, model: Path, tmp_path: Path
) -> None:
    assert convert(model, tmp_path / "out", "--to", "awq").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rewritten(model, with_value(f"{DOWN}.scales", 5, np.nan))
    failed(convert(model, tmp_path / "out", "--to", "gptq_v2", "--overwrite"), 4, "BadInput", DOWN)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


# --- damaged output: exit 8


@pytest.fixture
def meddle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`meddle(change)`: change(partial directory) runs when everything is written and nothing is verified."""
    from edgetool.converter import job

    real = job.verify

    def arrange(change: Callable[[Path], Any]) -> None:
        def verify(source: Any, output: Path, *arguments: Any, **options: Any) -> Any:
            change(output)
            return real(source, output, *arguments, **options)

        monkeypatch.setattr(job, "verify", verify)

    return arrange


def in_output(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    return lambda output: rewritten(output, change)


def flipped(name: str, place: int, bit: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        flat = tensors[name].reshape(-1)
        flat.view(f"u{flat.itemsize}")[place] ^= 1 << bit

    return change


def swapped(first: str, second: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def cut_short(output: Path) -> None:
    path = output / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def another_quantization_config(output: Path) -> None:
    path = output / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"] |= {"bits": 8}
    path.write_text(json.dumps(document))


def without_a_norm(tensors: dict[str, np.ndarray]) -> None:
    del tensors[NORM]


OUTPUTS = {
    "a flipped nibble": ("awq", in_output(flipped(f"{DOWN}.qweight", 77, 13)), (f"{DOWN}.qweight", "code ["), 1),
    "a flipped nibble, gptq": ("gptq_v2", in_output(flipped(f"{UP}.qweight", 3, 31)), (f"{UP}.qweight", "code ["), 1),
    "a flipped zero": ("gptq_v2", in_output(flipped(f"{UP}.qzeros", 1, 9)), (f"{UP}.qzeros", "weight ["), 1),
    "a flipped scale": ("awq", in_output(flipped(f"{UP}.scales", 50, 0)), (f"{UP}.scales", "weight ["), 1),
    "a flipped weight": ("fp16", in_output(flipped(f"{UP}.weight", 200, 1)), (f"{UP}.weight", "[3, 8]"), 1),
    "a flipped norm": ("awq", in_output(flipped(NORM, 9, 15)), (NORM, "value 9"), 1),
    "a flipped bias": ("bf16", in_output(flipped("model.layers.0.self_attn.q_proj.bias", 9, 2)), ("q_proj.bias",), 1),
    "swapped qzeros": ("awq", in_output(swapped(f"{GATE}.qzeros", f"{UP}.qzeros")), (f"{GATE}.qzeros",), 2),
    "swapped scales": ("gptq", in_output(swapped(f"{GATE}.scales", f"{UP}.scales")), (f"{GATE}.scales",), 2),
    "swapped linears": (
        "compressed-tensors",
        in_output(swapped(f"{GATE}.weight_packed", f"{UP}.weight_packed")),
        (f"{GATE}.weight_packed",),
        2,
    ),
    "a moved group": (
        "compressed-tensors",
        in_output(flipped(f"{UP}.weight_scale", 3, 14)),
        (f"{UP}.weight_scale",),
        1,
    ),
    "a truncated file": ("awq", cut_short, ("model.safetensors", "truncated"), None),
    "a lost tensor": ("awq", in_output(without_a_norm), (NORM, "missing"), None),
    "another shape": ("awq", in_output(turned(f"{DOWN}.qweight", lambda a: a[:-1])), (DOWN,), None),
    "turned words": ("gptq", in_output(turned(f"{DOWN}.qweight", lambda a: a.T)), (DOWN,), None),
    "another config": ("gptq", another_quantization_config, ("bits 8",), None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_thing_wrong_in_the_output_fails_verification_and_leaves_nothing(
    convert: Convert, model: Path, meddle: Callable[..., None], name: str
) -> None:
    target, change, words, wrong = OUTPUTS[name]
    output = model.parent / "out"
    meddle(change)
    for option in ((), ("--threads", "1")):
        document = failed(convert(model, output, "--to", target, *option), 8, "VerificationFailed", *words)
        nothing_left(output)
        if wrong is not None:
            assert document["tensors_compared"] - document["tensors_equal"] == wrong
            each = {"awq": 3, "fp16": 1, "bf16": 1}.get(target, 4)
            assert document["tensors_compared"] == 14 * each + 8
        assert (document["source_format"], document["format"]) == ("gptq", target)


def test_a_writer_that_loses_a_bit_is_found_out_by_verification_alone(
    convert: Convert, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetool.checkpoints.tensor_file import TensorFileWriter

    real = TensorFileWriter.write

    def write(self: TensorFileWriter, name: str, pieces: Any) -> None:
        if name == f"{DOWN}.qweight":
            pieces = [np.array(piece) for piece in ([pieces] if isinstance(pieces, np.ndarray) else pieces)]
            pieces[0].flat[5] ^= 1 << 20
        real(self, name, pieces)

    monkeypatch.setattr(TensorFileWriter, "write", write)
    output = sharded.parent / "out"
    failed(convert(sharded, output, "--to", "awq"), 8, "VerificationFailed", f"{DOWN}.qweight", "code [")
    nothing_left(output)
    result = convert(sharded, output, "--to", "awq", "--verify", "none")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["verify"], document["tensors_compared"], document["tensors_equal"]) == ("none", 0, 0)


@pytest.mark.parametrize("direction", ["into", "out of"])
def test_a_nibble_order_that_reader_and_writer_both_have_wrong_is_found_out(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """A round trip through edgetool's own code would be perfect; the plain reader has the order from elsewhere."""
    from edgetool.checkpoints import awq_format, awq_words

    kind, target = ("gptq", "awq") if direction == "into" else ("awq", "gptq")
    model = make_checkpoint(tmp_path / "model", layers, kind)
    assert convert(model, tmp_path / "right", "--to", target).exit_code == 0
    for module in (awq_words, awq_format):
        monkeypatch.setattr(module, "ORDER", (0, 1, 2, 3, 4, 5, 6, 7))
    failed(convert(model, tmp_path / "out", "--to", target), 8, "VerificationFailed", "is wrong", "must be")
    nothing_left(tmp_path / "out")


def test_a_source_that_changes_while_it_is_converted_is_found_out(
    convert: Convert, model: Path, meddle: Callable[..., None]
) -> None:
    meddle(lambda output: rewritten(model, flipped(f"{DOWN}.qweight", 77, 13)))
    output = model.parent / "out"
    failed(convert(model, output, "--to", "awq"), 8, "VerificationFailed", f"{DOWN}.qweight")
    nothing_left(output)


# --- what is left alone, and what goes where


def test_tensors_are_read_whatever_the_cut_into_shards(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path
) -> None:
    made = {}
    for shards in (1, 2, 5):
        model = make_checkpoint(tmp_path / f"model{shards}", layers, "awq", shards=shards)
        output = tmp_path / f"out{shards}"
        assert convert(model, output, "--to", "gptq", "--max-shard-size", "20kB").exit_code == 0
        made[shards] = {name: array.tobytes() for name, array in read_checkpoint(output).items()}
    assert made[1] == made[2] == made[5]


def test_a_tensor_that_is_in_the_way_of_a_new_name_is_refused(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path
) -> None:
    others = other_tensors(layers) | {f"{DOWN}.weight": np.zeros((64, 128), np.float16)}
    model = make_checkpoint(tmp_path / "model", layers, "gptq", others=others)
    failed(convert(model, tmp_path / "out", "--to", "fp16"), 4, "BadInput", f"{DOWN}.weight", "twice")
    nothing_left(tmp_path / "out")


def test_a_tensor_name_that_looks_like_a_path_stays_a_name(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path
) -> None:
    others = other_tensors(layers) | {"../../escape": np.ones(3, np.float16)}
    model = make_checkpoint(tmp_path / "model", layers, "gptq", others=others)
    assert convert(model, tmp_path / "deep" / "er" / "out", "--to", "awq").exit_code == 0
    assert "../../escape" in read_checkpoint(tmp_path / "deep" / "er" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "model"]


def test_write_shards_of_this_file_makes_what_the_reader_accepts(
    convert: Convert, layers: dict[str, Layer], tmp_path: Path
) -> None:
    """The undamaged counterpart of the damaged checkpoints above."""
    model = make_checkpoint(tmp_path / "model", layers, "gptq", shards=3)
    assert [path.name for path in sorted(model.glob("*.safetensors"))] == SHARDS
    write_shards(model, read_checkpoint(model), 3)
    assert convert(model, tmp_path / "out", "--to", "awq").exit_code == 0
