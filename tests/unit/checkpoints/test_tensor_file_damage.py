"""Every kind of damage to a safetensors file is one BadInput that names the file, and the tensor at fault if any."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from edgetool.checkpoints.tensor_file import read_header, read_tensor
from edgetool.errors import BadInput

GOOD = {
    "first": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "second": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
}


def _file(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _changed(name: str, **values: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **values}}


def test_the_undamaged_file_is_accepted(tmp_path: Path) -> None:
    assert list(read_header(_file(tmp_path / "x", GOOD))) == ["first", "second"]


ENTRY = json.dumps(GOOD["first"])
DAMAGE = {
    "offsets overlap": (_changed("second", data_offsets=[12, 20]), "'second' overlaps tensor 'first'"),
    "hole": (_changed("second", data_offsets=[20, 28]), "hole of 4 bytes before tensor 'second'"),
    "size is not shape times dtype": (_changed("first", shape=[2, 3]), "'first': F32 of shape .* takes 24 bytes"),
    "end before begin": (_changed("first", data_offsets=[16, 0]), "'first'"),
    "negative offset": (_changed("first", data_offsets=[-16, 0]), "'first': data_offsets"),
    "negative shape": (_changed("first", shape=[-2, -2]), "'first': shape"),
    "shape of booleans": (_changed("first", shape=[True, 4]), "'first': shape"),
    "shape of floats": (_changed("first", shape=[2.0, 2]), "'first': shape"),
    "enormous shape": (_changed("first", shape=[1 << 62, 1 << 62]), "'first'"),
    "unknown dtype": (_changed("first", dtype="F31"), "'first': unknown dtype 'F31'"),
    "dtype is a list": (_changed("first", dtype=["F32"]), "'first': unknown dtype"),
    "entry without offsets": ({"first": {"dtype": "F32", "shape": [1]}}, "'first': entry"),
    "entry is a number": ({"first": 3}, "'first': entry"),
    "same name twice": (f'{{"first": {ENTRY}, "first": {ENTRY}}}'.encode(), "'first' twice"),
    "header is a list": ([1, 2], "not a JSON object"),
    "header is not JSON": (b'{"first": ', "not valid JSON"),
    "header is not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "header nests without end": (b"[" * 100_000, "not valid JSON"),
    "header holds a number without end": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "metadata is not strings": ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_header_is_refused(tmp_path: Path, damage: str) -> None:
    header, message = DAMAGE[damage]
    with pytest.raises(BadInput, match=message) as caught:
        read_header(_file(tmp_path / "weights.safetensors", header))
    assert "weights.safetensors" in caught.value.message
    assert caught.value.hint


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"beyond the file's end .*truncated"):
        read_header(_file(tmp_path / "x", GOOD, length=10_000))
    with pytest.raises(BadInput, match="over the limit"):
        read_header(_file(tmp_path / "x", GOOD, length=1 << 62))


@pytest.mark.parametrize("kept", [0, 3, 8, 9, 100])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    path = _file(tmp_path / "x", GOOD)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=str(path)):
        read_header(path)


@pytest.mark.parametrize(("spare", "message"), [(-1, "truncated: tensor 'second'"), (1, "belong to no tensor")])
def test_a_file_too_short_or_too_long_for_its_tensors_is_refused(tmp_path: Path, spare: int, message: str) -> None:
    path = _file(tmp_path / "x", GOOD, bytes(24 + spare))
    with pytest.raises(BadInput, match=message):
        read_header(path)
    with pytest.raises(SafetensorError):  # the official library agrees
        deserialize(path.read_bytes())


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(BadInput, match="cannot be read"):
        read_header(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "x", GOOD)
    info = read_header(path)["second"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="'second' is cut off"):
        read_tensor(info)
