"""Options of the commands that run a compiled image: serve-fpga, fpga-host and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option

Image = Annotated[
    Path | None, Option("--image", metavar="DIR", help="Image directory that compile-vcu128 has written.")
]
Listen = Annotated[str | None, Option("--listen", metavar="ADDRESS", help="Address to listen on [default: 127.0.0.1].")]
Board = Annotated[
    str | None, Option("--board", metavar="NAME", help="Board to lease [default: a simulated one of its own].")
]
Numerics = Annotated[
    str | None,
    Option("--numerics", metavar="NAME", help="et1 (bit for bit as documented) or fast (nearly so) [default: et1]."),
]
Device = Annotated[
    str | None,
    Option("--device", metavar="NAME", help="auto, cpu or cuda, for fast numerics [default: auto]."),
]
Timeout = Annotated[
    str | None,
    Option("--timeout", metavar="TIME", help="Longest time for one request, its wait included [default: 600]."),
]
Wait = Annotated[
    str | None,
    Option("--wait", metavar="TIME", help="How long to wait for a board that is not free [default: 0]."),
]
