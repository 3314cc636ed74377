"""Weight files of a conversion: what is in them, how they are cut, and how writing them ends early."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.converter import write as write_module
from edgetool.converter.plan import make_plan
from edgetool.converter.source import CheckpointSource, PlainTensor
from edgetool.converter.write import Abandoned, converted, cut, write_weights
from edgetool.errors import BadInput
from edgetool.ledger import RunLedger
from edgetool.progress import NullProgress, RecordingProgress
from tests.fakes.packed_checkpoints import (
    Layer,
    bfloat16,
    make_checkpoint,
    other_tensors,
    random_layers,
    read_checkpoint,
    read_safetensors,
)


class Job:
    """A conversion up to its weight files, in the directory `out`."""

    def __init__(self, tmp_path: Path, target: str = "awq", **layers: Any) -> None:
        self.layers = random_layers(**layers)
        self.source = CheckpointSource.open(make_checkpoint(tmp_path / "source", self.layers, "gptq"))
        self.plan = make_plan(self.source, target, progress=NullProgress())
        self.out = tmp_path / "out"
        self.out.mkdir()
        self.finished: list[str] = []
        self.ledger = RunLedger.open(self.out / "ledger.jsonl", {})

    def write(self, max_shard_bytes: int = 10**9, **options: Any) -> None:
        chosen: dict[str, Any] = {
            "threads": 2,
            "stop_requested": lambda: False,
            "written": lambda path: self.finished.append(path.name),
            "remembered": lambda names: {},
            "progress": NullProgress(),
        } | options
        write_weights(self.source, self.plan, cut(self.plan, max_shard_bytes), self.out, self.ledger, **chosen)


def expected(layers: dict[str, Layer], target: str) -> dict[str, np.ndarray]:
    tensors = dict(other_tensors(layers))
    for module, layer in layers.items():
        tensors |= {f"{module}.{suffix}": array for suffix, array in layer.tensors(target).items()}
    return tensors


def assert_equal(made: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert made.keys() == wanted.keys()
    for name, array in wanted.items():
        assert made[name].tobytes() == array.tobytes(), name
        assert (made[name].dtype, made[name].shape) == (array.dtype, array.shape), name


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("max_shard_bytes", [1, 9000, 10**9])
def test_files_hold_the_oracles_bytes_however_they_are_cut(max_shard_bytes: int, threads: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    progress = RecordingProgress()
    job.write(max_shard_bytes, threads=threads, progress=progress)
    assert_equal(read_checkpoint(job.out), expected(job.layers, "awq"))
    assert job.finished == [name for name, _ in cut(job.plan, max_shard_bytes)]
    assert [record["shard"] for record in job.ledger.having("shard")] == job.finished
    assert sum(value for kind, _, value in progress.events if kind == "advance") == job.plan.output_bytes
    for path in job.out.glob("*.safetensors"):
        names = read_safetensors(path).keys()
        modules = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
        assert {f"{module}.{suffix}" for module in modules for suffix in ("scales", "qzeros")} <= names


def test_finished_files_are_left_alone_and_the_index_is_whole(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.write(9000)
    names = list(job.finished)
    kept, lost = job.out / names[0], job.out / names[1]
    before = kept.stat().st_mtime_ns
    lost.write_bytes(b"torn")
    job.ledger.records = [record for record in job.ledger.records if record.get("shard") != names[1]]
    (job.out / "model.safetensors.index.json").unlink()
    job.finished.clear()
    job.write(9000)
    assert kept.stat().st_mtime_ns == before
    assert job.finished == names
    assert_equal(read_checkpoint(job.out), expected(job.layers, "awq"))
    assert (job.out / "model.safetensors.index.json").is_file()


def test_a_stop_removes_the_file_at_hand_and_keeps_those_before(tmp_path: Path) -> None:
    job = Job(tmp_path)
    names = [name for name, _ in cut(job.plan, 9000)]
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(job.finished) == 2

    with pytest.raises(Abandoned):
        job.write(9000, stop_requested=stop)
    assert sorted(path.name for path in job.out.glob("*.safetensors")) == names[:2]
    assert [record["shard"] for record in job.ledger.having("shard")] == names[:2]
    job.write(9000)
    assert_equal(read_checkpoint(job.out), expected(job.layers, "awq"))


def test_an_error_in_a_thread_comes_out_and_its_file_is_removed(tmp_path: Path) -> None:
    job = Job(tmp_path)

    def broken() -> Any:
        yield np.zeros(4, np.float16)
        raise BadInput("the disk has a hole")

    name = "model.norm.weight"
    job.source.plain[name] = PlainTensor(name, "F16", (64,), broken)  # type: ignore[index]
    with pytest.raises(BadInput, match="the disk has a hole"):
        job.write()
    assert not list(job.out.glob("*.safetensors"))
    assert not job.ledger.having("shard")


def test_what_is_in_flight_stays_within_the_memory_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    largest = max(unit.work_bytes for unit in job.plan.units)
    monkeypatch.setattr(write_module, "_IN_FLIGHT_BYTES", 2 * largest)
    sizes = {unit.name: unit.work_bytes for unit in job.plan.units}
    lock, now, most = threading.Lock(), [0], [0]

    def watched(source: Any, plan: Any, name: str, scratch: Any) -> Any:
        with lock:
            now[0] += sizes[name]
            most[0] = max(most[0], now[0])
        try:
            return converted(source, plan, name, scratch)
        finally:
            with lock:
                now[0] -= sizes[name]

    monkeypatch.setattr(write_module, "converted", watched)
    job.write(threads=8)
    assert 0 < most[0] <= 2 * largest
    monkeypatch.setattr(write_module, "_IN_FLIGHT_BYTES", 1)  # each is larger than that, and none is refused
    job.ledger.records.clear()
    most[0] = 0
    job.write(threads=8)
    assert most[0] <= largest


def test_activation_order_is_carried_into_formats_that_have_it(tmp_path: Path) -> None:
    job = Job(tmp_path, "compressed-tensors", act_order=True, sym=True)
    job.write()
    assert_equal(read_checkpoint(job.out), expected(job.layers, "compressed-tensors"))


def test_other_tensors_become_bfloat16_value_by_value(tmp_path: Path) -> None:
    job = Job(tmp_path, "bf16")
    job.write()
    made = read_checkpoint(job.out)
    for name, array in other_tensors(job.layers).items():
        assert made[name].tobytes() == bfloat16(array.astype(np.float32)).tobytes(), name


def test_weights_beyond_float16_are_refused_by_name_while_they_are_written(tmp_path: Path) -> None:
    layers = random_layers(layers=1, sym=True)
    module = "model.layers.0.mlp.up_proj"
    layers[module].scales[2, 1] = 60000
    layers[module].codes[2, 40] = 15
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", layers, "gptq"))
    plan = make_plan(source, "fp16", progress=NullProgress())
    with pytest.raises(BadInput, match=rf"{module}: \d+ of its 8192 dequantised weights do not fit fp16") as refusal:
        list(converted(source, plan, module)[f"{module}.weight"])
    assert "bf16" in str(refusal.value.hint)
    wide = make_plan(source, "bf16", progress=NullProgress())
    pieces = [piece.tobytes() for piece in converted(source, wide, module)[f"{module}.weight"]]
    assert b"".join(pieces) == bfloat16(layers[module].weight()).tobytes()
