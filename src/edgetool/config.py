"""The configuration of every command: one pydantic model, merged from options, environment, file and defaults.

Only here are `EDGETOOL_...` variables and `--config` files read (by config_sources.py), and defaults are written down
nowhere but in the sections, of which config_models.py and the other config_*.py hold those of the commands.
Precedence, key by key: option > environment > file > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError

from edgetool.config_board import ChatConfig, FpgaHostConfig, ServeFpgaConfig
from edgetool.config_evaluation import EvalConfig
from edgetool.config_models import (
    CONVERT_TARGETS,
    CompileConfig,
    ConvertConfig,
    DemoConfig,
    InspectConfig,
    QuantizeConfig,
)
from edgetool.config_pipeline import JobsConfig, RunConfig
from edgetool.config_services import (
    BenchConfig,
    EnvironmentName,
    EnvsConfig,
    GpusConfig,
    SchedulerConfig,
    ServeGpuConfig,
)
from edgetool.config_sources import COMMAND_LINE, Settings, gather, read_config_file
from edgetool.config_values import HomeDirectory, HomePath, Section, key_of, must_of, option_of, setting
from edgetool.errors import ConfigError, UsageError

__all__ = [
    "CONVERT_TARGETS",
    "SECTIONS",
    "BenchConfig",
    "ChatConfig",
    "CommonConfig",
    "CompileConfig",
    "Config",
    "ConvertConfig",
    "DemoConfig",
    "EnvironmentName",
    "EnvsConfig",
    "EvalConfig",
    "FpgaHostConfig",
    "GpusConfig",
    "InspectConfig",
    "JobsConfig",
    "QuantizeConfig",
    "RunConfig",
    "SchedulerConfig",
    "Section",
    "ServeFpgaConfig",
    "ServeGpuConfig",
    "key_of",
    "keys",
    "load",
    "must_of",
    "option_of",
]


class CommonConfig(Section):
    """Settings that every command knows."""

    cache_dir: HomeDirectory = setting(
        Path("~/.cache/edgetool"),
        "where downloads and dequantised models are kept ($XDG_CACHE_HOME/edgetool when that is set)",
        "a directory",
    )
    progress: Literal["auto", "bar", "plain", "json", "quiet"] = setting(
        "auto",
        "how progress is shown on stderr; auto = bars on a terminal, plain lines elsewhere",
        "auto, bar, plain, json or quiet",
    )
    lang: Literal["auto", "en", "zh_CN"] = setting(
        "auto",
        "language of help, tables, progress and errors; auto = that of LC_ALL, LC_MESSAGES or LANG (JSON, logs and "
        "records are always English)",
        "en, zh_CN or auto",
    )
    json_output: bool = setting(
        False, "print exactly one JSON document on stdout", "true or false", option="--json", key="json"
    )
    offline: bool = setting(False, "use no network: only what is in the cache or on the disk", "true or false")
    hub_token: SecretStr | None = setting(
        None, "access token for hf: and ms: models (never an option: options are seen in `ps`)", "a token", option=""
    )

    lock_dir: HomeDirectory | None = setting(
        None,
        "directory of the leases, shared by all users of the machine (default: /run/lock/edgetool, or a directory of "
        "your own where that cannot be made)",
        "a directory",
        option="",
    )
    nvml_fixture: HomePath | None = setting(
        None, "a recorded inventory of GPUs to use in place of this machine's (docs/gpus.md)", "a .json file", option=""
    )

    api_key: SecretStr | None = setting(
        None,
        "key of the server that is started or asked (serve-gpu, serve-fpga, bench, eval, chat); --api-key gives it "
        "too, but everybody on the machine can read options in `ps`",
        "a key",
        option="",
    )

    def server_key(self) -> str | None:
        """The key of servers in clear; None when none was given."""
        return None if self.api_key is None else self.api_key.get_secret_value()

    def token(self) -> str | None:
        """The hub token in clear, for the call that needs it and nothing else; None when there is none."""
        return self.hub_token.get_secret_value() if self.hub_token else None


class Config(Section):
    """Everything edgetool can be told, a section for each command, and where each value came from."""

    common: CommonConfig = Field(default_factory=CommonConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    convert: ConvertConfig = Field(default_factory=ConvertConfig)
    inspect: InspectConfig = Field(default_factory=InspectConfig)
    envs: EnvsConfig = Field(default_factory=EnvsConfig)
    demo: DemoConfig = Field(default_factory=DemoConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    compile_vcu128: CompileConfig = Field(default_factory=CompileConfig)
    gpus: GpusConfig = Field(default_factory=GpusConfig)
    serve_gpu: ServeGpuConfig = Field(default_factory=ServeGpuConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    serve_fpga: ServeFpgaConfig = Field(default_factory=ServeFpgaConfig)
    fpga_host: FpgaHostConfig = Field(default_factory=FpgaHostConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    jobs: JobsConfig = Field(default_factory=JobsConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    origins: dict[str, str] = Field(default_factory=dict, exclude=True)
    """Dotted key -> origin in words, for each value that is not the default."""


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def keys() -> dict[str, list[str]]:
    """Section -> its keys as files and variables spell them."""
    return {name: [key_of(*item) for item in section.model_fields.items()] for name, section in SECTIONS.items()}


def load(
    command: str,
    cli_values: Mapping[str, Any],
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    complete: bool = True,
    origin: str = COMMAND_LINE,
    typed: str | None = None,
) -> Config:
    """Merge and check the configuration of one command.

    Args:
        command: the section of the command, e.g. `quantize` (a section `common` applies to every command).
        cli_values: key -> value as parsed from options; None means not given. Keys of the command's section and of
            `common` are mixed, as on the command line.
        config_file: TOML or YAML file with a table per section.
        environ: environment to read (`os.environ` when None).
        complete: refuse when a required key is missing (False for `--show-config`).
        origin: where `cli_values` come from, in words.
        typed: the command as it was typed (`edgetool jobs clean`), whose help has the options of the command line.

    Raises:
        ConfigError: a file that cannot be read, an unknown key (the nearest is named), or a value that cannot be used.
        UsageError: a required key was given nowhere.
    """
    environ = os.environ if environ is None else environ
    known = keys()
    from_file = read_config_file(config_file, known) if config_file else {}
    settings = gather(command, cli_values, environ, from_file, str(config_file), known, origin)
    sections = {name: _checked(name, section, settings, typed) for name, section in SECTIONS.items()}
    config = Config.model_construct(None, **sections, origins=settings.origins)
    wanted = SECTIONS[command].required if command in SECTIONS else {}
    for key, spelling in wanted.items():
        if complete and f"{command}.{key}" not in settings.origins:
            name = command.replace("_", "-")
            raise UsageError(f"{name} needs {spelling}", f"edgetool {name} --help")
    return config


def _checked(name: str, section: type[Section], settings: Settings, typed: str | None) -> Section:
    values = settings.values.get(name)
    if not values:
        # the same as validating nothing, and saves building the validators of sections that nobody uses
        return section.model_construct()
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _config_error(name, section, str(first["loc"][0]), settings, typed) from None


def _config_error(name: str, section: type[Section], key: str, settings: Settings, typed: str | None) -> ConfigError:
    field_name, field = next((n, f) for n, f in section.model_fields.items() if key in (n, f.alias))
    secret = "Secret" in str(field.annotation)
    value = "(hidden)" if secret else repr(settings.values[name][key])
    origin = settings.origins.get(f"{name}.{key}", "a default")
    spelling = option_of(field_name, field)
    given = spelling if origin == COMMAND_LINE else origin
    command = typed if typed and origin == COMMAND_LINE else f"edgetool {name.replace('_', '-')}"
    return ConfigError(
        f"{key} {value} (given by {given}) cannot be used: must be {must_of(field)}",
        f"{command} --help" if name != "common" else "see docs/config.md",
    )
