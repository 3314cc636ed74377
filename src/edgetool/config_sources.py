"""Where configuration values come from: options, environment variables, and a TOML or YAML file.

Only names are judged here; values are checked by the models in config.py, whose helper this module is.
"""

from __future__ import annotations

import difflib
import os
import pwd
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgetool.errors import ConfigError

PREFIX = "EDGETOOL_"
COMMAND_LINE = "the command line"

_YES = {"1", "true", "yes", "on", "y", "t"}
# The first is where `eval` and the tests find data; edgetool sets the others for the processes that it starts
# (the scheduler and process packages).
_FOREIGN = {"EDGETOOL_DATA_DIR", "EDGETOOL_LEASE", "EDGETOOL_LEASE_FDS", "EDGETOOL_PORTS", "EDGETOOL_TREE"}

Keys = Mapping[str, Sequence[str]]


@dataclass
class Settings:
    """Values by section and key, and for each dotted key the source that it came from, in words."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def put(self, section: str, key: str, value: Any, origin: str) -> None:
        """Set one value, replacing what a weaker source said."""
        self.values.setdefault(section, {})[key] = value
        self.origins[f"{section}.{key}"] = origin


def gather(
    command: str,
    cli_values: Mapping[str, Any],
    environ: Mapping[str, str],
    from_file: Mapping[str, Mapping[str, Any]],
    file_name: str,
    keys: Keys,
    origin: str = COMMAND_LINE,
) -> Settings:
    """Lay the sources over one another, weakest first; `origin` says where `cli_values` come from."""
    settings = Settings()
    settings.values["common"] = {"cache_dir": own_directory("cache", environ)}
    settings.values["envs"] = {"directory": own_directory("data", environ) / "envs"}
    settings.values["serve_gpu"] = {"state_dir": own_directory("state", environ) / "servers"}
    settings.values["serve_fpga"] = {"state_dir": own_directory("state", environ) / "boards"}
    settings.values["jobs"] = {"directory": own_directory("state", environ) / "jobs"}
    for section, table in from_file.items():
        for key, value in table.items():
            if value is not None:
                settings.put(section, key, value, f"{file_name}, [{section}]")
    # The hub libraries' own switch is honoured, so that one variable keeps a whole machine off the network.
    if environ.get("HF_HUB_OFFLINE", "").strip().lower() in _YES:
        settings.put("common", "offline", True, "environment variable HF_HUB_OFFLINE")
    if environ.get("EDGETOOL_DATA_DIR"):
        settings.put("eval", "data_dir", environ["EDGETOOL_DATA_DIR"], "environment variable EDGETOOL_DATA_DIR")
    for section, key, variable in _variables(environ, keys):
        settings.put(section, key, environ[variable], f"environment variable {variable}")
    for key, value in cli_values.items():
        if value is None:
            continue
        section = command if key in keys.get(command, ()) else "common"
        settings.put(section, key, value, origin)
    return settings


def own_directory(kind: Literal["cache", "data", "state"], environ: Mapping[str, str]) -> Path:
    """Where this user's files of a kind belong (XDG Base Directory Specification 0.8), as far as `edgetool`."""
    below_home = {"cache": ".cache", "data": ".local/share", "state": ".local/state"}
    given = environ.get(f"XDG_{kind.upper()}_HOME", "")
    if given.startswith("/"):  # the specification: what is not absolute does not count
        return Path(given) / "edgetool"
    return Path(environ.get("HOME") or _home_of_user()) / below_home[kind] / "edgetool"


def _home_of_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise ConfigError(f"user {os.getuid()} has no home directory, and HOME is not set", "set HOME") from None


def variable_name(section: str, key: str) -> str:
    """The environment variable of a key, e.g. `EDGETOOL_QUANTIZE_BITS`, `EDGETOOL_CACHE_DIR`."""
    middle = "" if section == "common" else f"{section}_"
    return f"{PREFIX}{middle}{key}".upper()


def json_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for JSON: for failures that happen before the configuration is known."""
    return environ.get(variable_name("common", "json"), "").strip().lower() in _YES


def _variables(environ: Mapping[str, str], keys: Keys) -> list[tuple[str, str, str]]:
    known = {variable_name(section, key): (section, key) for section, names in keys.items() for key in names}
    sections = tuple(f"{PREFIX}{section}_".upper() for section in keys if section != "common")
    found = []
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in _FOREIGN:
            continue
        if variable in known:
            if value != "":  # an empty variable is the shell's way to say "not given"
                found.append((*known[variable], variable))
            continue
        # Other tools of the house may use the prefix: outside the sections only a near miss is taken for a slip.
        nearest = difflib.get_close_matches(variable, known, n=1, cutoff=0.6 if variable.startswith(sections) else 0.9)
        if nearest or variable.startswith(sections):
            hint = f"did you mean {nearest[0]}?" if nearest else "see docs/config.md"
            raise ConfigError(f"unknown environment variable {variable}", hint)
    return found


def read_config_file(path: Path, keys: Keys) -> dict[str, dict[str, Any]]:
    """Read a TOML or YAML file of one table per section.

    Raises:
        ConfigError: the file cannot be read or parsed, or holds a section or key that does not exist.
    """
    document = _parse(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a table per command, e.g. [quantize]", "see docs/config.md")
    for section, table in document.items():
        if section not in keys:
            raise ConfigError(f"unknown key {section!r} in {path}", _nearest(str(section), keys))
        if table is not None and not isinstance(table, dict):
            raise ConfigError(f"{section!r} in {path} must be a table, and is {table!r}", "see docs/config.md")
        for key in table or {}:
            if key not in keys[section]:
                names = list(keys[section])
                elsewhere = any(key in others for others in keys.values())
                close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
                hint = _nearest(str(key), keys) if elsewhere or not close else f"did you mean {close[0]!r}?"
                raise ConfigError(f"unknown key {key!r} in [{section}] of {path}", hint)
    return {section: dict(table or {}) for section, table in document.items()}


def _nearest(name: str, keys: Keys) -> str:
    for section, names in keys.items():
        if name in names:
            return f"{name!r} belongs into the section [{section}]"
    everything = [*keys, *(key for names in keys.values() for key in names)]
    close = difflib.get_close_matches(name, everything, n=1, cutoff=0.0)[0]
    home = next((section for section, names in keys.items() if close in names), None)
    return f"did you mean {close!r}" + ("?" if home is None else f" in the section [{home}]?")


def _parse(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in {".toml", ".yaml", ".yml"}:
        raise ConfigError(f"{path} is not a configuration file: its name must end in .toml, .yaml or .yml")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
