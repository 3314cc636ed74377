"""`edgetool run`: a recipe of commands, from a model to numbers and a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_common
def run_recipe(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|MODEL", help="A .toml recipe; with --preset a model.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, Option("--preset", metavar="NAME", help="Recipe for MODEL: vcu128, gpu or smoke.")
    ] = None,
    model: Annotated[
        str | None, Option("--model", metavar="MODEL", help="Start from this model, not the recipe's.")
    ] = None,
    output: Annotated[
        str | None,
        Option("--output", "-o", metavar="DIR", help="Directory of the run; what is done there is not done again."),
    ] = None,
    set: Annotated[
        list[str] | None,
        Option("--set", metavar="STEP.KEY=VALUE", help="A setting of a step in place of the recipe's; several times."),
    ] = None,
    serve: Annotated[bool | None, Option("--serve", help="Leave what the last step serves running.")] = None,
    verify: Annotated[
        bool | None, Option("--verify", help="Hash outputs again before they count as unchanged.")
    ] = None,
    show_recipe: Annotated[bool | None, Option("--show-recipe", help="Print the recipe and stop.")] = None,
    dry_run: o.DryRun = None,
) -> None:
    """Run a recipe of commands; again, only what has changed.

    The steps of a recipe run one after the other; those whose input and settings are as before are not run again.
    `edgetool run demo --preset smoke -o runs/smoke` tries everything on a small model.
    """
    with run(ctx) as this:
        from edgetool.commands import _run_tables
        from edgetool.pipeline import job, plan

        config_file = ctx.params["config"]
        settings = this.config.run
        if settings.show_recipe:
            recipe = job.recipe_of(this.config)
            if this.output.json:
                this.result({"recipe": recipe.name, "text": recipe.text}, [])
            else:
                this.output.text(recipe.text)
        elif settings.dry_run:
            result = plan.dry_run(this.config, config_file, this.progress)
            this.result({"plan": result}, _run_tables.plan_blocks(result))
        else:
            job.run_recipe(this.config, config_file, this.progress, lambda found: this.result(found, _blocks(found)))


def _blocks(found: dict[str, Any]) -> list[Block]:
    from edgetool.commands._run_tables import result_blocks

    return result_blocks(found)
