"""What every command does around its one library call: configuration, progress, result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from edgetool.config import Config
    from edgetool.console import Block, Output
    from edgetool.progress import Progress

NOT_SETTINGS = {"config", "show_config", "quiet", "command"}


@dataclass
class Run:
    """One run of a command: what it was told, and where it reports."""

    config: Config
    progress: Progress
    output: Output
    live: contextlib.ExitStack

    def result(self, result: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        """Print the result; progress ends first, so that bars and table do not mix on a terminal."""
        self.live.close()
        self.output.result(result, blocks)


@contextlib.contextmanager
def run(ctx: typer.Context, section: str | None = None) -> Iterator[Run]:
    """Resolve the configuration of the command that `ctx` parsed and open its progress.

    A sub-command (`gpus run`) names the `section` of its group; options given to the group hold for it too.
    With `--show-config` the configuration is printed instead, and the command ends there.
    """
    from edgetool import config, console

    output: Output = ctx.obj
    command = section or str(ctx.info_name).replace("-", "_")
    given = dict(ctx.params)
    if section and ctx.parent:
        given.update({key: value for key, value in ctx.parent.params.items() if given.get(key) is None})
    values = {key: value for key, value in given.items() if key not in NOT_SETTINGS}
    if given.get("quiet"):
        values["progress"] = "quiet"
    show = bool(given.get("show_config"))
    settings = config.load(command, values, given.get("config"), complete=not show)
    output.json = settings.common.json_output
    output.progress_mode = settings.common.progress
    if show:
        from edgetool.commands._show_config import show_config

        show_config(settings, command, output)
        raise typer.Exit()
    with output.reserved(), contextlib.ExitStack() as live:
        yield Run(settings, live.enter_context(console.progress(settings.common.progress)), output, live)
