"""GPUs by NVML and from a recorded file: the same machine both ways, and every way in which a GPU fails."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pynvml
import pytest

from edgetool.errors import ConfigError
from edgetool.scheduler.inventory import Inventory, describe, gpu_class, read_nvml, read_recorded, same_class
from tests.fakes import fake_nvml
from tests.fakes.started import started

RECORDED = Path(__file__).parents[2] / "fakes" / "nvml_eight_gpus.json"
GIB = 2**30


@pytest.fixture
def machine() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3080 Ti", "3080Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070TiSUPER"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "4090Laptop"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada-Generation"),
        ("", "unknown"),
    ],
)
def test_the_class_is_what_people_call_the_gpu(name: str, expected: str) -> None:
    assert gpu_class(name) == expected


def test_classes_of_ones_own_come_first_and_the_longest_part_wins() -> None:
    own = {"rtx": "any", "RTX 4090": "big"}
    assert gpu_class("NVIDIA GeForce RTX 4090", own) == "big"
    assert gpu_class("NVIDIA GeForce RTX 3060", own) == "any"
    assert gpu_class("NVIDIA H100 80GB HBM3", own) == "H100"


def test_spellings_of_a_class() -> None:
    assert same_class("h100", "H100")
    assert same_class("rtx 6000 ada generation", "RTX-6000-Ada-Generation")
    assert not same_class("4090", "4090D")


def test_the_recorded_machine_is_read_as_written(machine: dict[str, Any]) -> None:
    inventory = read_recorded(RECORDED)
    assert inventory.driver_version == "580.1"
    assert inventory.recorded
    assert [gpu.gpu_class for gpu in inventory.gpus] == [*["4090"] * 4, "H100", "4090", "4090", "A100"]
    assert [gpu.index for gpu in inventory.gpus if gpu.error] == [5, 6]
    for gpu, written in zip(inventory.gpus, machine["gpus"], strict=True):
        assert (gpu.uuid, gpu.name) == (written["uuid"], written["name"])
        assert gpu.memory_used_bytes == written["memory_used_bytes"]
        assert [p.pid for p in gpu.processes] == [p["pid"] for p in written["processes"]]
        assert [p.uuid for p in gpu.mig] == [p["uuid"] for p in written["mig"]]


def test_nvml_tells_the_same_as_the_recording(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, machine)
    recorded, read = read_recorded(RECORDED), read_nvml()
    assert read.driver_version == recorded.driver_version
    assert not read.recorded
    for found, expected in zip(read.gpus, recorded.gpus, strict=True):
        assert found.index == expected.index
        assert found.error is None or expected.error is not None
        if expected.index == 6:  # lost: the driver tells nothing but its place
            assert (found.uuid, found.gpu_class, found.memory_total_bytes) == (None, "unknown", 0)
            assert "lost" in str(found.error).lower()
            continue
        assert (found.uuid, found.name, found.gpu_class) == (expected.uuid, expected.name, expected.gpu_class)
        assert (found.memory_total_bytes, found.memory_used_bytes) == (
            expected.memory_total_bytes,
            expected.memory_used_bytes,
        )
        assert (found.compute_capability, found.mig) == (expected.compute_capability, expected.mig)
        assert [(p.pid, p.used_memory_bytes, p.mig_uuid) for p in found.processes] == [
            (p.pid, p.used_memory_bytes, p.mig_uuid) for p in expected.processes
        ]
    assert read.gpus[5].error == "3 uncorrected ECC errors since the driver was loaded"
    assert read.gpus[7].utilization_percent is None


def test_users_and_commands_come_from_the_system(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with started(["sleep", "600"]) as job:
        machine["gpus"][1]["processes"] = [{"pid": job.pid, "user": "?", "command": "?", "used_memory_bytes": GIB}]
        fake_nvml.install(monkeypatch, machine)
        (process,) = read_nvml().gpus[1].processes
        job.kill()
    assert process.user == Path("/proc/self").owner()
    assert process.command == "sleep 600"
    assert describe(2**22 + 1) == (None, None)  # a number that no process can have


def test_a_machine_without_a_driver_has_no_gpus_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, None)
    assert read_nvml() == Inventory(None, ())


def test_a_gpu_that_is_lost_in_the_middle_of_reading_does_not_hide_the_others(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_nvml.install(monkeypatch, machine)
    lost = machine["gpus"][2]["uuid"]

    def utilization(device: dict[str, Any]) -> Any:
        if device["uuid"] == lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(module, "nvmlDeviceGetUtilizationRates", utilization)
    gpus = read_nvml().gpus
    assert gpus[2].uuid == lost
    assert str(gpus[2].error).startswith("NVML: ")
    assert [gpu.error for gpu in gpus[:2]] == [None, None]
    assert gpus[0].utilization_percent is None


@pytest.mark.parametrize(
    ("rows", "expected"), [((0, 1, 0, 0), None), ((0, 1, 1, 0), "reset"), ((0, 1, 0, 1), "has failed")]
)
def test_damaged_memory_rows_are_an_error_unless_they_were_replaced(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], expected: str | None
) -> None:
    module = fake_nvml.install(monkeypatch, machine)
    monkeypatch.setattr(module, "nvmlDeviceGetRemappedRows", lambda _device: rows)
    error = read_nvml().gpus[4].error
    assert (error is None) if expected is None else (expected in str(error))


def test_mig_mode_without_instances_is_an_error(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml.install(monkeypatch, machine)
    machine["gpus"][7]["mig"] = []
    monkeypatch.setattr(module, "nvmlDeviceGetMigMode", lambda _device: [1, 1])
    assert "no instance" in str(read_nvml().gpus[7].error)


def test_who_computes_and_draws_is_one_process(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, machine)
    processes = read_nvml().gpus[0].processes
    assert [(p.pid, p.used_memory_bytes) for p in processes] == [(9000101, 70 * 2**20), (9000102, 32 * 2**20)]


def test_memory_that_the_driver_does_not_tell_is_none(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["gpus"][2]["processes"][0]["used_memory_bytes"] = None
    fake_nvml.install(monkeypatch, machine)
    assert read_nvml().gpus[2].processes[0].used_memory_bytes is None


def damaged(machine: dict[str, Any], how: str) -> object:
    machine = copy.deepcopy(machine)
    if how == "no gpus":
        del machine["gpus"]
    elif how == "no total":
        del machine["gpus"][3]["memory_total_bytes"]
    elif how == "text for a number":
        machine["gpus"][3]["memory_used_bytes"] = "much"
    elif how == "no uuid":
        machine["gpus"][3]["uuid"] = None
    elif how == "a list":
        return [machine]
    elif how == "a process without a pid":
        del machine["gpus"][2]["processes"][0]["pid"]
    return machine


@pytest.mark.parametrize(
    "how", ["no gpus", "no total", "text for a number", "no uuid", "a list", "a process without a pid"]
)
def test_a_damaged_recording_is_named_and_not_a_bug(machine: dict[str, Any], tmp_path: Path, how: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(damaged(machine, how)))
    with pytest.raises(ConfigError, match=r"machine\.json"):
        read_recorded(path)


def test_a_recording_that_is_no_json_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_recorded(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_recorded(path)
