"""GGUF files as they are written: bytes by hand, and the gguf package's reader."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgetool.checkpoints.gguf.writer import FILE_TYPES, TYPE_NUMBERS, GgufFileWriter, tensor_bytes


def test_a_whole_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GgufFileWriter(path, {"a": 7, "b": ["x", "yz"]}, [("v", "F32", (3,)), ("w", "F16", (2, 1))]) as writer:
        writer.write("w", [np.array([[1.0], [2.0]], np.float16)])
        writer.write("v", [np.array([1, 2], np.float32), np.array([3], np.float32)])
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 2)
    header += struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    header += struct.pack("<Q", 1) + b"b" + struct.pack("<IIQ", 9, 8, 2)
    header += struct.pack("<Q", 1) + b"x" + struct.pack("<Q", 2) + b"yz"
    header += struct.pack("<Q", 1) + b"v" + struct.pack("<IQIQ", 1, 3, 0, 0)
    header += struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 1, 2, 1, 32)  # innermost dimension first
    header += bytes(-len(header) % 32)
    data = struct.pack("<3f", 1, 2, 3).ljust(32, b"\0") + struct.pack("<2e", 1, 2).ljust(32, b"\0")
    assert path.read_bytes() == header + data


def test_the_gguf_package_reads_all_metadata_and_tensors(tmp_path: Path) -> None:
    values = {"flag": True, "size": 1 << 31, "share": 0.5, "text": "naïve", "texts": ["ä", ""], "kinds": [3, 1, -1]}
    arrays = {
        "F32": np.arange(64, dtype=np.float32).reshape(2, 32),
        "F16": np.arange(64, dtype=np.float16).reshape(2, 32),
        "BF16": np.arange(64, dtype=np.uint16).reshape(2, 32),
        **{kind: np.arange(2 * size, dtype=np.uint8).reshape(2, size) for kind, size in BLOCKS.items()},
    }
    entries = [(f"t.{kind}", kind, (2, 32)) for kind in arrays]
    with GgufFileWriter(tmp_path / "m.gguf", {"general.architecture": "llama", **values}, entries) as writer:
        for kind, array in arrays.items():
            writer.write(f"t.{kind}", [array[:1], array[1:]])
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {key: reader.fields[key].contents() for key in values} == values
    for tensor, (kind, array) in zip(reader.tensors, arrays.items(), strict=True):
        assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == (f"t.{kind}", kind, [32, 2])
        assert tensor.data.tobytes() == array.tobytes()


BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}


def test_type_numbers_and_sizes_are_ggmls() -> None:
    for kind, number in TYPE_NUMBERS.items():
        assert gguf.GGMLQuantizationType[kind] == number
        values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert tensor_bytes(("t", kind, (3, 64))) == 3 * 64 // values * nbytes
    for kind, number in FILE_TYPES.items():
        name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
        assert gguf.LlamaFileType[name] == number


def test_the_order_of_writing_changes_nothing(tmp_path: Path) -> None:
    entries = [(name, "F32", (5,)) for name in "abc"]
    for order in ("abc", "cab"):
        with GgufFileWriter(tmp_path / order, {"k": 1}, entries) as writer:
            for name in order:
                writer.write(name, [np.full(5, ord(name), np.float32)])
    assert (tmp_path / "abc").read_bytes() == (tmp_path / "cab").read_bytes()


def test_mistakes_of_the_caller_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced twice"):
        GgufFileWriter(tmp_path / "m", {}, [("t", "F32", (1,)), ("t", "F32", (1,))])
    with pytest.raises(ValueError, match="no whole blocks"):
        GgufFileWriter(tmp_path / "m", {}, [("t", "Q4_0", (2, 48))])
    with GgufFileWriter(tmp_path / "m", {}, [("t", "F32", (2,))]) as writer:
        with pytest.raises(ValueError, match="4 of its 8 bytes"):
            writer.write("t", [np.zeros(1, np.float32)])
        with pytest.raises(ValueError, match="more than its 8 bytes"):
            writer.write("t", [np.zeros(3, np.float32)])
        with pytest.raises(KeyError):
            writer.write("u", [])
        writer.write("t", [np.zeros(2, np.float32)])
        with pytest.raises(ValueError, match="written twice"):
            writer.write("t", [np.zeros(2, np.float32)])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_removes_the_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), GgufFileWriter(tmp_path / "m", {}, [("t", "F32", (2,))]):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_never_written_is_an_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never written"), GgufFileWriter(tmp_path / "m", {}, [("t", "F32", (2,))]):
        pass
    assert not list(tmp_path.iterdir())
