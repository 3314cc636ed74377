"""`python -m edgetool` and the `edgetool` console script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    _open_standard_streams()
    if sys.argv[1:2] == ["_complete"]:
        from edgetool.cli import complete

        complete(sys.argv[2:])
        return
    from edgetool.cli import app

    app()


def _open_standard_streams() -> None:
    """Where a shell has closed one (`>&-`), the null device: else the next file to be opened would take its place."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
