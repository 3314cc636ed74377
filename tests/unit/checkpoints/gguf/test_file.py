"""An opened GGUF file: its header and rows against the gguf package's reader, and damage of every kind."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgetool.checkpoints.gguf.file import GgufFile, GgufTensor
from edgetool.errors import BadInput, EdgetoolError
from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model

Kind = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model(directory / "model", "llama", tied=False)
    every = {
        "x.list": [1, 2, 3],
        "x.floats": [0.5, -1.0],
        "x.texts": ["a", "", "ö"],
        "x.flag": True,
        "x.text": "naïve",
    }
    return write_tiny_gguf(directory / "m.gguf", model, kind=Kind.Q4_0, metadata=every)


def test_metadata_and_tensors_are_those_the_gguf_package_reads(path: Path) -> None:
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata.items()) == list(expected.items())
    assert list(ours.tensors.values()) == [
        GgufTensor(t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    ]


def test_every_kind_of_number_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {"uint8": 250, "int8": -7, "uint16": 65000, "int16": -9, "uint32": 4_000_000_000, "int32": -5}
    values |= {"float32": 0.25, "uint64": 1 << 60, "int64": -(1 << 60), "float64": 0.1, "bool": True}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile.open(tmp_path / "m.gguf").metadata
    assert {key: metadata[f"a.{key}"] for key in values} == values


@pytest.mark.parametrize(
    "wanted", [range(3, 9), np.array([5, 4, 9, 5]), np.array([0, 63]), np.array([63, 0, 31]), range(0)]
)
def test_any_rows_are_read_in_the_order_asked_for(path: Path, wanted: range | np.ndarray) -> None:
    file = GgufFile.open(path)
    tensor = file.tensors["blk.0.attn_q.weight"]
    data = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == tensor.name)
    np.testing.assert_array_equal(file.rows(tensor, wanted), data[np.asarray(wanted, dtype=int)])
    if len(wanted):
        expected = gguf.dequantize(data[np.asarray(wanted)], Kind.Q4_0)
        np.testing.assert_array_equal(file.float32(tensor, wanted), expected)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    file = GgufFile.open(copy)
    tensor = list(file.tensors.values())[-1]
    copy.write_bytes(path.read_bytes()[: tensor.offset + 1])
    with pytest.raises(BadInput, match="became shorter"):
        file.rows(tensor, range(tensor.rows))


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _file(metadata: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + metadata + tensors + bytes(256)


DAMAGED = {
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1;": (_file(version=1), "version 1"),
    "too many metadata": (_file(counts=(0, 1 << 60)), "truncated|twice"),
    "too many tensors": (_file(counts=(1 << 60, 0)), "dimensions"),
    "text beyond the end": (_file(struct.pack("<Q", 1 << 62), counts=(0, 1)), "truncated"),
    "array beyond the end": (
        _file(_string("a") + struct.pack("<IIQ", 9, 10, 1 << 61), counts=(0, 1)),
        "truncated",
    ),
    "unknown value": (_file(_string("a") + struct.pack("<I", 77), counts=(0, 1)), "type 77"),
    "array of arrays": (_file(_string("a") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "type 9"),
    "no UTF-8": (_file(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), counts=(0, 1)), "utf-8"),
    "key twice": (_file(2 * (_string("a") + struct.pack("<II", 4, 1)), counts=(0, 2)), "'a' twice"),
    "alignment": (
        _file(_string("general.alignment") + struct.pack("<II", 4, 24), counts=(0, 1)),
        "power of two",
    ),
    "tensor twice": (_file(tensors=2 * _tensor(), counts=(2, 0)), "two tensors"),
    "unknown type": (_file(tensors=_tensor(kind=200), counts=(1, 0)), "type 200"),
    "half a block": (_file(tensors=_tensor(shape=(48, 2), kind=2), counts=(1, 0)), "no whole blocks of Q4_0"),
    "empty": (_file(tensors=_tensor(shape=(32, 0)), counts=(1, 0)), "no whole blocks"),
    "five dimensions": (_file(tensors=_tensor(shape=(1, 1, 1, 1, 32)), counts=(1, 0)), "5 dimensions"),
    # 2**33 * 2**33 is 0 in 64 bits
    "size that wraps around": (_file(tensors=_tensor(shape=(1 << 33, 1 << 33)), counts=(1, 0)), "truncated"),
    "tensor beyond the end": (_file(tensors=_tensor(offset=1 << 40), counts=(1, 0)), "truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_the_file(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        GgufFile.open(damaged)
    assert str(damaged) in caught.value.message


def test_no_damage_of_the_header_ends_in_anything_but_an_error_for_users(path: Path, tmp_path: Path) -> None:
    from edgetool.converter.gguf_source import GgufSource

    whole = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in GgufFile.open(path).tensors.values())
    damaged, dice = tmp_path / "m.gguf", random.Random(7)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(dice.choice((1, 1, 4, 64))):
            # the beginning holds counts, numbers and keys; the rest is mostly tokens
            content[dice.randrange(dice.choice((200, 1500, header_bytes)))] = dice.randrange(256)
        damaged.write_bytes(content)
        try:
            GgufSource.open(damaged)
        except EdgetoolError as error:
            assert error.exit_code == 4
            refused += 1
    assert refused > 50
