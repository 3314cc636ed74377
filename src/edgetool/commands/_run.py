"""What every command does around its one library call: configuration, progress, result."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgetool.errors import BadInput

if TYPE_CHECKING:
    from edgetool.config import Config
    from edgetool.console import Block, Output
    from edgetool.progress import Progress

NOT_SETTINGS = {"config", "show_config", "quiet", "command"}

JOBS: dict[str, tuple[str, ...]] = {
    "quantize": ("dry_run",),
    "convert": ("dry_run", "fix_config"),
    "eval": ("dry_run", "compare"),
    "compile_vcu128": ("dry_run", "inspect", "diff", "extract"),
    "serve_gpu": ("dry_run", "list_servers", "stop", "detach"),
    "serve_fpga": ("dry_run",),
    "fpga_host": (),
    "bench": (),
    "demo": (),
    "run": ("dry_run", "show_recipe"),
}
"""Sections of the long commands, which record themselves as jobs, and the settings with which they are quick ones.

A detached server is a job of its own, not that of the command that has started it.
"""


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
    from edgetool import config, console, messages
    from edgetool.messages import choice

    output: Output = ctx.obj
    command = section or str(ctx.info_name).replace("-", "_")
    given = dict(ctx.params)
    if section and ctx.parent:
        given.update({key: value for key, value in ctx.parent.params.items() if given.get(key) is None})
    given["lang"] = given.get("lang") or ctx.find_root().params.get("lang")  # it may stand before the command, too
    # an option that may be repeated and was not given is () to typer
    values = {key: value for key, value in given.items() if key not in NOT_SETTINGS and value != ()}
    if given.get("quiet"):
        values["progress"] = "quiet"
    show = bool(given.get("show_config"))
    settings = config.load(
        command, values, given.get("config"), complete=not show, typed=" ".join(["edgetool", *_names(ctx)])
    )
    messages.use(choice.resolved(settings.common.lang, os.environ))
    output.json = settings.common.json_output
    output.progress_mode = settings.common.progress
    if show:
        from edgetool.commands._show_config import show_config

        show_config(settings, command, output)
        raise typer.Exit()
    if command in JOBS or command == "chat":
        _need_working_directory()
    with output.reserved(), contextlib.ExitStack() as live:
        shown = live.enter_context(console.progress(settings.common.progress))
        with _job(settings, command, output, shown) as progress, _long_names():
            yield Run(settings, progress, output, live)


@contextlib.contextmanager
def _long_names() -> Iterator[None]:
    """Name what the file system refuses by its length: any question about such a path fails, not only opening it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename or "")
        shown = name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"
        raise BadInput(
            f"the path {shown} is too long: a name may have 255 bytes, and edgetool's own endings such as .partial "
            "count too",
            "use shorter names",
        ) from error


def _need_working_directory() -> None:
    """Refuse a directory that was removed below the shell: libraries end the process there with words of their own."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise BadInput(
            "the working directory has been removed, and paths start from it", "cd to a directory that exists"
        ) from None


def schema_of(ctx: Any) -> str:
    """The name of the document that a command prints: `edgetool.gpus-reap/1` (docs/schemas).

    A command without --json has none of its own, only that of a failure.
    """
    if all(parameter.name != "json" for parameter in ctx.command.params):
        return "edgetool.failure/1"
    return f"edgetool.{'-'.join(_names(ctx))}/1"


def _names(ctx: Any) -> list[str]:
    """The command and its groups: `gpus`, `reap`."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return names


def _job(
    settings: Config, command: str, output: Output, progress: Progress
) -> contextlib.AbstractContextManager[Progress]:
    """Around a long command: its record in the job store. Quick ones do not even import it."""
    quick = JOBS.get(command)
    if quick is None or not settings.jobs.record or any(getattr(getattr(settings, command), key) for key in quick):
        return contextlib.nullcontext(progress)
    from edgetool.jobs.recording import recorded

    return recorded(settings, command, output.arguments, progress)
