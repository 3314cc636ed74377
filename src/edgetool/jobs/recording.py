"""A long command records itself: when it begins, what it says while it runs, and how it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetool.config import Config
from edgetool.errors import EdgetoolError
from edgetool.jobs.masking import masked
from edgetool.jobs.store import Job, JobStore, state_of
from edgetool.process.log import open_log
from edgetool.process.tree import TREE_VARIABLE
from edgetool.progress import Progress, TeeProgress
from edgetool.progress_lines import PlainProgress


@contextlib.contextmanager
def recorded(config: Config, section: str, arguments: Sequence[str], progress: Progress) -> Iterator[Progress]:
    """Record the block as a job; the progress that it yields goes into the job's log too.

    A store that cannot be written costs one warning, never the command.
    """
    store = JobStore(config.jobs.directory)
    token = secrets.token_hex(8)
    above = [one for one in os.environ.get(TREE_VARIABLE, "").split(":") if one]
    with contextlib.ExitStack() as held:
        try:
            job = store.start(_shown(config, arguments), token, above, _output_of(config, section))
            stream = held.enter_context(os.fdopen(open_log(Path(job.log)), "w", encoding="utf-8", errors="replace"))
        except (EdgetoolError, OSError) as error:
            progress.warn(f"this job is not recorded: {error}")
            yield progress
            return
        lines = held.enter_context(contextlib.closing(PlainProgress(stream)))
        lines.note(shlex.join(["edgetool", *job.command]))
        held.enter_context(_variable(TREE_VARIABLE, ":".join([*above, token])))
        try:
            yield TeeProgress(progress, lines)
        except BaseException as error:
            _ended(store, job, error, lines, progress)
            raise
        _ended(store, job, None, lines, progress)
        with contextlib.suppress(EdgetoolError):
            store.remove(time.time() - config.jobs.keep_s)


def _ended(store: JobStore, job: Job, error: BaseException | None, lines: PlainProgress, progress: Progress) -> None:
    code = _exit_code(error)
    message = getattr(error, "message", None) or (None if code == 0 or error is None else str(error) or None)
    if error is not None and code == 1:  # a bug: its traceback helps whoever reads the log
        with contextlib.suppress(OSError):
            lines.stream.writelines(traceback.format_exception(error))
    lines.note(f"ended with exit code {code}" + (f": {message}" if message else ""))
    try:
        store.finish(job.id, state_of(code), code, message)
    except EdgetoolError as failure:
        progress.warn(f"the end of this job is not recorded: {failure}")


def _exit_code(error: BaseException | None) -> int:
    """What the shell will be told: errors that know their exit code carry it, typer's too."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    code: Any = getattr(error, "exit_code", getattr(error, "code", 1))
    return code if isinstance(code, int) else 1


def _shown(config: Config, arguments: Sequence[str]) -> list[str]:
    return masked(arguments, [text for text in (config.common.server_key(), config.common.token()) if text])


def _output_of(config: Config, section: str) -> str | None:
    output = getattr(getattr(config, section), "output", None)
    return None if output in (None, Path()) else os.path.normpath(Path(output).absolute())


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
