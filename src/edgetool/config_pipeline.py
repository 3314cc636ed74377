"""Settings of the commands that run others and look after them: run and jobs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from edgetool.config_values import Count, Duration, HomeDirectory, ModelName, Section, Suggest, only_numbers, setting
from edgetool.errors import ConfigError

_LARGEST = 2**63
"""SQLite holds no number of so much."""

JobNumber = Annotated[int, BeforeValidator(only_numbers), Field(ge=1, lt=_LARGEST), Suggest(source="jobs")]
_RECIPE = Suggest(source="models", paths="files", suffixes=("toml", "gguf"))


def _listed(value: object) -> object:
    """In a variable, several are written as arguments in a shell."""
    return shlex.split(value) if isinstance(value, str) else value


class RunConfig(Section):
    """Settings of `edgetool run`."""

    target: Annotated[str, _RECIPE] = setting(
        "", "recipe, or with --preset a model", "a .toml file or a model", option="RECIPE|MODEL"
    )
    preset: Literal["vcu128", "gpu", "smoke"] | None = setting(
        None, "recipe of edgetool's own to run MODEL through", "vcu128, gpu or smoke"
    )
    model: ModelName | None = setting(None, "model to start from, in place of the recipe's", "a model")
    output: HomeDirectory | None = setting(
        None, "directory with a directory for each step, in place of the recipe's; run again, it goes on", "a directory"
    )
    changes: Annotated[tuple[str, ...], BeforeValidator(_listed)] = setting(
        (),
        "settings of steps in place of the recipe's; in a variable with spaces between them",
        "settings such as quantize.group_size=64",
        option="--set",
        key="set",
    )
    serve: bool = setting(False, "leave what the last step serves running, until it is stopped", "true or false")
    verify: bool = setting(
        False, "read outputs back and compare hashes before they count as unchanged", "true or false"
    )
    show_recipe: bool = setting(False, "print the recipe and stop", "true or false")
    dry_run: bool = setting(False, "show the plan of all steps and write nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.show_recipe and self.changes:
            raise ConfigError(
                "--show-recipe prints a recipe as it is written, without --set", "leave --set out, and edit the recipe"
            )
        return self


class JobsConfig(Section):
    """Settings of `edgetool jobs`, and where every long command records itself."""

    directory: HomeDirectory = setting(
        Path("~/.local/state/edgetool/jobs"),
        "where jobs are recorded and their logs kept ($XDG_STATE_HOME/edgetool/jobs when that is set)",
        "a directory",
        option="",
    )
    record: bool = setting(True, "whether long commands record themselves", "true or false", option="")
    keep_s: Duration = setting(
        30 * 86_400.0,
        "how long ended jobs are remembered, unless `jobs clean` comes first",
        "a time such as 30d",
        option="",
    )
    limit: Annotated[Count, Field(lt=_LARGEST)] = setting(
        20, "jobs to list, the latest first", "a number of at least 1"
    )
    number: JobNumber | None = setting(None, "job to show or to end", "a number from `edgetool jobs`", option="ID")
    follow: bool = setting(False, "go on until the job has ended", "true or false")
    grace_s: Duration = setting(
        30.0, "time that a job gets to end by itself", "a time such as 30 or 1m", option="--grace"
    )
    keep: bool = setting(False, "keep the unfinished output that --resume can go on with", "true or false")
    older_than_s: Duration = setting(
        0.0, "forget only jobs that ended so long ago", "a time such as 7d", option="--older-than"
    )
