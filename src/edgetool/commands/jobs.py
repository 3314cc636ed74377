"""`edgetool jobs`: the long commands that run or have run, their logs, and how to end them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import Run, run
from edgetool.errors import UsageError

if TYPE_CHECKING:
    from edgetool.jobs.store import JobStore

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)

Number = Annotated[int | None, typer.Argument(metavar="ID", help="A number from `edgetool jobs`.", show_default=False)]


@app.callback()
@o.with_common
def jobs(
    ctx: typer.Context,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Jobs to list [default: 20].")] = None,
) -> None:
    """List the long commands that run or have run.

    One that was killed is lost. `edgetool jobs logs -f ID` follows one, `edgetool jobs cancel ID` ends one.
    """
    if ctx.invoked_subcommand is not None:
        return
    with run(ctx, "jobs") as this:
        from edgetool.commands._jobs_table import blocks, document

        found = _store(this).jobs(this.config.jobs.limit)
        this.result({"jobs": [document(job) for job in found]}, blocks(found))


@app.command("logs")
@o.with_common
def logs(
    ctx: typer.Context,
    number: Number = None,
    follow: Annotated[bool | None, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = None,
) -> None:
    """Print what a job has said."""
    with run(ctx, "jobs") as this:
        from edgetool.commands._jobs_table import document
        from edgetool.jobs.following import lines

        store, wanted = _store(this), _number(this)
        if this.output.json:
            text = list(lines(store, wanted, this.config.jobs.follow))
            this.result({**document(store.get(wanted)), "lines": text}, [])
            return
        for line in lines(store, wanted, this.config.jobs.follow):
            this.output.text(line + "\n")


@app.command("cancel")
@o.with_common
def cancel(
    ctx: typer.Context,
    number: Number = None,
    grace_s: Annotated[
        str | None, typer.Option("--grace", metavar="TIME", help="Time to end by itself in [default: 30].")
    ] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep", help="Keep the unfinished output that --resume can go on with.")
    ] = None,
) -> None:
    """End a job with all it has started and half written."""
    with run(ctx, "jobs") as this:
        from edgetool.commands._blocks import report
        from edgetool.jobs.cancelling import cancel as end

        settings = this.config.jobs
        result = end(_store(this), _number(this), grace_s=settings.grace_s, keep=settings.keep, progress=this.progress)
        this.result(result, report("cancelled", result))


@app.command("clean")
@o.with_common
def clean(
    ctx: typer.Context,
    older_than_s: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Only jobs that ended so long ago, such as 7d [default: 0]."),
    ] = None,
) -> None:
    """Forget jobs that have ended; what they wrote stays."""
    with run(ctx, "jobs") as this:
        import time

        from edgetool.commands._blocks import report

        result: dict[str, Any] = {"removed": _store(this).remove(time.time() - this.config.jobs.older_than_s)}
        this.result(result, report("jobs", result))


def _store(this: Run) -> JobStore:
    from edgetool.jobs.store import JobStore

    return JobStore(this.config.jobs.directory)


def _number(this: Run) -> int:
    number = this.config.jobs.number
    if number is None:
        raise UsageError("the ID of a job is needed", "edgetool jobs lists them")
    return number
