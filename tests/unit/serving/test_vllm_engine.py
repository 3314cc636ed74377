"""The command line and the environment of vLLM, and what its log is read as."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetool.errors import ConfigError
from edgetool.serving.phases import TRANSFORMERS, VLLM, PhaseReader
from edgetool.serving.vllm_engine import Start, check_extra, command, environment

START = Start(Path("/env/bin/python"), Path("/models/m"), "m", 1024, "bfloat16", "cpu", 2**30 + 1)

# Lines of vLLM 0.32 as it wrote them, shortened
LOG = """\
(APIServer pid=1) INFO 11-20 07:33:36 [model.py:733] Resolved architecture: LlamaForCausalLM
(APIServer pid=1) WARNING 11-20 07:33:36 [model.py:2498] Casting torch.float16 to torch.bfloat16.
(EngineCore pid=2) INFO 11-20 07:33:52 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m'
(Worker pid=3) INFO 11-20 07:34:06 [cpu_model_runner.py:68] Starting to load model m...
Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00,  5.22it/s]
(Worker pid=3) INFO 11-20 07:34:06 [default_loader.py:501] Loading weights took 0.19 seconds
(EngineCore pid=2) INFO 11-20 07:34:08 [kv_cache_utils.py:2327] CPU KV cache size: 46,592 tokens
(EngineCore pid=2) INFO 11-20 07:34:10 [core.py:402] init engine (profile, create kv cache, warmup model) took 2.77 s
INFO:     Application startup complete."""


def test_the_key_is_in_the_environment_and_in_no_argument():
    made = environment(START, "geheim", {})
    assert made["VLLM_API_KEY"] == "geheim"
    assert not any("geheim" in part for part in command(START))


def test_the_cpu_build_gets_what_it_needs():
    line = " ".join(command(START))
    assert line.startswith("/env/bin/python -m vllm.entrypoints.openai.api_server --model /models/m")
    assert "--enforce-eager" in line
    assert "--gpu-memory-utilization" not in line
    assert environment(START, "k", {})["VLLM_CPU_KVCACHE_SPACE"] == "2"  # whole GiB, never less than asked for


def test_gpus_get_their_share_and_no_cpu_settings():
    start = Start(Path("p"), Path("m"), "m", 10, "float16", "cuda", 0, "fp8", 0.5, 2, distributed="ray")
    line = " ".join(command(start))
    assert "--gpu-memory-utilization 0.5" in line
    assert "--tensor-parallel-size 2" in line
    assert "--kv-cache-dtype fp8" in line
    assert "--distributed-executor-backend ray" in line
    assert "--enforce-eager" not in line
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(start, "k", {})


def test_a_socket_takes_the_place_of_host_and_port():
    with_socket = command(Start(**(START.__dict__ | {"socket": Path("/s")})))
    assert "--uds" in with_socket
    assert "--port" not in with_socket
    assert "--port" in command(START)


def test_settings_of_edgetool_and_of_its_python_stay_outside():
    outside = {"EDGETOOL_API_KEY": "a", "PYTHONPATH": "b", "VIRTUAL_ENV": "c", "VLLM_LOGGING_LEVEL": "d", "PATH": "/x"}
    made = environment(START, "k", outside)
    assert not {"EDGETOOL_API_KEY", "PYTHONPATH", "VIRTUAL_ENV"} & made.keys()
    assert made["VLLM_LOGGING_LEVEL"] == "d"
    assert made["PATH"] == "/env/bin:/x"
    assert made["HF_HUB_OFFLINE"] == "1"


def test_a_number_of_threads_is_that_number_wherever_there_are_cores():
    made = environment(Start(**(START.__dict__ | {"threads": 3})), "k", {})
    assert (made["OMP_NUM_THREADS"], made["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment(START, "k", {})


def test_arguments_of_ones_own_come_last():
    start = Start(**(START.__dict__ | {"extra": ("--max-num-seqs", "4")}))
    assert command(start)[-2:] == ["--max-num-seqs", "4"]


@pytest.mark.parametrize(
    "argument", ["--port", "--port=80", "--api-key", "--api_key=x", "--max-model-len", "-tp", "--uds"]
)
def test_arguments_that_contradict_are_refused_with_the_right_place(argument):
    with pytest.raises(ConfigError) as caught:
        check_extra(["--max-num-seqs", "4", argument])
    assert caught.value.hint


def test_arguments_that_do_not_are_let_pass():
    check_extra(["--max-num-seqs", "4", "--served-model", "--portable"])


def test_phases_are_passed_in_order_and_each_once():
    reader = PhaseReader(VLLM)
    steps = [step for line in LOG.splitlines() if (step := reader.read(line))]
    assert [words for _, words in steps] == [
        "reading the configuration",
        "starting the engine",
        "building the model",
        "loading weights",
        "preparing weights",
        "making the key-value cache",
        "starting the server",
        "answering",
    ]
    assert sum(newly for newly, _ in steps) == len(VLLM)


def test_phases_of_the_fallback_engine_are_its_own_words():
    reader = PhaseReader(TRANSFORMERS)
    lines = ["[    0s] read weights: 0 of 20 tensors", "[    1s] read weights: done in 1 s", "nothing"]
    assert [reader.read(line) for line in lines] == [(1, "reading weights"), (1, "starting the server"), None]
    assert reader.read("transformers engine: answering") == (1, "answering")
