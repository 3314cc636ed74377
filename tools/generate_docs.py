"""Write docs/cli.md, docs/config.md and docs/exit-codes.md from the code; `--check` only compares (exit 1 when stale).

They are built from the parsed options and the configuration model, not from help screens, so that they do not depend
on a terminal's width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from edgetool.cli import app
from edgetool.config import SECTIONS, key_of, must_of, option_of
from edgetool.config_sources import variable_name
from edgetool.errors import EXIT_CODES

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- written by tools/generate_docs.py (`make docs`): edit the code, not this file -->\n"

CLI_INTRODUCTION = """
Results go to stdout, everything else to stderr. Values that are not given are taken from the environment, then from
the file named by `--config`, then from the defaults ([config.md](config.md)). What a command returns to the shell is in
[exit-codes.md](exit-codes.md).
"""
CONFIG_INTRODUCTION = """# Configuration

Each setting is looked for on the command line, then in the environment, then in the file of `--config` (TOML or YAML,
one table per command; examples in [examples/](../examples)), and last here. An unknown key is an error.
`--show-config` prints what holds, and where each value came from. Relative paths start at the working directory;
sizes may be written `5GB` or `512MiB`. `HF_HUB_OFFLINE=1` is taken as `offline = true`.
"""


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def cli_page() -> str:
    """docs/cli.md: every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [NOTE, f"# Command line\n\n{group.help}\n"]
    parts.append(CLI_INTRODUCTION)
    for name, command in _commands(group, ""):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(f"[{p.metavar or p.human_readable_name}]" for p in arguments)
        parts.append(f"\n## edgetool {name}\n\n{' '.join((command.help or '').split())}\n")
        parts.append(f"\n```\nedgetool {name} {usage + ' ' if usage else ''}[OPTIONS]\n```\n\n")
        parts.append(table(["option", "meaning"], [_option_row(p) for p in command.params if _has_text(p)]))
    return "".join(parts)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Each command with its full name; those of a group follow the group itself."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        yield from _commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else ()


def _has_text(parameter: Any) -> bool:
    return bool(getattr(parameter, "help", None))


def _option_row(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [f"`{parameter.metavar or parameter.human_readable_name}`", parameter.help]
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    metavar = "" if parameter.is_flag else f" `{parameter.metavar}`"
    return [names + metavar, parameter.help]


def config_page() -> str:
    """docs/config.md: every key with its variable, option, allowed values and default."""
    parts = [NOTE, CONFIG_INTRODUCTION]
    for name, section in SECTIONS.items():
        rows = []
        for field_name, field in section.model_fields.items():
            key = key_of(field_name, field)
            option = option_of(field_name, field)
            rows.append(
                [
                    f"`{key}`",
                    f"`{option}`" if option else "",
                    f"`{variable_name(name, key)}`",
                    field.description or "",
                    must_of(field),
                    _default(section, field_name, field),
                ]
            )
        parts.append(f"\n## [{name}]\n\n{(section.__doc__ or '').strip()}\n\n")
        parts.append(table(["key", "option", "variable", "meaning", "must be", "default"], rows))
    return "".join(parts)


def _default(section: Any, name: str, field: Any) -> str:
    if name in section.required:
        return "required"
    if field.default_factory is not None:
        return "see meaning"
    if field.default is None:
        return ""
    if isinstance(field.default, tuple):
        return f"`{','.join(map(str, field.default))}`" if field.default else ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def exit_codes_page() -> str:
    """docs/exit-codes.md: what edgetool returns to the shell."""
    rows = [[str(code), meaning] for code, meaning in EXIT_CODES.items()]
    return (
        f"{NOTE}# Exit codes\n\n"
        + table(["code", "meaning"], rows)
        + "\nWith `--json` a failure is also one document on stdout: `schema`, `ok` (false), `type`, `message`, `hint` "
        "and `exit_code`.\n"
    )


PAGES = {"cli.md": cli_page, "config.md": config_page, "exit-codes.md": exit_codes_page}


def main() -> int:
    """Write the pages, or with `--check` name those that are stale."""
    stale = []
    for name, page in PAGES.items():
        path = DOCS / name
        text = page()
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(f"docs/{name}")
    if stale:
        print(f"stale: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
