"""`edgetool fpga-host`: the computer of a board, which owns the device and answers gateways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _board_options as b
from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_common
def fpga_host(
    ctx: typer.Context,
    image: b.Image = None,
    listen: b.Listen = None,
    port: Annotated[
        int | None, Option("--port", metavar="N", help="Port of protocol A; 0 takes a free one [default: 8124].")
    ] = None,
    protocol: Annotated[
        str | None, Option("--protocol", metavar="NAME", help="A, B or both (docs/fpga-protocol.md) [default: A].")
    ] = None,
    port_b: Annotated[
        int | None, Option("--port-b", metavar="N", help="Port of protocol B; 0 takes a free one [default: 8123].")
    ] = None,
    board: b.Board = None,
    numerics: b.Numerics = None,
    device: b.Device = None,
    threads: o.Threads = None,
    max_queue: Annotated[
        int | None, Option("--max-queue", metavar="N", help="Requests that may wait for the device [default: 256].")
    ] = None,
    timeout_s: b.Timeout = None,
    wait_s: b.Wait = None,
) -> None:
    """Own a board, or its simulator, and serve gateways.

    The protocols are those of docs/fpga-protocol.md; `edgetool serve-fpga --host` is a gateway. There is no key: listen
    on other addresses than 127.0.0.1 in a network of your own only.
    """
    with run(ctx) as this:
        from edgetool.fpga_service import host_main

        host_main.serve(this.config, this.progress, lambda result: this.result(result, _ready_blocks(result)))


def _ready_blocks(result: dict[str, Any]) -> list[Block]:
    from edgetool.commands._blocks import facts
    from edgetool.console import Text

    return [facts("ready", result), Text("", "Ctrl-C stops it")]
