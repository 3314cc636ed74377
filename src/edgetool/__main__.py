"""`python -m edgetool` and the `edgetool` console script."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["_complete"]:
        from edgetool.cli import complete

        complete(sys.argv[2:])
        return
    from edgetool.cli import app

    app()


if __name__ == "__main__":
    main()
