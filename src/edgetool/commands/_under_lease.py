"""`edgetool gpus run`: what happens around the command that it runs."""

from __future__ import annotations

import os

from edgetool.commands._blocks import report
from edgetool.commands._run import Run
from edgetool.errors import UsageError
from edgetool.process import foreground
from edgetool.scheduler.lease_records import shown_command
from edgetool.scheduler.leasing import Lease, Scheduler
from edgetool.scheduler.ownership import orphans
from edgetool.scheduler.placement import Request


def run_under_lease(this: Run, scheduler: Scheduler, request: Request, command: list[str]) -> int:
    """Lease, run `command` under the lease, release; the exit code of the command.

    Raises:
        UsageError: there is no command.
    """
    if not command:
        raise UsageError("gpus run needs a command", "edgetool gpus run --class 4090 -- python train.py")
    wait_s = this.config.gpus.wait_s
    lease = scheduler.acquire(request, command=shown_command(command), wait_s=wait_s, progress=this.progress)
    with lease:
        this.progress.note(f"leased {request}: {_granted(lease)}")
        this.live.close()  # from here on the terminal is the command's
        code = foreground.run(
            command,
            env={**os.environ, **lease.environment()},
            pass_fds=lease.fds,
            stdout=this.output.descriptor(),
            started=lease.adopt,
        )
        everything_free = lease.release()
        left = orphans(scheduler.directory.scan().leases, scheduler.directory.path, os.geteuid())
        numbers = sorted(process.pid for process, identity in left.items() if identity == lease.id)
    if numbers:
        kept = "" if everything_free else " and keep the lease"
        listing = ", ".join(str(number) for number in numbers)
        this.progress.warn(f"processes of the command still run{kept}: {listing} (edgetool gpus reap ends them)")
    return code


def plan(this: Run, scheduler: Scheduler, request: Request) -> None:
    """Show what the request would get now."""
    with scheduler.acquire(request, command="edgetool gpus run --dry-run") as lease:
        result = {
            "request": str(request),
            "gpus": list(lease.gpu_uuids),
            "ports": list(lease.ports),
            "board": lease.board,
        }
    this.result({"plan": result}, report("would be granted", result))


def _granted(lease: Lease) -> str:
    parts = [*lease.gpu_uuids, *(f"port {port}" for port in lease.ports)]
    parts += [f"board {lease.board}"] if lease.board else []
    return f"{', '.join(parts)} (lease {lease.id})" if parts else f"lease {lease.id}"
