"""The bytes of image and tree against plain loops, whatever the number of threads; what is left when a run stops."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.errors import BadInput, ResourceUnavailable, Stopped
from edgetool.fpga import writer
from edgetool.fpga.weights import PackedMatrix
from tests.fakes import naive_board
from tests.fakes.packed_checkpoints import read_safetensors, write_safetensors
from tests.fakes.quantized_models import Made, Shape, make_quantized
from tests.unit.fpga.conftest import compile_into

Compiled = Callable[..., tuple[Made, Path]]
BOARD = Shape(layers=2, hidden=128, ffn=2176, heads=2, kv_heads=1, head_dim=128, vocab=72)  # 17 groups: 2 packages
STEPS = {
    "q": "MVM_BN_write_to_HBM_bin/MVMBN0_q",
    "k": "MVM_BN_write_to_HBM_bin/MVMBN0_k",
    "v": "MVM_BN_write_to_HBM_bin/MVMBN0_v",
    "gate": "MVM_BN_write_to_HBM_bin/MVMBN1",
    "o": "MVM_BN_RES_write_to_HBM_bin/MVMBNRES0",
    "up": "MVM_BN_RES_write_to_HBM_bin/MVMBNRES1",
    "down": "MVM_BN_RES_write_to_HBM_bin/MVMBNRES2",
}  # from the design document, not from tree.py


def digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def module_of(role: str, layer: int) -> str:
    part = "mlp" if role in ("gate", "up", "down") else "self_attn"
    return f"model.layers.{layer}.{part}.{role}_proj"


@pytest.mark.parametrize("encoding", ["twos", "signmag"])
def test_every_file_of_the_tree_is_what_the_formulas_say(tmp_path: Path, encoding: str) -> None:
    how: dict[str, Any] = {"quantized_head": True, "lowest_code": 1, "biases": ("q", "k", "down")}
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128, **how)
    tree = tmp_path / "tree"
    compile_into(made.path, tree, profile="edgellm", emit="edgellm-tree", lm_head=None, int4=encoding)
    expected: dict[str, bytes] = {}
    for layer in range(BOARD.layers):
        block = f"BLOCK{layer:02d}"
        for role, step in STEPS.items():
            expected |= matrix_files(made, module_of(role, layer), f"{block}/{step}", encoding)
        for name, norm in (("LN0", "input_layernorm"), ("LN1", "post_attention_layernorm")):
            gamma = made.plain[f"model.layers.{layer}.{norm}.weight"]
            expected[f"{block}/LN_DDR_bin/{name}_wt_in_DDR.bin"] = naive_board.norm_file(gamma)
    expected |= matrix_files(made, "lm_head", "OutLayer/MVM_BN_write_to_HBM_bin/MVMBN_Argmax", encoding)
    expected["OutLayer/LN_DDR_bin/LN_wt_in_DDR.bin"] = naive_board.norm_file(made.plain["model.norm.weight"])
    found = {str(path.relative_to(tree)): path for path in tree.rglob("*.bin")}
    assert set(found) == set(expected)
    for name, content in expected.items():
        assert found[name].read_bytes() == content, name
    assert {path.name for path in tree.iterdir()} == {"BLOCK00", "BLOCK01", "OutLayer", "edgetool.json"}


def matrix_files(made: Made, module: str, step: str, encoding: str) -> dict[str, bytes]:
    weights, scales = naive_board.plain_codes(made.linears[module])
    ports = naive_board.ports_of(weights, scales, 128, encoding)
    files = {f"{step}_HBM_DDR_{port:02d}.bin": content for port, content in enumerate(ports)}
    bias = made.plain.get(f"{module}.bias")
    name = f"{step.replace('_write_to_HBM_bin', '_DDR_bin')}_wt_and_bias_in_DDR.bin"
    return files | {name: naive_board.bias_file(bias, len(weights))}


def test_the_image_holds_the_bytes_of_the_tree(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama", shape=BOARD, group_size=128)
    both = tmp_path / "both"
    compile_into(made.path, both, profile="edgellm")  # both is the default of this profile
    from edgetool.fpga.image import Image

    image = Image.open(both, hashes=True)
    record = image.tensors["layers.1.down"]
    for pc in range(32):
        tree = (both / f"BLOCK01/MVM_BN_RES_write_to_HBM_bin/MVMBNRES2_HBM_DDR_{pc:02d}.bin").read_bytes()
        assert bytes(image.port(pc)[record["addr"] : record["addr"] + len(tree)]) == tree
    bias = image.constant("layers.1.down.bias").tobytes()
    assert (both / "BLOCK01/MVM_BN_RES_DDR_bin/MVMBNRES2_wt_and_bias_in_DDR.bin").read_bytes() == bias


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ({}, {}),
        ({"format": "awq", "sym": False}, {}),
        ({"desc_act": ("q", "down", "o"), "same_order": False}, {}),
        ({"format": "awq", "sym": False}, {"requant": "sym"}),
        ({}, {"lm_head": "fp16"}),
    ],
)
def test_the_same_input_gives_the_same_bytes_for_any_number_of_jobs(
    compiled: Compiled, tmp_path: Path, how: dict[str, Any], settings: dict[str, Any]
) -> None:
    made, image = compiled("llama", settings, **how)
    compile_into(made.path, tmp_path / "many", jobs=7, **settings)
    assert digest(image) == digest(tmp_path / "many")


def test_blocks_of_any_size_give_the_same_bytes(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, image = compiled("llama")
    monkeypatch.setattr("edgetool.fpga.weights._BLOCK_BYTES", 1)  # 32 rows at a time
    compile_into(made.path, tmp_path / "small")
    assert digest(image) == digest(tmp_path / "small")


def test_an_unchanged_input_is_not_compiled_again_and_a_changed_image_is(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_quantized(tmp_path / "q", "llama")
    image = tmp_path / "image"
    first = compile_into(made.path, image)
    before = digest(image)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_all", None)  # nothing is written
        again = compile_into(made.path, image)
    assert (first["unchanged"], again["unchanged"]) == (False, True)
    assert {key: again[key] for key in ("kv_base", "estimate", "lm_head_error")} == {
        key: first[key] for key in ("kv_base", "estimate", "lm_head_error")
    }
    with pytest.raises(BadInput, match="exists already"):
        compile_into(made.path, image, max_context=96)
    with (image / "hbm/pc00.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(BadInput, match="exists already"):
        compile_into(made.path, image)
    compile_into(made.path, image, overwrite=True)
    assert digest(image) == before


def test_bad_weights_found_on_the_way_leave_nothing_behind(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama")
    path = made.path / "model.safetensors"
    tensors = read_safetensors(path)
    tensors["model.norm.weight"][5] = np.inf
    write_safetensors(path, tensors)
    with pytest.raises(BadInput, match=r"model\.norm\.weight: 1 of 192 values are NaN or infinite"):
        compile_into(made.path, tmp_path / "image")
    assert [one.name for one in tmp_path.iterdir()] == ["q"]


def test_a_scale_of_nan_is_refused_by_name(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama")
    path = made.path / "model.safetensors"
    tensors = read_safetensors(path)
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = np.nan
    write_safetensors(path, tensors)
    with pytest.raises(BadInput, match=r"NaN or infinite.*model\.layers\.1\.mlp\.up_proj"):
        compile_into(made.path, tmp_path / "image")
    assert [one.name for one in tmp_path.iterdir()] == ["q"]


class _StopAt:
    """Stops a run, as Ctrl-C does, when the block after `count` blocks is about to be made."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[threading.Event] = []
        self.count = count
        blocks = PackedMatrix.blocks
        event = threading.Event()
        self.event = event

        def counted(matrix: PackedMatrix, jobs: Any) -> Iterator[np.ndarray]:
            for block in blocks(matrix, jobs):
                self.count -= 1
                if self.count < 0:
                    event.set()
                yield block

        monkeypatch.setattr(PackedMatrix, "blocks", counted)

    def requests(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def stop_requests() -> Iterator[threading.Event]:
            yield self.event

        return stop_requests


@pytest.mark.parametrize("count", [0, 1, 5, 13])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_stopped_run_keeps_what_is_done_and_goes_on_to_the_same_bytes(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, jobs: int
) -> None:
    made, image = compiled("llama")
    with monkeypatch.context() as patch:
        stopping = _StopAt(count, patch)
        patch.setattr("edgetool.fpga.job.stop_requests", stopping.requests())
        with pytest.raises(Stopped, match="of 15 matrices, all kept"):
            compile_into(made.path, tmp_path / "image", jobs=jobs)
    assert {one.name for one in tmp_path.iterdir()} == {"image.partial"}
    with pytest.raises(BadInput, match="an unfinished run is in the way"):
        compile_into(made.path, tmp_path / "image")
    result = compile_into(made.path, tmp_path / "image", resume=True, jobs=jobs)
    assert result["resumed_matrices"] >= max(0, count - jobs)
    assert digest(tmp_path / "image") == digest(image)


def test_what_a_killed_run_left_is_read_and_not_believed(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, image = compiled("llama")
    with monkeypatch.context() as patch:
        stopping = _StopAt(12, patch)
        patch.setattr("edgetool.fpga.job.stop_requests", stopping.requests())
        with pytest.raises(Stopped):
            compile_into(made.path, tmp_path / "image")
    partial = tmp_path / "image.partial"
    for name in ("hbm/pc00.bin", "hbm/pc20.bin"):  # as after a power failure: pages that never reached the disk
        size = (partial / name).stat().st_size
        (partial / name).write_bytes(bytes(size))
    result = compile_into(made.path, tmp_path / "image", resume=True)
    assert result["resumed_matrices"] == 0
    assert digest(tmp_path / "image") == digest(image)


def test_another_configuration_does_not_take_up_an_unfinished_run(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = compiled("llama")
    with monkeypatch.context() as patch:
        stopping = _StopAt(5, patch)
        patch.setattr("edgetool.fpga.job.stop_requests", stopping.requests())
        with pytest.raises(Stopped):
            compile_into(made.path, tmp_path / "image")
    with pytest.raises(BadInput, match=r"has another settings\.max_context"):
        compile_into(made.path, tmp_path / "image", resume=True, max_context=96)
    assert (tmp_path / "image.partial").is_dir()  # still there for who asks as before


def test_rounding_again_ends_where_convert_ends(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama", format="awq", sym=False)
    compile_into(made.path, tmp_path / "image", requant="sym")
    from edgetool.checkpoints.checkpoint import Checkpoint
    from edgetool.checkpoints.detect import detect, read_linear
    from edgetool.checkpoints.requant import requantize
    from edgetool.fpga.image import Image
    from edgetool.fpga.scalar_reader import ScalarReader

    checkpoint, image = Checkpoint.open(made.path), Image.open(tmp_path / "image")
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    module = "model.layers.1.mlp.down_proj"
    linear = read_linear(checkpoint, module, found)
    whole = requantize(linear.dequantize(), bits=4, group_size=32, sym=True, origin=linear).linear
    reader = ScalarReader([image.port(pc) for pc in range(32)], image.tensors["layers.1.down"])
    rows = np.arange(192)
    assert np.array_equal(reader.codes(rows), whole.codes.astype(np.int8) - 8)
    assert np.array_equal(reader.scales(rows)[0], whole.scales)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr("edgetool.fpga.weights._BLOCK_BYTES", 1 << 16)
    peaks = []
    for layers in (2, 12):
        shape = Shape(layers, hidden=256, ffn=1024, heads=2, kv_heads=1, head_dim=128, vocab=64)
        made = make_quantized(tmp_path / f"q{layers}", "llama", shape=shape, group_size=128)
        largest = max(path.stat().st_size for path in made.path.iterdir())
        tracemalloc.start()
        compile_into(made.path, tmp_path / f"image{layers}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert largest > 5e6  # of the larger checkpoint
    # 10 layers more are 4.5 MB more of codes; the plan itself takes some KB a layer
    assert peaks[1] - peaks[0] < 0.5e6


def test_what_fp16_cannot_hold_of_scales_is_reported(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "llama", format="compressed-tensors", scale_dtype="F32", group_size=64)
    result = compile_into(made.path, tmp_path / "image")
    losses = {record["tensor"]: record for record in result["fp16_losses"]}
    assert set(losses) == {f"{module}.scales" for module in made.linears}
    for module, linear in made.linears.items():
        exact = linear.scales.astype(np.float16).astype(np.float32) == linear.scales
        assert losses[f"{module}.scales"]["changed"] == int((~exact).sum())
        assert losses[f"{module}.scales"]["largest_relative_change"] < 2.0**-11


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_quantized(tmp_path / "q", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ResourceUnavailable, match="of disk"):
        compile_into(made.path, tmp_path / "image")
    assert [one.name for one in tmp_path.iterdir()] == ["q"]
