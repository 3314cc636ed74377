"""The byte format, against the official safetensors library in both directions."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from edgetool.checkpoints import tensor_file
from edgetool.checkpoints.tensor_file import (
    NUMPY_DTYPES,
    TensorFileWriter,
    iter_chunks,
    read_header,
    read_rows,
    read_tensor,
    to_float32,
    write_tensor_file,
)
from edgetool.errors import BadInput

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def _random(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    kind = NUMPY_DTYPES[dtype]
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count * kind.itemsize, dtype=np.uint8)
    if dtype == "BOOL":
        raw &= 1
    return raw.view(kind).reshape(shape)


def _official_bytes(tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str] | None) -> bytes:
    return save(
        {
            name: torch.from_numpy(array.reshape(-1).view(np.uint8)).view(TORCH_DTYPES[dtype]).reshape(array.shape)
            for name, (dtype, array) in tensors.items()
        },
        metadata,
    )


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_reads_what_the_official_library_writes(tmp_path: Path, dtype: str) -> None:
    array = _random(dtype, (3, 5))
    path = tmp_path / "x.safetensors"
    path.write_bytes(_official_bytes({"a": (dtype, array)}, None))
    info = read_header(path)["a"]
    assert (info.dtype, info.shape, info.nbytes) == (dtype, (3, 5), array.nbytes)
    assert read_tensor(info).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_the_official_library_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    array = _random(dtype, (3, 5))
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {"a": (dtype, array)})
    [(name, entry)] = safetensors.deserialize(path.read_bytes())
    assert (name, entry["dtype"], entry["shape"], bytes(entry["data"])) == ("a", dtype, [3, 5], array.tobytes())


def test_torch_tensors_come_through_with_their_values(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(4, 6).half(),
        "brain": torch.randn(4, 6).bfloat16(),
        "single": torch.randn(4, 6),
        "double": torch.randn(4, 6).double(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 6),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    for name, info in read_header(tmp_path / "x.safetensors").items():
        values = to_float32(read_tensor(info), info.dtype)
        np.testing.assert_array_equal(values, tensors[name].float().numpy())
        assert values.dtype == np.float32


names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
contents = st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), shapes), max_size=6)


@given(contents, st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_bytes_are_those_of_the_official_library(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, tuple[str, tuple[int, ...]]], marked: bool
) -> None:
    path = tmp_path_factory.mktemp("same") / "x.safetensors"
    tensors = {name: (dtype, _random(dtype, shape, seed)) for seed, (name, (dtype, shape)) in enumerate(chosen.items())}
    metadata = {"format": "pt"} if marked else {}
    write_tensor_file(path, tensors, metadata)
    assert path.read_bytes() == _official_bytes(tensors, metadata or None)
    found = read_header(path)
    assert set(found) == set(tensors)
    for name, info in found.items():
        assert read_tensor(info).tobytes() == tensors[name][1].tobytes()


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_header_is_refused_or_means_what_the_official_library_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = _official_bytes({"a": ("F32", _random("F32", (2, 3))), "b": ("I8", _random("I8", (5,)))}, {"format": "pt"})
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 30))] = data.draw(st.integers(0, 255))
    changed = changed[: len(changed) - data.draw(st.sampled_from([0, 0, 0, 1, 7, 40]))]
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(changed)
    try:
        ours = {
            name: (info.dtype, list(info.shape), read_tensor(info).tobytes())
            for name, info in read_header(path).items()
        }
    except BadInput as error:
        assert str(path) in error.message
        return
    official = {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for name, entry in safetensors.deserialize(bytes(changed))
    }
    assert ours == official


def test_rows_are_gathered_in_the_order_asked_for_reading_only_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(100, 8).bfloat16()
    save_file({"embed": table, "flat": torch.arange(9)}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors")
    moved = []
    preadv = os.preadv
    monkeypatch.setattr(tensor_file.os, "preadv", lambda *args: moved.append(preadv(*args)) or moved[-1])
    for rows in ([7], [99, 0, 7, 7, 8, 9], []):
        moved.clear()
        got = read_rows(infos["embed"], np.array(rows, dtype=np.int64))
        np.testing.assert_array_equal(got, table[rows].view(torch.uint16).numpy())
        assert sum(moved) == len(set(rows)) * 16
    np.testing.assert_array_equal(read_rows(infos["flat"], np.array([3, 1])), [3, 1])


@pytest.mark.parametrize("rows", [[-1], [100], [0, 100]])
def test_a_row_outside_the_tensor_is_refused_by_name(tmp_path: Path, rows: list[int]) -> None:
    save_file({"embed": torch.zeros(100, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="'embed' of shape"):
        read_rows(read_header(tmp_path / "x.safetensors")["embed"], np.array(rows))


def test_chunks_are_bounded_and_make_up_the_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1001, dtype=torch.int32)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    chunks = list(iter_chunks(info, 256))
    assert max(chunk.nbytes for chunk in chunks) <= 256
    np.testing.assert_array_equal(np.concatenate(chunks), np.arange(1001))
    assert [chunk.size for chunk in iter_chunks(info, 1)] == [1] * 1001


def test_the_order_of_writing_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {f"t{number}": (dtype, _random(dtype, (3,), number)) for number, dtype in enumerate(NUMPY_DTYPES)}
    entries = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    for path, order in ((tmp_path / "a", list(tensors)), (tmp_path / "b", list(reversed(tensors)))):
        with TensorFileWriter(path, entries) as writer:
            for name in order:
                writer.write(name, tensors[name][1])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pieces_and_strided_arrays_are_stored_in_row_major_order(tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    with TensorFileWriter(tmp_path / "x", [("pieces", "I32", (3, 4)), ("strided", "I32", (4, 3))]) as writer:
        writer.write("pieces", iter([table[:1], table[1:2].tobytes(), memoryview(table[2:])]))
        writer.write("strided", table.T)
    read = load_file(tmp_path / "x")
    np.testing.assert_array_equal(read["pieces"].numpy(), table)
    np.testing.assert_array_equal(read["strided"].numpy(), table.T)


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    tensors = {dtype: (dtype, _random(dtype, (3,))) for dtype in NUMPY_DTYPES}
    write_tensor_file(tmp_path / "x", tensors)
    for info in read_header(tmp_path / "x").values():
        assert info.offset % NUMPY_DTYPES[info.dtype].itemsize == 0


@pytest.mark.parametrize("data", [np.zeros((2, 2), np.int8), np.zeros((2, 3), np.int16), [b"12345"], [b"1234567"]])
def test_data_that_is_not_as_announced_is_refused_and_no_file_remains(tmp_path: Path, data: object) -> None:
    with pytest.raises(ValueError, match="'a'"), TensorFileWriter(tmp_path / "x", [("a", "I8", (2, 3))]) as writer:
        writer.write("a", data)
    assert not (tmp_path / "x").exists()


def test_a_tensor_left_out_twice_written_or_twice_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never written"), TensorFileWriter(tmp_path / "x", [("a", "I8", (1,))]):
        pass
    with pytest.raises(ValueError, match="twice"), TensorFileWriter(tmp_path / "y", [("a", "I8", (1,))]) as writer:
        writer.write("a", np.zeros(1, np.int8))
        writer.write("a", np.zeros(1, np.int8))
    with pytest.raises(ValueError, match="twice"):
        TensorFileWriter(tmp_path / "z", [("a", "I8", (1,)), ("a", "I8", (1,))])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_tensor_file(tmp_path / "x", {"a": ("I8", np.zeros(1, np.int8))})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_float8_is_not_taken_for_weights() -> None:
    with pytest.raises(BadInput, match="F8_E4M3"):
        to_float32(np.zeros(3, np.uint8), "F8_E4M3")
