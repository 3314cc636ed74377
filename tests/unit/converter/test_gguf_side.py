"""Verification of GGUF files: every single difference is found, whatever the type, and named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgetool.checkpoints.gguf.file import GgufFile
from edgetool.converter import gguf_target
from edgetool.converter.gguf_side import GgufSide
from edgetool.converter.gguf_source import GgufSource
from edgetool.converter.gguf_target import plan_gguf, write_gguf
from edgetool.converter.verify import Meant, Verified, open_side, verify
from edgetool.errors import BadInput, VerificationFailed
from tests.fakes.tiny_gguf import write_tiny_gguf
from tests.fakes.tiny_models import make_tiny_model

Kind = gguf.GGMLQuantizationType
PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(directory / family, family, tied=False) for family in PRE}


class Pair:
    """A GGUF file and its copy by edgetool."""

    def __init__(self, directory: Path, model: Path, family: str = "llama", kind: Kind = Kind.Q4_0) -> None:
        self.given = write_tiny_gguf(directory / "given.gguf", model, pre=PRE[family], kind=kind)
        self.source = GgufSource.open(self.given)
        self.made = directory / "made" / "model.gguf"
        self.made.parent.mkdir()
        self.write()

    def write(self) -> None:
        write_gguf(self.source, plan_gguf(self.source), self.made)

    def verify(self) -> Verified:
        sizes = {name: (layout.bits, layout.group_size) for name, layout in self.source.layouts.items()}
        return verify(open_side(self.given, "gguf", sizes), self.made.parent, Meant("gguf", sizes))

    def fails(self, *words: str) -> None:
        with pytest.raises(VerificationFailed) as caught:
            self.verify()
        for word in words:
            assert word in caught.value.message, caught.value.message

    def change(self, name: str, change: Callable[[np.ndarray], None]) -> None:
        """Let `change` alter the stored rows of a tensor of the copy, uint8 [rows, row_bytes]."""
        file = GgufFile.open(self.made)
        tensor = file.tensors[name]
        rows = file.rows(tensor, range(tensor.rows))
        change(rows)
        content = bytearray(self.made.read_bytes())
        content[tensor.offset : tensor.offset + tensor.nbytes] = rows.tobytes()
        self.made.write_bytes(content)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.F16, Kind.BF16])
@pytest.mark.parametrize("family", PRE)
def test_a_true_copy_is_found_equal_in_all_of_its_tensors(
    tmp_path: Path, models: dict[str, Path], family: str, kind: Kind
) -> None:
    pair = Pair(tmp_path, models[family], family, kind)
    count = len(GgufFile.open(pair.made).tensors)
    assert pair.verify() == Verified(count, count)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "blk.0.ffn_down.weight"])
def test_one_flipped_bit_is_found(tmp_path: Path, models: dict[str, Path], kind: Kind, name: str) -> None:
    pair = Pair(tmp_path, models["llama"], kind=kind)

    def flip(rows: np.ndarray) -> None:
        rows[-1, -1] ^= 0x10

    pair.change(name, flip)
    pair.fails(f"{name} weight ")


def test_swapped_rows_scales_and_norms_are_found(tmp_path: Path, models: dict[str, Path]) -> None:
    def swap_rows(rows: np.ndarray) -> None:
        rows[[3, 4]] = rows[[4, 3]]

    def swap_scales(rows: np.ndarray) -> None:
        rows[0, :2], rows[0, 18:20] = rows[0, 18:20].copy(), rows[0, :2].copy()

    def nudge(rows: np.ndarray) -> None:
        rows.view(np.float32)[0, 5] = np.nextafter(rows.view(np.float32)[0, 5], np.float32(9))

    for number, (name, change) in enumerate(
        {"blk.0.attn_q.weight": swap_rows, "blk.0.attn_v.weight": swap_scales, "output_norm.weight": nudge}.items()
    ):
        (tmp_path / str(number)).mkdir()
        pair = Pair(tmp_path / str(number), models["llama"])
        pair.change(name, change)
        pair.fails("is wrong")


def test_rows_left_in_hugging_faces_order_are_found(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tmp_path, models["llama"])
    monkeypatch.setattr(gguf_target, "gguf_rows", lambda name, config: None)
    pair.write()
    pair.fails("blk.0.attn_k.weight weight [1, 0]")  # row 1 is the first that moves


def test_a_tensor_missing_or_too_much_is_found(tmp_path: Path, models: dict[str, Path]) -> None:
    pair = Pair(tmp_path, models["llama"])
    whole = pair.made.read_bytes()
    pair.made.write_bytes(whole.replace(b"blk.0.attn_norm.weight", b"blk.0.attn_nerm.weight"))
    pair.fails("attn_n")
    pair.made.write_bytes(whole.replace(b"blk.0.attn_v.weight", b"blk.9.attn_v.weight"))
    pair.fails("model.layers.0.self_attn.v_proj is not quantised in the output")


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -40_000, -1])
def test_an_output_that_was_cut_off_is_a_failure_of_verification(
    tmp_path: Path, models: dict[str, Path], kept: int
) -> None:
    pair = Pair(tmp_path, models["llama"])
    # the last tensor's padding carries nothing, so what is cut off here reaches into it
    tensor = list(GgufFile.open(pair.made).tensors.values())[-1]
    pair.made.write_bytes(pair.made.read_bytes()[: tensor.offset + tensor.nbytes][:kept])
    pair.fails()


def test_pieces_have_the_length_asked_for(tmp_path: Path, models: dict[str, Path]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], kind=Kind.Q4_0)
    side = GgufSide.open(path, [])
    values = side.plain["model.layers.0.self_attn.q_proj.weight"]
    whole = np.concatenate(list(values.pieces(64 * 64)))
    for count in (1000, 64, 100, 5000):
        pieces = list(values.pieces(count))
        assert {len(piece) for piece in pieces[:-1]} <= {count}
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_damaged_count_is_an_error_and_not_an_endless_loop(tmp_path: Path, models: dict[str, Path]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", models["llama"], metadata={"llama.block_count": 1 << 31})
    with pytest.raises(BadInput, match="too few"):
        GgufSide.open(path, [])
    content = path.read_bytes()
    place = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path.write_bytes(content[:place] + struct.pack("<Q", 1 << 60) + content[place + 8 :])
    with pytest.raises(BadInput, match="truncated"):
        GgufSide.open(path, [])


def test_the_tables_of_both_readers_agree(tmp_path: Path, models: dict[str, Path]) -> None:
    for family, model in models.items():
        path = write_tiny_gguf(tmp_path / f"{family}.gguf", model, pre=PRE[family])
        source = GgufSource.open(path)
        side = GgufSide.open(path, source.layouts)
        assert set(side.modules) == set(source.layouts)
        assert {name: values.shape for name, values in side.plain.items()} == {
            name: tensor.shape for name, tensor in source.plain.items()
        }
        assert json.dumps(side.metadata) == json.dumps(source.file.metadata)
