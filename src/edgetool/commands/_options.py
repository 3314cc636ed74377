"""Options shared by commands. All default to None = not given: defaults live in config.py alone.

Help texts state the default in brackets; tests/contracts compares them with config.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetool.commands._run import schema_of

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A directory, a .gguf file, demo, hf:org/name or ms:org/name.", show_default=False
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Directory to write; must not exist yet.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads [default: one per core].")]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Replace an existing output.")]
Resume = Annotated[bool | None, typer.Option("--resume", help="Go on with an unfinished run.")]
DryRun = Annotated[bool | None, typer.Option("--dry-run", help="Show the plan and write nothing.")]

Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N [default: auto].")
]
Drain = Annotated[
    str | None,
    typer.Option("--drain", metavar="TIME", help="Time for answers under way to end when it is stopped [default: 0]."),
]
Grace = Annotated[
    str | None, typer.Option("--grace", metavar="TIME", help="Time after that until it is killed [default: 10].")
]

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML or YAML file with a table per command.")
]
ShowConfig = Annotated[bool | None, typer.Option("--show-config", help="Print the resolved configuration and stop.")]
Json = Annotated[bool | None, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
ProgressMode = Annotated[
    str | None,
    typer.Option("--progress", metavar="MODE", help="auto, bar, plain, json or quiet, on stderr [default: auto]."),
]
Quiet = Annotated[bool | None, typer.Option("--quiet", "-q", help="Show no progress (as --progress quiet).")]
Lang = Annotated[
    str | None,
    typer.Option("--lang", metavar="NAME", help="en, zh_CN or auto: language of what is shown [default: auto]."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="DIR", help="Downloads and dequantised models [default: ~/.cache/edgetool]."),
]
Offline = Annotated[bool | None, typer.Option("--offline", help="Use no network.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", help="Key of the server; better in EDGETOOL_API_KEY: options are seen in `ps`."
    ),
]


_COMMON = {
    "config": ConfigFile,
    "show_config": ShowConfig,
    "json": Json,
    "progress": ProgressMode,
    "quiet": Quiet,
    "lang": Lang,
}
_OF_A_JOB = {
    "revision": Revision,
    "resume": Resume,
    "overwrite": Overwrite,
    "dry_run": DryRun,
    "offline": Offline,
    "cache_dir": CacheDir,
}


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, after its own options, those that every command has; `_run.run` reads them from the context."""
    return _with(_COMMON, command)


def with_job(command: Callable[..., None]) -> Callable[..., None]:
    """As `with_common`, for a command that reads a model and writes a directory: it can be planned and resumed."""
    return _with({**_OF_A_JOB, **_COMMON}, command)


def _with(further: Mapping[str, Any], command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def accepting(**values: Any) -> None:
        values["ctx"].obj.schema = schema_of(values["ctx"])  # before anything in the command can fail
        command(**{name: value for name, value in values.items() if name not in further})

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in further.items()
    ]
    accepting.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    return accepting
