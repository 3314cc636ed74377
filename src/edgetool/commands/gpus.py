"""`edgetool gpus`: the GPUs, ports and boards of this machine, who has them, and commands that run under a lease."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run as run_command

app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)

Watch = Annotated[bool | None, typer.Option("--watch", "-w", help="Show the table again and again, until Ctrl-C.")]
Interval = Annotated[
    str | None, typer.Option("--interval", metavar="TIME", help="Time between two looks with --watch [default: 2].")
]
GpuClass = Annotated[
    str | None, typer.Option("--class", metavar="NAME", help="Class of the GPUs, such as 4090 or H100 [default: any].")
]
Count = Annotated[
    str | None,
    typer.Option("--count", metavar="N", help="Number of GPUs [default: 1; 0 when only ports or a board are wanted]."),
]
MinFree = Annotated[
    str | None, typer.Option("--min-free", metavar="SIZE", help="Memory to reserve on each GPU, such as 22GiB.")
]
Exclusive = Annotated[
    bool | None,
    typer.Option("--exclusive/--shared", help="Whether to keep others off the GPUs [default: unless --min-free]."),
]
Ports = Annotated[str | None, typer.Option("--ports", metavar="N", help="Ports to lease, in $EDGETOOL_PORTS.")]
Port = Annotated[str | None, typer.Option("--port", metavar="NUMBER", help="Lease this very port.")]
Board = Annotated[str | None, typer.Option("--board", metavar="NAME", help="Lease an FPGA board or its simulator.")]
Wait = Annotated[
    str | None,
    typer.Option("--wait", metavar="TIME", help="How long to wait for what is taken, such as 10m [default: 0]."),
]
Grace = Annotated[
    str | None, typer.Option("--grace", metavar="TIME", help="Time for orphans to end by themselves [default: 5].")
]
DryRun = Annotated[bool | None, typer.Option("--dry-run", help="Say what would be granted or ended, and do nothing.")]


@app.callback()
@o.with_common
def gpus(
    ctx: typer.Context,
    watch: Watch = None,
    interval_s: Interval = None,
) -> None:
    """Show who uses or leases which GPUs, ports and boards.

    Works without an NVIDIA driver, for ports and boards. EDGETOOL_NVML_FIXTURE shows a recorded machine.
    """
    if ctx.invoked_subcommand is not None:
        return
    with run_command(ctx, "gpus") as this:
        from edgetool.scheduler.leasing import from_config

        scheduler = from_config(this.config)
        if this.output.json and not this.config.gpus.watch:
            this.result(scheduler.snapshot(), [])
            return
        from edgetool.commands._gpus_table import blocks, watch_until_stopped

        if this.config.gpus.watch:
            watch_until_stopped(scheduler, this.config.gpus.interval_s, this.output)
        else:
            this.result({}, blocks(scheduler.look()))


@app.command("run", context_settings={"allow_interspersed_args": False})
@o.with_common
def run(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- CMD ...", help="The command to run, after two dashes.")
    ] = None,
    gpu_class: GpuClass = None,
    count: Count = None,
    min_free_bytes: MinFree = None,
    exclusive: Exclusive = None,
    ports: Ports = None,
    port: Port = None,
    board: Board = None,
    wait_s: Wait = None,
    dry_run: DryRun = None,
) -> None:
    """Run a command on leased GPUs, ports or boards.

    The command finds its GPUs in CUDA_VISIBLE_DEVICES, and its exit code is returned. The lease ends with the last of
    its processes.
    """
    with run_command(ctx, "gpus") as this:
        from edgetool.commands._under_lease import plan, run_under_lease
        from edgetool.scheduler.leasing import from_config
        from edgetool.scheduler.placement import Request

        wanted = this.config.gpus
        request = Request(
            gpus=wanted.count,
            gpu_class=wanted.gpu_class,
            min_free_bytes=wanted.min_free_bytes or 0,
            exclusive=wanted.exclusive,
            ports=wanted.ports,
            port=wanted.port,
            board=wanted.board,
        )
        scheduler = from_config(this.config)
        if wanted.dry_run:
            plan(this, scheduler, request)
        else:
            raise typer.Exit(run_under_lease(this, scheduler, request, command or []))


@app.command("reap")
@o.with_common
def reap(
    ctx: typer.Context,
    grace_s: Grace = None,
    dry_run: DryRun = None,
) -> None:
    """End what your leases left running, and prove that it is gone.

    Only your own: never a process of somebody else, nor one that works under no lease.
    """
    with run_command(ctx, "gpus") as this:
        from edgetool.commands._blocks import report
        from edgetool.scheduler.leasing import from_config
        from edgetool.scheduler.reaping import reap as end_orphans

        scheduler, settings = from_config(this.config), this.config.gpus
        result = end_orphans(
            scheduler.directory,
            scheduler.inventory,
            grace_s=settings.grace_s,
            dry_run=settings.dry_run,
            progress=this.progress,
        )
        title = "plan (nothing was ended)" if settings.dry_run else "reap"
        this.result(result, report(title, result.get("plan", result)))
