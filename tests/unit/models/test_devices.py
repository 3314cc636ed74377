import pytest
import torch

from edgetool.errors import ConfigError, ResourceUnavailable
from edgetool.models.devices import fast_dtype, out_of_memory_named, resolve_device


def fake_gpus(monkeypatch, *free_bytes, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free_bytes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free_bytes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free_bytes[index], 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_auto_is_the_gpu_with_most_free_memory_or_the_cpu(monkeypatch):
    fake_gpus(monkeypatch)
    assert resolve_device("auto") == torch.device("cpu")
    fake_gpus(monkeypatch, 1 << 30, 5 << 30, 2 << 30)
    assert resolve_device("auto") == torch.device("cuda", 1)


def test_cuda_without_a_number_is_the_first_gpu(monkeypatch):
    fake_gpus(monkeypatch, 1 << 30, 5 << 30)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_an_unavailable_resource(monkeypatch):
    fake_gpus(monkeypatch)
    with pytest.raises(ResourceUnavailable, match="device cuda:0: no CUDA device"):
        resolve_device("cuda:0")
    fake_gpus(monkeypatch, 1 << 30)
    with pytest.raises(ResourceUnavailable, match=r"device cuda:1: this machine has 1 CUDA device"):
        resolve_device("cuda:1")


@pytest.mark.parametrize("name", ["mps", "gpu", "", "cuda:x"])
def test_other_device_names_are_a_configuration_error(name):
    with pytest.raises(ConfigError, match="is not one of auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_the_fast_dtype_is_bfloat16_where_the_device_has_it(monkeypatch):
    fake_gpus(monkeypatch, 1 << 30, capability=(8, 0))
    assert fast_dtype(torch.device("cuda", 0)) == torch.bfloat16
    fake_gpus(monkeypatch, 1 << 30, capability=(7, 5))
    assert fast_dtype(torch.device("cuda", 0)) == torch.float16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert fast_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_says_what_was_being_done_and_what_to_do(failure):
    words = "out of memory while quantising layer 3"
    named = out_of_memory_named("quantising layer 3", "lower --calib-samples")
    with pytest.raises(ResourceUnavailable, match=words) as raised, named:
        raise failure
    assert raised.value.hint.startswith("lower --calib-samples")
    assert ("--device cpu" in raised.value.hint) == isinstance(failure, torch.OutOfMemoryError)
    assert "\n" not in raised.value.message


def test_other_failures_pass_through_unchanged():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), out_of_memory_named("anything", "nothing"):
        raise RuntimeError("shapes cannot be multiplied")
