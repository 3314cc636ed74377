"""`edgetool inspect`: what a checkpoint is, read from its tensors and not believed from its config."""

from __future__ import annotations

from typing import Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run


@o.with_common
def inspect(
    ctx: typer.Context,
    model: o.Model = None,
    revision: o.Revision = None,
    offline: o.Offline = None,
    cache_dir: o.CacheDir = None,
) -> None:
    """Say what a checkpoint is, and what is wrong with it.

    Architecture, sizes and quantisation are read from the tensors themselves, and compared with the config.
    """
    with run(ctx) as this:
        from edgetool.checkpoints import sources
        from edgetool.checkpoints.inspect import inspect_checkpoint
        from edgetool.commands._blocks import listing, report

        settings = this.config.inspect
        source = sources.resolve_configured(settings.model, this.config.common, settings.revision, this.progress)
        result: dict[str, Any] = inspect_checkpoint(source.path).to_dict()
        shown = {key: value for key, value in result.items() if key != "problems"}
        problems = result.get("problems") or ["none found"]
        this.result(result, [*report(settings.model, shown), *listing("problems", problems)])
