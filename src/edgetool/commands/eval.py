"""`edgetool eval`: how good a model still is, beside its original, with statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

Option = typer.Option


@o.with_job
def eval(
    ctx: typer.Context,
    model: o.Model = None,
    against: Annotated[
        str | None, Option("--against", metavar="MODEL", help="The original, measured on the same questions.")
    ] = None,
    tasks: Annotated[
        str | None, Option("--tasks", metavar="NAMES", help="What to measure, e.g. arc_easy,mmlu,humaneval,perplexity.")
    ] = None,
    output: o.Output = None,
    endpoint: Annotated[
        str | None, Option("--endpoint", metavar="URL", help="Measure an OpenAI endpoint; MODEL gives its tokenizer.")
    ] = None,
    endpoint_model: Annotated[
        str | None,
        Option("--endpoint-model", metavar="NAME", help="Model to ask the endpoint for [default: the only one]."),
    ] = None,
    api_key: o.ApiKey = None,
    via: Annotated[
        str | None, Option("--via", metavar="NAME", help="serve-gpu: serve each model and measure the server.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        Option("--data-dir", metavar="DIR", help="Data, a folder a task [default: $EDGETOOL_DATA_DIR, else the hub]."),
    ] = None,
    limit: Annotated[
        int | None, Option("--limit", metavar="N", help="Only the first N questions of each task, the same for both.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Option("--num-fewshot", metavar="N", help="Examples before each question [default: the task's].")
    ] = None,
    chat_template: Annotated[
        bool | None,
        Option(
            "--chat-template/--no-chat-template",
            help="Ask in the model's chat template [default: no-chat-template].",
        ),
    ] = None,
    system_prompt: Annotated[
        str | None, Option("--system-prompt", metavar="TEXT", help="System message before each question.")
    ] = None,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of all random draws [default: 1234].")] = None,
    batch_size: Annotated[
        str | None, Option("--batch-size", metavar="N", help="Requests computed together [default: auto].")
    ] = None,
    max_length: Annotated[
        int | None, Option("--max-length", metavar="N", help="Longest context in tokens [default: the model's].")
    ] = None,
    dtype: Annotated[
        str | None, Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32 [default: auto].")
    ] = None,
    device: o.Device = None,
    threads: o.Threads = None,
    concurrency: Annotated[
        int | None, Option("--concurrency", metavar="N", help="Requests at an endpoint at once [default: 8].")
    ] = None,
    timeout_s: Annotated[
        str | None, Option("--timeout", metavar="TIME", help="Longest wait for an endpoint's answer [default: 600].")
    ] = None,
    text: Annotated[
        Path | None,
        Option("--text", metavar="FILE", help="Text of perplexity [default: wikitext-2 of the data, else our own]."),
    ] = None,
    context: Annotated[
        int | None, Option("--context", metavar="N", help="Tokens of a window of perplexity [default: 1024].")
    ] = None,
    stride: Annotated[
        int | None, Option("--stride", metavar="N", help="Tokens between windows [default: half of the context].")
    ] = None,
    rouge_data: Annotated[
        Path | None, Option("--rouge-data", metavar="FILE", help="jsonl of rouge, with prompt and reference.")
    ] = None,
    gate: Annotated[
        str | None,
        Option("--gate", metavar="RULE", help="Exit 8 unless it holds, e.g. 'recovery>=0.98 @95%' or 'drop<=1pt'."),
    ] = None,
    sequential: Annotated[
        bool | None, Option("--sequential", help="Stop as soon as the gate is decided, by a sequential test.")
    ] = None,
    log_samples: Annotated[bool | None, Option("--log-samples", help="Write every question and answer too.")] = None,
    unsafe_exec: Annotated[
        bool | None, Option("--unsafe-exec", help="Run generated code even as root and without isolation.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        Option("--compare", metavar="A B", help="Compare the results.json of two finished runs (original first)."),
    ] = None,
) -> None:
    """Measure a model, and what quantising it cost.

    lm-evaluation-harness' and EvalPlus' tasks, perplexity and ROUGE, in-process or at an endpoint. With --against both
    models answer the same questions, and the difference gets an interval. What was answered once is not asked again.
    """
    with run(ctx) as this:
        from edgetool.commands._eval_tables import blocks
        from edgetool.evaluation.job import gate_failure, run_eval

        result = run_eval(this.config, this.progress)
        failure = gate_failure(result)
        if failure is None or not this.output.json:  # as JSON the result is in the failure's document
            this.result(result, blocks(result))
        if failure is not None:
            raise failure
