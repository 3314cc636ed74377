"""Which GPUs `serve-gpu` takes, on a recorded server of eight, and how it hands them to vLLM."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.fake_vllm import make_fake_vllm, starts, variables
from tests.fakes.served import Served

pytestmark = pytest.mark.slow

EIGHT_GPUS = Path(__file__).parent.parent / "fakes" / "nvml_eight_gpus.json"
CLASSES = {gpu["uuid"]: gpu["name"] for gpu in json.loads(EIGHT_GPUS.read_text())["gpus"]}

Start = Callable[..., Served]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_vllm(tmp_path_factory.mktemp("fake") / "vllm", "ray")


@pytest.fixture
def start(model: Path, vllm: Path, tmp_path: Path) -> Iterator[Start]:
    """Servers in one common surrounding, all of which end with the test."""
    begun: list[Served] = []

    def begin(*arguments: str, **env: str) -> Served:
        shared = {"XDG_STATE_HOME": str(tmp_path / "state"), "EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
        told = variables(tmp_path, vllm, EIGHT_GPUS) | shared | env
        begun.append(Served(tmp_path / f"served-{len(begun)}", str(model), *arguments, env=told))
        return begun[-1]

    yield begin
    for served in begun:
        served.__exit__()


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return starts(tmp_path / "starts.jsonl")


def shown(served: Served) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(served.edgetool("gpus", "--json").stdout)
    return {gpu["uuid"]: gpu for gpu in document["gpus"]}


def test_a_gpu_of_the_class_is_leased_whole_and_handed_on_by_its_uuid(start: Start, tmp_path: Path) -> None:
    served = start("--class", "4090")
    document = served.ready()
    (uuid,) = document["gpus"]
    assert "4090" in CLASSES[uuid]
    (first,) = started(tmp_path)
    assert first["environment"]["CUDA_VISIBLE_DEVICES"] == uuid
    assert first["environment"]["VLLM_API_KEY"] == "k"
    assert "k" not in first["arguments"]
    arguments = first["arguments"]
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.9"
    assert "--enforce-eager" not in arguments
    (lease,) = shown(served)[uuid]["leases"]
    assert (lease["id"], lease["exclusive"]) == (document["lease"], True)
    assert shown(served)[uuid]["memory_free_bytes"] == 0
    headers = {"Authorization": "Bearer k"}
    assert httpx.get(f"{document['url']}/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"


def test_servers_get_gpus_of_their_own_and_one_too_many_is_exit_6_and_says_who_has_them(start: Start) -> None:
    # of the six 4090s four are broken or used by others
    first, second = start("--class", "4090"), start("--class", "4090")
    taken = [*first.ready()["gpus"], *second.ready()["gpus"]]
    assert len(set(taken)) == 2
    assert all("4090" in CLASSES[uuid] for uuid in taken)
    third = start("--class", "4090")
    assert third.wait() == 6
    message = json.loads(third.output.read_text())["message"]
    assert str(first.process.pid) in message
    assert str(second.process.pid) in message
    assert "ml1" in message
    assert "--gpu-memory-utilization" in message


def test_a_split_gets_several_gpus_of_one_class(start: Start, tmp_path: Path) -> None:
    document = start("--class", "4090", "--tensor-parallel-size", "2").ready()
    assert len(set(document["gpus"])) == 2
    (first,) = started(tmp_path)
    assert first["environment"]["CUDA_VISIBLE_DEVICES"] == ",".join(document["gpus"])
    assert "--tensor-parallel-size" in first["arguments"]


def test_a_share_is_reserved_and_the_rest_left_to_others(start: Start) -> None:
    served = start("--class", "4090", "--gpu-memory-utilization", "0.25")
    (uuid,) = served.ready()["gpus"]
    gpu = shown(served)[uuid]
    assert gpu["leases"][0]["exclusive"] is False
    assert gpu["leases"][0]["memory_bytes"] == gpu["memory_total_bytes"] // 4
    assert gpu["memory_free_bytes"] > gpu["memory_total_bytes"] // 2


def test_without_a_class_a_larger_gpu_is_taken_only_when_no_smaller_one_is_free(start: Start) -> None:
    names = []
    for _ in range(4):
        document = start("--gpu-memory-utilization", "0.75").wait_or_ready()
        if document is not None:
            (uuid,) = document["gpus"]
            names.append(CLASSES[uuid].split()[-1 if "4090" in CLASSES[uuid] else 1])
    # three quarters of two 4090s are free, and then those of the H100; after that there is nothing
    assert names == ["4090", "4090", "H100"]


def test_workers_on_a_ray_cluster_are_placed_by_ray(start: Start, tmp_path: Path) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        served = start("--distributed", "ray", "--ray-address", address, "--tensor-parallel-size", "2")
        document = served.ready()
    assert document["gpus"] == []
    (first,) = started(tmp_path)
    arguments = first["arguments"]
    assert arguments[arguments.index("--distributed-executor-backend") + 1] == "ray"
    assert first["environment"]["RAY_ADDRESS"] == address
    assert "CUDA_VISIBLE_DEVICES" not in first["environment"]
    assert all(gpu["leases"] == [] for gpu in shown(served).values())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--ray-address", "127.0.0.1:9"), 6, "no Ray cluster answers at 127.0.0.1:9"),
        ((), 3, "--ray-address HOST:6379"),
    ],
)
def test_a_ray_cluster_that_is_not_there_is_said_at_once(
    start: Start, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    served = start("--distributed", "ray", *arguments)
    assert served.wait() == code
    document = json.loads(served.output.read_text())
    assert said in document["message"] + document["hint"]
    assert started(tmp_path) == []
