"""`edgetool compile-vcu128`: a quantised checkpoint in, an HBM image for a VCU128 board out; and tools for images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_job
def compile_vcu128(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A quantised checkpoint; with --extract or --verify an image."),
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="DIR", help="Directory to write; must not exist yet (--extract: a file)."),
    ] = None,
    profile: Annotated[
        str | None, Option("--profile", metavar="NAME", help="edgellm (the board's format) or sim [default: sim].")
    ] = None,
    max_context: Annotated[
        int | None,
        Option("--max-context", metavar="N", help="Tokens of KV cache [default: 2048, or as the model was trained]."),
    ] = None,
    lm_head: Annotated[
        str | None,
        Option("--lm-head", metavar="NAME", help="rtn4 or fp16, for an output matrix that is not quantised."),
    ] = None,
    int4: Annotated[
        str | None, Option("--int4", metavar="NAME", help="Bits of a weight: twos or signmag [default: twos].")
    ] = None,
    bits: Annotated[int | None, Option("--bits", metavar="N", help="Bits the checkpoint must have.")] = None,
    group_size: Annotated[
        int | None,
        Option("--group-size", metavar="N", help="Group size the checkpoint must have, or gets with --requant."),
    ] = None,
    desc_act: Annotated[
        bool | None, Option("--desc-act/--no-desc-act", help="Whether it must be in activation order.")
    ] = None,
    requant: Annotated[
        str | None,
        Option("--requant", metavar="NAME", help="sym: round again what the profile cannot hold (lossy)."),
    ] = None,
    emit: Annotated[
        str | None,
        Option("--emit", metavar="NAME", help="image, edgellm-tree or both [default: both for edgellm, else image]."),
    ] = None,
    jobs: Annotated[
        int | None, Option("--jobs", "-j", metavar="N", help="Matrices packed at once [default: one per core].")
    ] = None,
    inspect: Annotated[
        Path | None, Option("--inspect", metavar="IMAGE", help="Describe an image and check every hash.")
    ] = None,
    diff: Annotated[tuple[Path, Path] | None, Option("--diff", metavar="A B", help="Compare two images.")] = None,
    extract: Annotated[
        str | None,
        Option("--extract", metavar="NAME", help="Write one matrix of an image to -o, dequantised (safetensors)."),
    ] = None,
    verify: Annotated[
        str | None, Option("--verify", metavar="CKPT", help="Compare an image with its checkpoint, weight by weight.")
    ] = None,
    verify_run: Annotated[
        str | None,
        Option("--verify-run", metavar="CKPT", help="Run an image; compare with torch in float32 on its checkpoint."),
    ] = None,
    numerics: Annotated[
        str | None, Option("--numerics", metavar="NAME", help="With --verify-run: et1 or fast [default: et1].")
    ] = None,
    trace: Annotated[
        Path | None,
        Option("--trace", metavar="FILE", help="With --verify-run: write a line of JSON for every operation."),
    ] = None,
    push: Annotated[
        Path | None, Option("--push", metavar="IMAGE", help="Write an image to --device and read it back.")
    ] = None,
    device: Annotated[
        Path | None, Option("--device", metavar="PATH", help="XDMA device, e.g. /dev/xdma0_h2c_0, or an empty file.")
    ] = None,
) -> None:
    """Compile a quantised checkpoint for a VCU128 board.

    Try `edgetool quantize demo -o q --group-size 64`, then `edgetool compile-vcu128 q -o image --lm-head rtn4`.
    """
    with run(ctx) as this:
        from edgetool.fpga.job import run_compile

        result = run_compile(this.config.compile_vcu128, this.config.common, this.progress)
        this.result(result, blocks(result))


def blocks(result: dict[str, Any]) -> list[Block]:
    """The result as tables, without lists of 32 equal numbers."""
    from edgetool.commands import _blocks

    shown = dict(result.get("plan", result))
    title = "plan (nothing was written)" if "plan" in result else "compile-vcu128"
    hbm = shown.pop("hbm_bytes_per_pc", None)
    estimate = shown.pop("estimate", None)
    memory = {key: value for key, value in shown.pop("memory", {}).items() if key != "hbm_bytes_per_pc"}
    segments, tensors = shown.pop("segments", []), shown.pop("tensors", [])
    if hbm:
        shown["hbm_per_pc_bytes"] = max(hbm)
    if read := shown.pop("bytes_per_token", None):
        shown |= {
            "decoded_at_context_of_tokens": read["context_tokens"],
            "read_bytes_per_pc": max(read["bytes_per_pc"]),
        }
        shown["read_bytes_by_role"] = read["bytes_by_role"]
    roles = shown.pop("read_bytes_by_role", None) or memory.pop("read_bytes_by_role", None)
    tables = _blocks.report(title, shown)
    if roles:
        rows = [{"matrices": role, "bytes read for a token": f"{size:,}"} for role, size in roles.items()]
        tables.append(_blocks.grid("", rows))
    if memory:
        tables.append(_blocks.facts("memory", memory))
    if tensors:
        tables.append(_blocks.grid("tensors", tensors))
    if segments:
        rows = [{"file": one["file"], "bytes": one["bytes"], "sha256": one["sha256"]} for one in segments]
        tables.append(_blocks.grid("segments", rows))
    if estimate:
        tables += _estimate(estimate)
    return tables


def _estimate(estimate: dict[str, Any]) -> list[Block]:
    from edgetool.commands import _blocks
    from edgetool.console import Table

    low, high = estimate["decode_tokens_per_s"]
    rates = {
        "decode, tokens/s": f"{low:g} to {high:g}",
        "prefill, tokens/s": f"{estimate['prefill_tokens_per_s']:g}",
    }
    tables: list[Block] = [_blocks.facts("speed (an estimate; no board was measured)", rates)]
    if "terms" in estimate:
        terms = {key.replace("_", " "): _number(value) for key, value in estimate["terms"].items()}
        tables.append(Table("its terms", [*estimate["formulas"].items(), *terms.items()]))
    return tables


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_number(item) for item in value)
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"
