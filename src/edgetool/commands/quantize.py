"""`edgetool quantize`: a model in, a checkpoint of 2, 3, 4 or 8 bits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_job
def quantize(
    ctx: typer.Context,
    model: o.Model = None,
    output: o.Output = None,
    backend: Annotated[
        str | None,
        Option(
            "--backend",
            metavar="NAME",
            help="native, gptqmodel, llmcompressor, auto-round, auto-gptq or autoawq [default: native].",
        ),
    ] = None,
    compare: Annotated[
        str | None, Option("--compare", metavar="NAMES", help="Run several backends, such as native,gptqmodel.")
    ] = None,
    method: Annotated[str | None, Option("--method", metavar="NAME", help="gptq, awq or rtn [default: gptq].")] = None,
    format: Annotated[
        str | None,
        Option(
            "--format",
            metavar="NAME",
            help="gptq, awq or compressed-tensors [default: awq for 4-bit awq, else gptq; llmcompressor's own].",
        ),
    ] = None,
    bits: Annotated[int | None, Option("--bits", metavar="N", help="2, 3, 4 or 8 [default: 4].")] = None,
    group_size: Annotated[
        int | None,
        Option("--group-size", metavar="N", help="Weights per scale: 32, 64, 128, or -1 for all [default: 128]."),
    ] = None,
    sym: Annotated[
        bool | None, Option("--sym/--asym", help="Symmetric or with zero points [default: asym for awq, else sym].")
    ] = None,
    desc_act: Annotated[
        bool | None, Option("--desc-act/--no-desc-act", help="Store a true activation order [default: no-desc-act].")
    ] = None,
    quantize_lm_head: Annotated[bool | None, Option("--quantize-lm-head", help="Quantise lm_head too.")] = None,
    device: o.Device = None,
    threads: o.Threads = None,
    calib: Annotated[
        str | None,
        Option("--calib", metavar="TEXT", help="builtin, self, a text file, or hf:dataset [default: builtin]."),
    ] = None,
    calib_column: Annotated[
        str | None, Option("--calib-column", metavar="NAME", help="Column of the file that holds the text.")
    ] = None,
    calib_samples: Annotated[
        int | None, Option("--calib-samples", metavar="N", help="Sequences [default: 128].")
    ] = None,
    calib_seqlen: Annotated[
        int | None, Option("--calib-seqlen", metavar="N", help="Tokens per sequence [default: 512].")
    ] = None,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of all random draws [default: 0].")] = None,
    scale_search: Annotated[
        str | None, Option("--scale-search", metavar="NAME", help="Grid of each group: mse or minmax [default: mse].")
    ] = None,
    awq_scaling: Annotated[
        bool | None, Option("--awq-scaling/--no-awq-scaling", help="Scale salient channels first [default: by method].")
    ] = None,
    asymmetric_calibration: Annotated[
        bool | None,
        Option(
            "--asymmetric-calibration/--no-asymmetric-calibration",
            help="Calibrate on the quantised layers before [default: by method].",
        ),
    ] = None,
    bias_correction: Annotated[
        bool | None,
        Option("--bias-correction/--no-bias-correction", help="Correct the mean error [default: no-bias-correction]."),
    ] = None,
    damp: Annotated[
        float | None, Option("--damp", metavar="X", help="First Hessian damping, 0 to 1 [default: 0.01].")
    ] = None,
    shrinkage: Annotated[
        float | None,
        Option("--shrinkage", metavar="X", help="How little to trust correlations, 0 to 1 [default: 0.5]."),
    ] = None,
    max_shard_size_bytes: Annotated[
        str | None, Option("--max-shard-size", metavar="SIZE", help="Largest weight file [default: 5GB].")
    ] = None,
) -> None:
    """Quantise a model for vLLM, transformers or a board.

    The model is read one layer at a time. `edgetool quantize demo -o out --group-size 64` tries it on a small model.
    """
    with run(ctx) as this:
        from edgetool.peers.job import quantize

        result = quantize(this.config, this.progress)
        this.result(result, blocks(result))


def blocks(result: dict[str, Any]) -> list[Block]:
    """The result as tables: the plan of a dry run, or what was written, its worst modules and a sample."""
    from edgetool.commands import _blocks
    from edgetool.console import Text

    if "plan" in result:
        return _blocks.report("plan (nothing was written)", result["plan"])
    if "comparison" in result:
        return _blocks.report("quantised by several", result)
    shown = dict(result)
    worst, smoke, warnings = (shown.pop(key, None) for key in ("worst_modules", "smoke", "warnings"))
    tables = _blocks.report("quantised", shown)
    if worst:
        tables.append(_blocks.grid("largest errors", worst))
    if smoke:
        tables.append(Text(f"asked: {smoke.get('prompt', '')}", str(smoke.get("text", "")).strip()))
    return tables + _blocks.listing("warnings", warnings or [])
