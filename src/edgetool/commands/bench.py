"""`edgetool bench`: how fast an OpenAI endpoint answers, ours or not, or two of them in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_common
def bench(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="Address of the endpoint, with or without /v1.")
    ] = None,
    against: Annotated[
        str | None, Option("--against", metavar="URL", help="A second endpoint, measured in turns with the first.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", metavar="NAME", help="Model to ask for [default: the only one served].")
    ] = None,
    against_model: Annotated[
        str | None, Option("--against-model", metavar="NAME", help="Model to ask the second endpoint for.")
    ] = None,
    api_key: o.ApiKey = None,
    concurrency: Annotated[
        str | None, Option("--concurrency", metavar="N,N", help="Requests under way at once [default: 1,8].")
    ] = None,
    requests: Annotated[
        int | None, Option("--requests", metavar="N", help="Requests on each level [default: 16, or 4 x concurrency].")
    ] = None,
    prompt_tokens: Annotated[
        int | None, Option("--prompt-tokens", metavar="N", help="Length of the prompts [default: 256].")
    ] = None,
    output_tokens: Annotated[
        int | None, Option("--output-tokens", metavar="N", help="Length of the answers [default: 128].")
    ] = None,
    rounds: Annotated[
        int | None, Option("--rounds", metavar="N", help="Turns in which a level is measured [default: 4].")
    ] = None,
    warmup: Annotated[
        int | None, Option("--warmup", metavar="N", help="Requests before the first that counts [default: 2].")
    ] = None,
    api: Annotated[str | None, Option("--api", metavar="NAME", help="chat or completions [default: chat].")] = None,
    ignore_eos: Annotated[
        bool | None,
        Option("--ignore-eos/--no-ignore-eos", help="Ask for answers of full length [default: ignore-eos]."),
    ] = None,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of the prompts [default: 0].")] = None,
    timeout_s: Annotated[
        str | None, Option("--timeout", metavar="TIME", help="Longest wait for the next word [default: 600].")
    ] = None,
    plot: Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw the figures into this SVG file.")] = None,
) -> None:
    """Measure an OpenAI endpoint.

    Time to first token, time per output token, latency, tokens and requests per second, at each number of requests
    under way at once. With --against a second endpoint takes turns with the first.
    """
    with run(ctx) as this:
        from edgetool.loadtest.job import run_bench

        result = run_bench(this.config.bench, this.config.common, this.progress)
        this.result(result, blocks(result))


def blocks(result: dict[str, Any]) -> list[Block]:
    """The result as tables: one line for each level and endpoint, then how the two compare."""
    from edgetool.commands._blocks import listing
    from edgetool.console import Table

    headers = ["endpoint", "at once", "requests", "failed", "tokens/s", "requests/s"]
    headers += [f"{name} {rank}" for name in ("TTFT ms", "TPOT ms", "latency s") for rank in ("p50", "p90", "p99")]
    rows = []
    for found in result["results"]:
        row = [found["endpoint"], str(found["concurrency"]), str(found["requests"]), str(found["failed"])]
        row += [f"{found['output_tokens_per_s']:.1f}", f"{found['requests_per_s']:.2f}"]
        for name, factor, digits in (("ttft_s", 1000, 1), ("tpot_s", 1000, 1), ("latency_s", 1, 2)):
            row += ["-" if v is None else f"{v * factor:.{digits}f}" for v in found[name].values()]
        rows.append(row)
    shown: list[Block] = [Table(", ".join(end["model"] for end in result["endpoints"]), rows, headers)]
    if "comparison" in result:
        shown.append(_comparison(result))
    return shown + listing("warnings", result["warnings"])


def _comparison(result: dict[str, Any]) -> Block:
    from edgetool.console import Table

    names = ("output_tokens_per_s", "ttft_s_p50", "tpot_s_p50", "latency_s_p50")
    rows = []
    for found in result["comparison"]:
        ratios = [found.get(name) for name in names]
        shown = ["-" if r is None else f"{r['ratio']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f})" for r in ratios]
        rows.append([str(found["concurrency"]), *shown])
    second, first = result["endpoints"][1]["url"], result["endpoints"][0]["url"]
    title = f"{second} over {first}: median of the rounds (lowest to highest)"
    return Table(title, rows, ["at once", "tokens/s", "TTFT p50", "TPOT p50", "latency p50"])
