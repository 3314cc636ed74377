"""`python -m edgetool` and the `edgetool` console script."""

from __future__ import annotations


def main() -> None:
    from edgetool.cli import app

    app()


if __name__ == "__main__":
    main()
