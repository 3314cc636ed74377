"""`edgetool completion`: the script that makes a shell complete edgetool's words."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Shell(StrEnum):
    """Shells that there is a script for: edgetool/completion/scripts/edgetool.<name>."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    ctx: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
) -> None:
    """Print the script that lets the Tab key complete.

    `source <(edgetool completion bash)` in ~/.bashrc is enough; docs/shell.md has zsh and fish.
    """
    import importlib.resources

    script = importlib.resources.files("edgetool.completion") / "scripts" / f"edgetool.{shell.value}"
    ctx.obj.text(script.read_text())
