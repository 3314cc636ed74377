"""Settings of the commands that make, change, measure and describe models: quantize, convert, eval, compile-vcu128."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from edgetool.config_values import (
    Count,
    Device,
    HomeDirectory,
    HomePath,
    ModelName,
    Section,
    Size,
    Suggest,
    names,
    only_numbers,
    setting,
    whole,
)
from edgetool.errors import ConfigError

BackendName = Literal["native", "gptqmodel", "llmcompressor", "auto-round", "auto-gptq", "autoawq"]
_BACKENDS = ", ".join(get_args(BackendName)[:-1]) + f" or {get_args(BackendName)[-1]}"


def _different(backends: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(backends)) < len(backends):
        raise ValueError("two would write to the same place")
    return backends


_Compared = Annotated[tuple[BackendName, ...], Field(min_length=2), BeforeValidator(names), AfterValidator(_different)]
_CALIBRATION = Suggest(words=("builtin", "self"), paths="files", suffixes=("jsonl", "json", "txt", "parquet"))


def usual_format(so_far: Mapping[str, Any]) -> str:
    """The layout that a backend and a method write when none is asked for."""
    if so_far.get("backend") == "llmcompressor":
        return "compressed-tensors"
    return "awq" if so_far.get("method") == "awq" and so_far.get("bits") == 4 else "gptq"


class QuantizeConfig(Section):
    """Settings of `edgetool quantize`."""

    required: ClassVar = {"model": "MODEL", "output": "--output"}
    uses = ("envs",)

    model: ModelName = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    output: HomeDirectory = setting(Path(), "directory to write, which must not exist", "a directory")
    backend: BackendName = setting(
        "native", "what quantises: edgetool itself, or a tool in an environment of its own (edgetool envs)", _BACKENDS
    )
    compare: _Compared | None = setting(
        None, "backends to run one after the other on the same calibration tokens", f"two or more of {_BACKENDS}"
    )
    method: Literal["gptq", "awq", "rtn"] = setting("gptq", "how weights are rounded", "gptq, awq or rtn")
    bits: Annotated[Literal[2, 3, 4, 8], BeforeValidator(whole)] = setting(4, "bits per weight", "2, 3, 4 or 8")
    group_size: Annotated[Literal[-1, 32, 64, 128], BeforeValidator(whole)] = setting(
        128, "weights along in_features that share one scale; -1 = all of them", "-1, 32, 64 or 128"
    )
    sym: bool = setting(
        lambda so_far: so_far.get("method") != "awq",
        "symmetric: the zero point is 2**(bits-1) everywhere; default false for awq, else true",
        "true or false",
        option="--sym",
        off="--asym",
    )
    desc_act: bool = setting(False, "store a true activation order in g_idx (gptq only)", "true or false")
    format: Literal["gptq", "awq", "compressed-tensors"] = setting(
        usual_format,
        "checkpoint layout; default awq for 4-bit awq, compressed-tensors from llmcompressor, else gptq",
        "gptq, awq or compressed-tensors",
    )
    device: Device = setting("auto", "where to compute", "auto, cpu, cuda or cuda:N")
    calib: Annotated[str, Field(min_length=1), _CALIBRATION] = setting(
        "builtin", "calibration text", "builtin, self, a .jsonl, .json, .txt or .parquet file, or hf:dataset"
    )
    calib_column: str | None = setting(None, "column of the calibration file that holds the text", "a column name")
    calib_samples: Count = setting(128, "calibration sequences", "a number of at least 1")
    calib_seqlen: Count = setting(512, "tokens per calibration sequence", "a number of at least 1")
    seed: Annotated[int, BeforeValidator(only_numbers), Field(ge=0, lt=2**63)] = setting(
        0, "seed of everything that is drawn at random", "a number from 0 to 2^63 - 1"
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
    damp: Annotated[float, BeforeValidator(only_numbers), Field(gt=0, lt=1)] = setting(
        0.01, "first rung of the damping ladder, as a share of the Hessian's mean diagonal", "between 0 and 1"
    )
    shrinkage: Annotated[float, BeforeValidator(only_numbers), Field(ge=0, le=1)] = setting(
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

    required: ClassVar = {"source": "SRC"}

    source: ModelName = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="SRC")
    output: HomeDirectory | None = setting(None, "directory to write, which must not exist", "a directory")
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
    group_size: Annotated[Literal[-1, 32, 64, 128] | None, BeforeValidator(whole)] = setting(
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
        if self.fix_config and self.dry_run:
            raise ConfigError(
                "--fix-config writes SRC's config.json, and --dry-run writes nothing",
                f"what would be repaired is said by: {shlex.join(['edgetool', 'inspect', self.source])}",
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

    required: ClassVar = {"model": "MODEL"}

    model: ModelName = setting("", "directory, .gguf file, demo, hf:org/name or ms:org/name", "a model", option="MODEL")
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")


class DemoConfig(Section):
    """Settings of `edgetool demo`."""

    output: HomeDirectory = setting(
        Path("demo-out"), "directory to write; an earlier demo in it is replaced", "a directory"
    )
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")


class CompileConfig(Section):
    """Settings of `edgetool compile-vcu128`."""

    model: ModelName = setting(
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
    bits: Annotated[Literal[2, 3, 4, 8], BeforeValidator(whole)] | None = setting(
        None, "bits the checkpoint must have (default: as it is)", "2, 3, 4 or 8"
    )
    group_size: Annotated[Literal[-1, 32, 64, 128], BeforeValidator(whole)] | None = setting(
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
    inspect: HomeDirectory | None = setting(None, "describe this image and check every hash", "an image")
    diff: tuple[HomeDirectory, HomeDirectory] | None = setting(None, "compare two images", "two images")
    extract: str | None = setting(None, "write this matrix of the image MODEL to --output, dequantised", "a name")
    verify: ModelName | None = setting(
        None, "compare the image MODEL with this checkpoint, element by element", "a model"
    )
    verify_run: ModelName | None = setting(
        None, "run the image MODEL and compare with torch in float32 on this checkpoint", "a model"
    )
    numerics: Literal["et1", "fast"] = setting("et1", "how --verify-run computes: to the bit, or fast", "et1 or fast")
    trace: HomePath | None = setting(None, "file for a line of JSON for every operation of --verify-run", "a file")
    push: HomeDirectory | None = setting(None, "write this image to --device and read it back", "an image")
    device: HomePath | None = setting(None, "XDMA device to push to, e.g. /dev/xdma0_h2c_0", "a device or empty file")
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    resume: bool = setting(False, "go on with an unfinished run of the same configuration", "true or false")
    overwrite: bool = setting(False, "replace an existing output", "true or false")
    dry_run: bool = setting(False, "show the plan and write nothing", "true or false")
