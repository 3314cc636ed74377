"""How vLLM is started: its command line and its environment.

Written for vLLM 0.32, and its CPU build. Nothing of vLLM is imported: it lives in an environment of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgetool.errors import ConfigError

_GIB = 2**30

OURS = {
    "--model": "give the model as the argument of serve-gpu",
    "--host": "use --host of serve-gpu",
    "--port": "use --port of serve-gpu",
    "--uds": "serve-gpu sets it",
    "--api-key": "use EDGETOOL_API_KEY: arguments can be read by everybody on this machine",
    "--served-model-name": "use --served-model-name of serve-gpu",
    "--max-model-len": "use --max-model-len of serve-gpu",
    "--tensor-parallel-size": "use --tensor-parallel-size of serve-gpu",
    "-tp": "use --tensor-parallel-size of serve-gpu",
    "--gpu-memory-utilization": "use --gpu-memory-utilization of serve-gpu",
    "--kv-cache-dtype": "use --kv-cache-dtype of serve-gpu",
    "--dtype": "use --dtype of serve-gpu",
    "--distributed-executor-backend": "use --distributed of serve-gpu",
}
"""Options of vLLM that edgetool gives itself and that it checks or leases by -> where to say it instead."""


@dataclass(frozen=True)
class Start:
    """All that a start of vLLM depends on. `socket`: a Unix socket to listen on in place of host and port."""

    python: Path
    model: Path
    served_model_name: str
    max_model_len: int
    dtype: str
    device: str
    kv_cache_bytes: int
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    distributed: str | None = None
    shutdown_timeout_s: int = 0
    threads: int | None = None
    extra: Sequence[str] = field(default_factory=tuple)


def command(start: Start) -> list[str]:
    """The command line. It holds nothing secret: the key goes by the environment."""
    # `python -m` and not the `vllm` program, which asks for metadata that the CPU build does not have
    line = [str(start.python), "-m", "vllm.entrypoints.openai.api_server"]
    line += ["--model", str(start.model), "--served-model-name", start.served_model_name]
    if start.socket is not None:
        line += ["--uds", str(start.socket)]
    else:
        line += ["--host", start.host, "--port", str(start.port)]
    line += ["--dtype", start.dtype, "--max-model-len", str(start.max_model_len)]
    if start.tensor_parallel_size > 1:
        line += ["--tensor-parallel-size", str(start.tensor_parallel_size)]
    if start.kv_cache_dtype != "auto":
        line += ["--kv-cache-dtype", start.kv_cache_dtype]
    if start.distributed is not None:
        line += ["--distributed-executor-backend", start.distributed]
    if start.shutdown_timeout_s:
        line += ["--shutdown-timeout", str(start.shutdown_timeout_s)]  # answers under way may end
    if start.device == "cpu":
        line += ["--enforce-eager"]
    else:
        line += ["--gpu-memory-utilization", f"{start.gpu_memory_utilization:.4g}"]
    return [*line, *start.extra]


def environment(
    start: Start, key: str, outside: Mapping[str, str], *, scratch: Path | None = None, offline: bool = True
) -> dict[str, str]:
    """The environment: what is set outside and is of use to vLLM, the key, and no hub (the model is on the disk).

    Settings of edgetool and of Python's own (PYTHONPATH, PYTHONHOME) stay outside: they belong to another environment.
    `scratch` is where temporary files go.
    """
    kept = {name: value for name, value in outside.items() if not name.startswith(("EDGETOOL_", "PYTHON", "VIRTUAL_"))}
    # vLLM calls ninja and compilers by name, so its own directory comes first
    path = os.pathsep.join([str(start.python.parent), outside.get("PATH", os.defpath)])
    ours = {"PATH": path, "VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if offline:
        ours |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if start.device == "cpu":
        # whole GiB only; vLLM otherwise takes 92 % of the machine's memory
        ours["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(start.kv_cache_bytes / _GIB)))
        if start.threads is not None:
            # vLLM otherwise binds its threads to all cores but one, and two servers to the same ones
            ours["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if start.threads is not None:
        ours["OMP_NUM_THREADS"] = str(start.threads)
    if scratch is not None:
        ours["TMPDIR"] = str(scratch)
    return {**kept, **ours}


def check_extra(extra: Sequence[str]) -> None:
    """Raise ConfigError for an argument after `--` that edgetool gives itself."""
    for argument in extra:
        name = argument.partition("=")[0].replace("_", "-")
        if name in OURS:
            raise ConfigError(f"{argument!r} after -- would contradict what serve-gpu gives to vLLM", OURS[name])
