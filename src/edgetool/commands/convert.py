"""`edgetool convert`: a quantised checkpoint into another layout, proven tensor by tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_job
def convert(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC", help="A directory, a .gguf file, demo, hf:org/name or ms:org/name.", show_default=False
        ),
    ] = None,
    output: o.Output = None,
    to: Annotated[
        str | None,
        Option("--to", metavar="FORMAT", help="gptq, gptq_v2, awq, compressed-tensors, fp16, bf16 or gguf."),
    ] = None,
    source_format: Annotated[
        str | None,
        Option("--from", metavar="FORMAT", help="What SRC is, where its tensors leave a doubt [default: auto]."),
    ] = None,
    verify: Annotated[
        str | None,
        Option("--verify", metavar="HOW", help="Read back and compare all, a sample or none [default: all]."),
    ] = None,
    sym: Annotated[bool | None, Option("--sym", help="Make every zero the middle one, or refuse.")] = None,
    requant: Annotated[
        bool | None, Option("--requant", help="Round again where no lossless way exists, and say how far it is off.")
    ] = None,
    group_size: Annotated[
        int | None,
        Option("--group-size", metavar="N", help="With --requant: 32, 64, 128 or -1 [default: as in SRC]."),
    ] = None,
    fold_act_order: Annotated[
        bool | None, Option("--fold-act-order", help="Remove activation order (g_idx) where that is exact.")
    ] = None,
    fix_config: Annotated[
        bool | None, Option("--fix-config", help="Repair SRC's config.json in place; convert nothing.")
    ] = None,
    max_shard_size_bytes: Annotated[
        str | None, Option("--max-shard-size", metavar="SIZE", help="Largest weight file [default: 5GB].")
    ] = None,
    threads: Annotated[
        int | None, Option("--threads", metavar="N", help="CPU threads [default: one per core, at most 8].")
    ] = None,
) -> None:
    """Convert a checkpoint without changing a weight.

    Each tensor is read back and compared; what has no lossless form in FORMAT is refused.
    """
    with run(ctx) as this:
        from edgetool.converter.job import run_convert

        result = run_convert(this.config.convert, this.config.common, this.progress)
        this.result(result, blocks(result))


def blocks(result: dict[str, Any]) -> list[Block]:
    """The result as tables: the plan of a dry run, what was repaired, or what was written and what to know of it."""
    from edgetool.commands import _blocks

    if "plan" in result:
        return _blocks.report("plan (nothing was written)", result["plan"])
    shown = dict(result)
    shown.pop("refused")
    if "gguf_types" in shown:
        shown["gguf_types"] = ", ".join(f"{count} {kind}" for kind, count in shown["gguf_types"].items())
    lists = {key: shown.pop(key) for key in ("disagreements", "warnings", "fixed") if key in shown}
    title = "repaired" if "fixed" in lists else "converted"
    tables = _blocks.report(title, shown)
    if "fixed" in lists and not lists["fixed"]:
        tables += _blocks.listing("fixed", ["nothing: the configuration agrees with the tensors"])
    for key, lines in lists.items():
        heading = "config.json and the tensors disagreed" if key == "disagreements" else key
        tables += _blocks.listing(heading, lines)
    return tables
