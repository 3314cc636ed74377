"""Which sandbox a machine allows: tried out, with reasons for what it does not, and a warning of what stays open."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgetool.errors import BackendFailed, BadInput, MissingDependency
from edgetool.evaluation import sandbox_kernel as kernel
from edgetool.evaluation.sandbox import KINDS, Limits, Sandbox


def open_sandbox(
    trial: Path,
    *,
    readable: Sequence[Path] = (),
    limits: Limits | None = None,
    unsafe: bool = False,
    kinds: Sequence[str] = KINDS,
) -> Sandbox:
    """The strongest sandbox that works here, found by running the program `trial`, which must exit with 0.

    readable: what programs need besides the system's directories and this Python. unsafe: as root, do with limits alone
    where there is nothing better (`--unsafe-exec`). kinds: those to try, in order.

    Raises BadInput where we are root and only limits are left, BackendFailed where nothing works at all, and
    MissingDependency on another system than Linux.
    """
    if sys.platform != "linux":
        raise MissingDependency("generated code is run on Linux only", "leave humaneval and mbpp out of --tasks")
    prefixes = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1], *readable]
    places = tuple(dict.fromkeys(str(path.absolute()) for path in prefixes if path != Path("/")))
    as_root = os.geteuid() == 0
    reasons: list[str] = []
    for kind in kinds:
        if kind == "bubblewrap" and as_root:  # root needs no help to get namespaces
            continue
        if kind == "limits" and as_root and not unsafe:
            raise BadInput(
                "as root, generated code is run in isolation only, and there is none here: " + "; ".join(reasons),
                "run edgetool as an ordinary user, or in a container that allows namespaces "
                "(docker run --security-opt seccomp=unconfined), or take the risk: --unsafe-exec",
            )
        for change_user in (True, False) if as_root and kind == "limits" else (as_root,):
            sandbox = Sandbox(kind, places, limits or Limits(), change_user=change_user)
            reason = _try(sandbox, trial)
            if reason is None:
                return replace(sandbox, warnings=_warnings(sandbox, reasons))
            reasons.append(f"{kind}: {reason}")
    raise BackendFailed("generated code cannot be run here: " + "; ".join(reasons))


def _try(sandbox: Sandbox, trial: Path) -> str | None:
    """Why the trial did not go well, or None."""
    try:
        outcome = sandbox.run(trial)
    except BackendFailed as error:
        return error.message.partition(": ")[2] or error.message
    if outcome.returncode == 0:
        return None
    last = outcome.errors.strip().rpartition("\n")[2]
    return f"the trial ended with {outcome.returncode or outcome.ended_by}" + (f" ({last})" if last else "")


def _warnings(sandbox: Sandbox, reasons: Sequence[str]) -> tuple[str, ...]:
    if sandbox.kind in ("namespaces", "bubblewrap"):
        return ()
    why = "; ".join(reasons)
    if sandbox.kind == "landlock":
        if kernel.landlock_version() >= 6:
            return ()
        return (f"generated code can send signals to your other processes (no namespaces here: {why})",)
    network = "" if kernel.can_filter() else ", has the network"
    who = "root" if os.geteuid() == 0 and not sandbox.change_user else "this user"
    return (f"generated code runs with limits but without isolation: it reads what {who} may read{network} ({why})",)
