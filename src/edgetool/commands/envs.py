"""`edgetool envs`: the environments of backends that cannot live in edgetool's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="An environment, see `edgetool envs list`.", show_default=False)
]
Directory = Annotated[
    str | None, typer.Option("--directory", metavar="DIR", help="Where environments are made, and looked for.")
]
Python = Annotated[
    str | None,
    typer.Option("--python", metavar="PYTHON", help="Interpreter to build with: a path, a name or a version."),
]
FindLinks = Annotated[
    str | None, typer.Option("--find-links", metavar="DIR", help="Directory of wheels; enough alone with --offline.")
]
TorchIndex = Annotated[
    str | None, typer.Option("--torch-index", metavar="URL", help="Package index that has the wanted builds of torch.")
]


@app.callback()
def envs() -> None:
    """Keep environments of vLLM and of other quantisers.

    Their requirements contradict each other and edgetool's, so each lives in a virtual environment of its own.
    """


@app.command("list")
@o.with_common
def list_environments(
    ctx: typer.Context,
    directory: Directory = None,
) -> None:
    """List the environments that there can be, and which are ready."""
    with run(ctx, "envs") as this:
        from edgetool.backends.doctor import overview

        rows = overview(this.config.envs)
        this.result({"environments": rows}, _table(rows))


@app.command("install")
@o.with_common
def install(
    ctx: typer.Context,
    name: Name = None,
    directory: Directory = None,
    build_python: Python = None,
    find_links: FindLinks = None,
    torch_index: TorchIndex = None,
    offline: o.Offline = None,
) -> None:
    """Install an environment, anew when its list has changed.

    One that is ready stays as it is, unless --python asks for another interpreter.
    """
    with run(ctx, "envs") as this:
        from edgetool.backends import environments, installer
        from edgetool.commands._blocks import report

        settings = this.config.envs
        recipe = environments.recipe_of(settings.name)
        result = installer.install(recipe, settings, offline=this.config.common.offline, progress=this.progress)
        this.result(result, report("installed" if result["changed"] else "installed already", result))


@app.command("remove")
@o.with_common
def remove(
    ctx: typer.Context,
    name: Name = None,
    directory: Directory = None,
) -> None:
    """Delete an environment that nobody uses."""
    with run(ctx, "envs") as this:
        from edgetool.backends import environments, installer
        from edgetool.commands._blocks import report

        result = installer.remove(environments.recipe_of(this.config.envs.name), this.config.envs)
        this.result(result, report("environment", result))


@app.command("doctor")
@o.with_common
def doctor(
    ctx: typer.Context,
    name: Name = None,
    directory: Directory = None,
    build_python: Python = None,
) -> None:
    """Say what keeps environments from being used or installed here.

    With NAME the exit code is 5 when that one cannot be used.
    """
    with run(ctx, "envs") as this:
        from edgetool.backends.doctor import examine_all, refuse_unusable

        found = examine_all(this.config.envs)
        asked = this.config.envs.name is not None
        if asked and this.output.json:
            refuse_unusable(found[0])  # one document: the error says what the checks found
        this.result({"environments": found}, _findings(found))
        if asked:
            refuse_unusable(found[0])


def _table(rows: list[dict[str, Any]]) -> list[Block]:
    from edgetool.commands._blocks import grid

    return [grid("environments", rows)]


def _findings(found: list[dict[str, Any]]) -> list[Block]:
    from edgetool.commands._blocks import grid

    tables: list[Block] = []
    for environment in found:
        usable = "usable" if environment["usable"] else environment["state"]
        if environment["installable"] is not None:
            usable += ", can be installed here" if environment["installable"] else ", cannot be installed here"
        tables.append(grid(f"{environment['name']} ({environment['purpose']}): {usable}", environment["checks"]))
    return tables
