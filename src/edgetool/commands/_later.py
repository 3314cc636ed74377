"""Commands that are planned and not built: they answer in one sentence, with exit code 5."""

from __future__ import annotations

from typing import NoReturn

from edgetool.errors import NotBuiltYet

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of such a command: no argument is wrong while nothing reads them."""


def not_built(command: str) -> NoReturn:
    """Raise NotBuiltYet for `command`."""
    from edgetool import __version__

    raise NotBuiltYet(
        f"edgetool {command} is not built yet (this is version {__version__})",
        "CHANGELOG.md says what each version contains",
    )
