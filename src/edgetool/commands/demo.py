"""`edgetool demo`: the whole road on a real small model, for someone who has just installed it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run


@o.with_common
def demo(
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory to write; a demo in it is replaced [default: demo-out]."
        ),
    ] = None,
    threads: o.Threads = None,
    offline: o.Offline = None,
    cache_dir: o.CacheDir = None,
) -> None:
    """Quantise a real small model and compare.

    The model is SmolLM2-135M-Instruct, fetched once; compared are size, perplexity and an answer.
    """
    with run(ctx) as this:
        from edgetool.commands._blocks import report
        from edgetool.quantizers.demo import run_demo

        result = run_demo(this.config.demo, this.config.common, this.progress)
        this.result(result, report("demo", result))
