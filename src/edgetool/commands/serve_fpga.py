"""`edgetool serve-fpga`: a compiled image, or the host of a board, behind an OpenAI API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _board_options as b
from edgetool.commands import _options as o
from edgetool.commands._run import run
from edgetool.errors import UsageError

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_common
def serve_fpga(
    ctx: typer.Context,
    image: b.Image = None,
    host: Annotated[
        str | None, Option("--host", metavar="HOST:PORT", help="A running host of a board to pass requests on to.")
    ] = None,
    listen: b.Listen = None,
    port: Annotated[
        int | None, Option("--port", metavar="N", help="Port to listen on; 0 takes a free one [default: 7000].")
    ] = None,
    api_key: o.ApiKey = None,
    keys_file: Annotated[
        Path | None, Option("--keys-file", metavar="FILE", help="File with a line NAME KEY for each client.")
    ] = None,
    rate_limit: Annotated[
        int | None, Option("--rate-limit", metavar="N", help="Requests a minute for each key [default: no limit].")
    ] = None,
    served_model_name: Annotated[
        str | None,
        Option("--served-model-name", metavar="NAME", help="Name that clients ask for [default: the image's]."),
    ] = None,
    max_model_len: Annotated[
        int | None, Option("--max-model-len", metavar="N", help="Longest context in tokens [default: the image's].")
    ] = None,
    temperature: Annotated[
        float | None,
        Option("--temperature", metavar="X", help="Where a request gives none [default: the model's own, else 1]."),
    ] = None,
    max_queue: Annotated[
        int | None,
        Option("--max-queue", metavar="N", help="Requests that may wait; one more is answered 429 [default: 64]."),
    ] = None,
    timeout_s: b.Timeout = None,
    record: Annotated[
        Path | None, Option("--record", metavar="FILE", help="JSONL file to add a line to for each request.")
    ] = None,
    record_contents: Annotated[bool | None, Option("--record-contents", help="Record prompts and answers too.")] = None,
    cors_origins: Annotated[
        str | None,
        Option("--cors-origins", metavar="URL,URL", help="Web origins whose pages may ask; none without it."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        Option("--tokenizer", metavar="DIR", help="Tokenizer to count usage with, for hosts that do not count."),
    ] = None,
    board: b.Board = None,
    numerics: b.Numerics = None,
    device: b.Device = None,
    threads: o.Threads = None,
    wait_s: b.Wait = None,
    ready_timeout_s: Annotated[
        str | None, Option("--ready-timeout", metavar="TIME", help="Time to become ready in [default: 300].")
    ] = None,
    restarts: Annotated[
        int | None, Option("--restarts", metavar="N", help="Start a failed host again so often [default: 10].")
    ] = None,
    drain_s: o.Drain = None,
    grace_s: o.Grace = None,
    dry_run: o.DryRun = None,
) -> None:
    """Serve a compiled model behind an OpenAI API.

    With --image the simulator runs the image in a host of its own; with --host requests go to the host of a board,
    ours or an older one. It runs until it is stopped. A key, in EDGETOOL_API_KEY or --keys-file, guards every route but
    /health.
    """
    with run(ctx) as this:
        from edgetool.commands._blocks import report
        from edgetool.fpga_service import service

        settings = this.config.serve_fpga
        if settings.image is None and settings.host is None:
            raise UsageError("serve-fpga needs --image or --host", "edgetool serve-fpga --help")
        if settings.dry_run:
            result = service.dry_run(this.config)
            this.result(result, report("plan (nothing was started)", result["plan"]))
        else:
            service.serve(this.config, this.progress, lambda result: this.result(result, _ready_blocks(result)))


def _ready_blocks(result: dict[str, Any]) -> list[Block]:
    from edgetool.commands._blocks import facts
    from edgetool.console import Text

    blocks: list[Block] = [facts("ready", {key: value for key, value in result.items() if key != "api_key"})]
    if result.get("api_key"):
        blocks.append(Text("key, shown once", result["api_key"]))
    blocks.append(Text("", f"talk to it: edgetool chat {result['url']}; Ctrl-C stops it"))
    return blocks
