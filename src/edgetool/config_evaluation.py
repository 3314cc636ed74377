"""Settings of `edgetool eval`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from edgetool.config_values import (
    Address,
    Count,
    Device,
    Duration,
    HomeDirectory,
    HomePath,
    ModelName,
    Section,
    Suggest,
    names,
    only_numbers,
    setting,
    whole,
)
from edgetool.errors import ConfigError


class EvalConfig(Section):
    """Settings of `edgetool eval`. With `via = "serve-gpu"` those of [serve_gpu] hold for the server."""

    uses = ("serve_gpu", "scheduler", "envs")

    model: ModelName | None = setting(
        None, "model to measure (with --endpoint: whose tokenizer the server has)", "a model", option="MODEL"
    )
    against: ModelName | None = setting(None, "the original, measured on the same questions", "a model")
    tasks: Annotated[tuple[Annotated[str, Suggest(source="tasks")], ...], BeforeValidator(names)] = setting(
        (), "what to measure, with commas (docs/eval.md lists the tasks)", "names of tasks, such as arc_easy,perplexity"
    )
    output: HomeDirectory | None = setting(None, "directory to write, which must not exist", "a directory")
    endpoint: Address | None = setting(
        None, "measure an OpenAI endpoint: its address, with or without /v1", "an address"
    )
    endpoint_model: Annotated[str, Field(min_length=1)] | None = setting(
        None, "model to ask the endpoint for (default: the only one served)", "a name"
    )
    via: Literal["serve-gpu"] | None = setting(
        None, "serve each model with serve-gpu and measure the server, in place of in-process", "serve-gpu"
    )
    data_dir: HomeDirectory | None = setting(
        None,
        "directory with the data, a folder a task ($EDGETOOL_DATA_DIR when that is set; default: the hub)",
        "a directory",
    )
    limit: Count | None = setting(
        None, "only the first questions of each task, the same for both (perplexity: windows)", "a number of at least 1"
    )
    num_fewshot: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] | None = setting(
        None, "examples before each question (default: as the task says)", "a number of at least 0"
    )
    chat_template: bool = setting(False, "put each question into the model's chat template", "true or false")
    system_prompt: str | None = setting(None, "system message before each question", "a text")
    seed: Annotated[int, BeforeValidator(only_numbers), Field(ge=0, lt=2**32)] = setting(
        1234, "seed of examples, of intervals and of the order of --sequential", "a number from 0 to 4294967295"
    )
    batch_size: Annotated[Count | Literal["auto"], BeforeValidator(whole)] = setting(
        "auto", "requests computed together; auto = 8 on a CPU, on a GPU as many as fit", "a number, or auto"
    )
    max_length: Annotated[int, BeforeValidator(only_numbers), Field(ge=16)] | None = setting(
        None, "longest context in tokens (default: the model's, and 2048 for an endpoint)", "a number from 16"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "dtype of the model in-process; auto = the fast one of the device", "auto, bfloat16, float16 or float32"
    )
    device: Device = setting("auto", "where to compute", "auto, cpu, cuda or cuda:N")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")
    concurrency: Count = setting(8, "requests under way at an endpoint at once", "a number of at least 1")
    timeout_s: Duration = setting(600.0, "longest wait for an endpoint's answer", "a time", option="--timeout")
    text: HomePath | None = setting(
        None,
        "text of the task perplexity (default: text/wikitext-2-raw.test.txt of the data, else one of edgetool's own)",
        "a text file",
    )
    context: Annotated[int, BeforeValidator(only_numbers), Field(ge=8)] = setting(
        1024, "tokens of a window of perplexity", "a number from 8"
    )
    stride: Count | None = setting(
        None, "tokens between two windows of perplexity (default: half of the context)", "up to the context"
    )
    rouge_data: HomePath | None = setting(
        None,
        "jsonl file of the task rouge: prompt and reference (default: in rouge/ of the data)",
        "a .jsonl file",
    )
    gate: Annotated[str, Field(min_length=1)] | None = setting(
        None, "what has to hold, else exit 8", "a gate such as `recovery>=0.98 @95%` or `drop<=1pt`"
    )
    sequential: bool = setting(False, "stop as soon as the gate is decided", "true or false")
    log_samples: bool = setting(False, "write every question and answer too", "true or false")
    unsafe_exec: bool = setting(False, "run generated code as root even where it cannot be isolated", "true or false")
    compare: tuple[HomePath, HomePath] | None = setting(
        None, "compare two finished runs: the original's results.json and the quantised model's", "two results.json"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", "a name")
    resume: bool = setting(False, "go on with an unfinished run", "true or false")
    overwrite: bool = setting(False, "replace an existing output", "true or false")
    dry_run: bool = setting(False, "show the plan and measure nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> EvalConfig:
        if self.endpoint is not None and self.via is not None:
            raise ConfigError("--endpoint measures a server that runs, and --via starts one", "leave one of them out")
        if self.stride is not None and self.stride > self.context:
            raise ConfigError(
                f"stride {self.stride} is more than context {self.context}: tokens between windows would be left out",
                f"use --stride {self.context}, or less",
            )
        if self.sequential and self.gate is None:
            raise ConfigError("--sequential stops when the gate is decided, and there is none", "add --gate")
        return self
