"""Every failure a user can cause or meet, with the exit code of the command-line contract (docs/exit-codes.md).

Standard library only: this module is imported by everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class EdgetoolError(Exception):
    """A failure with one clear sentence and, where there is one, the next command to type.

    `message` says what was wrong with its value, what was required, and where.
    `hint` is what to do about it. The class decides the process's exit code. `details` are further fields of the
    failure document that `--json` prints, JSON values by name.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    @property
    def type_name(self) -> str:
        """Stable name of the failure in JSON output, e.g. `BadInput`: the class of this module that it belongs to."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)


class UsageError(EdgetoolError):
    """Something the command cannot do without was given neither as an option nor in the environment or a file."""

    exit_code = 2


class ConfigError(EdgetoolError):
    """An option, environment variable or configuration file holds a value that cannot be used."""

    exit_code = 3


class BadInput(EdgetoolError):
    """A checkpoint, image or data file is damaged or unsuitable, or the job was refused before it started."""

    exit_code = 4


class MissingDependency(EdgetoolError):
    """A package that this command needs is not installed, or is of an unsupported version."""

    exit_code = 5


class ResourceUnavailable(EdgetoolError):
    """No GPU, port, board, memory or disk to be had (in time)."""

    exit_code = 6


class BackendFailed(EdgetoolError):
    """A child process of a third-party tool failed; the message carries its log path and last lines."""

    exit_code = 7


class VerificationFailed(EdgetoolError):
    """What was written is not what was meant: a mismatch, a checksum, an accuracy gate."""

    exit_code = 8


class Stopped(EdgetoolError):
    """Stopped on request with everything finished so far kept; the hint is the command that goes on."""

    exit_code = 75


class ReaderGone(EdgetoolError):
    """Whoever read stdout reads no more (`| head -1`): nothing to say, and nobody to say it to."""

    exit_code = 141


class Terminated(BaseException):
    """SIGTERM arrived and no job was there to turn it into an orderly stop."""

    exit_code: ClassVar[int] = 143


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a bug in edgetool: a traceback is shown",
    2: "usage: an option or argument that does not exist or does not parse",
    3: "configuration: a value that cannot be used",
    4: "bad input (checkpoint, image, data file), or refused before starting",
    5: "a dependency is missing or of an unsupported version",
    6: "no GPU / port / board / memory / disk to be had in time",
    7: "a backend process failed",
    8: "verification failed (mismatch, checksum, accuracy gate)",
    75: "stopped on request; run again with --resume",
    130: "interrupted (SIGINT)",
    141: "whoever read stdout went away before the end, as in `| head -1` (what SIGPIPE gives)",
    143: "terminated (SIGTERM)",
}
"""Exit code -> meaning. docs/exit-codes.md is generated from this table."""
