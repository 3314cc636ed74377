"""What the steps of one run have in common, and each of them with everything decided."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool import config
from edgetool.config import Config
from edgetool.errors import ConfigError
from edgetool.pipeline.command_line import arguments, inserted, path_text
from edgetool.pipeline.recipe import MODEL, Recipe, Step
from edgetool.pipeline.record import RunRecord
from edgetool.progress import Progress, Steps

WAITING, RUNNING, UNCHANGED, DONE, FAILED, STOPPED = "waiting", "running", "unchanged", "done", "failed", "stopped"


@dataclass(frozen=True)
class StepResult:
    """What became of one step. command: to repeat it. result: its document. output: None where it serves."""

    name: str
    command: tuple[str, ...]
    state: str
    seconds: float | None = None
    exit_code: int | None = None
    output: str | None = None
    result: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "command": list(self.command), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepResult:
        """What `to_dict` has made."""
        return cls(**{**values, "command": tuple(values["command"]), "warnings": tuple(values["warnings"])})


@dataclass(frozen=True)
class Attempt:
    """One rung of the ladder: what it changed, and the gate's word on it (None: no gate was asked)."""

    rung: int
    changes: Mapping[str, Any]
    passed: bool
    reason: str | None


@dataclass
class Work:
    """One run. config_file: what --config names, for the steps too."""

    recipe: Recipe
    model: str
    config_file: Path | None
    settings: Config
    record: RunRecord
    view: Steps
    progress: Progress
    stop: threading.Event
    results: dict[str, StepResult] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.record.directory

    def output_of(self, step: Step) -> Path:
        """Where a step writes."""
        return self.directory / step.name

    def log_of(self, step: Step) -> Path:
        """What a step says on its stderr."""
        return self.directory / "logs" / f"{step.name}.log"

    def source_of(self, name: str) -> str:
        """What a reference stands for: the run's model, or the output of a step."""
        return self.model if name == MODEL else path_text(self.directory / name)

    def stays(self, step: Step) -> bool:
        """Whether this is the server that --serve leaves running."""
        return self.settings.run.serve and step.name == self.recipe.steps[-1].name

    def settle(self, result: StepResult) -> None:
        """Note and show what became of a step."""
        self.results[result.name] = result
        self.view.state(result.name, result.state)


@dataclass(frozen=True)
class Planned:
    """A step with everything decided. words: what to type after `edgetool`."""

    step: Step
    words: tuple[str, ...]
    config: Config

    @property
    def shown(self) -> tuple[str, ...]:
        """The whole command line, as a user would repeat it."""
        return ("edgetool", *self.words)


def planned(work: Work, step: Step) -> Planned:
    """Resolve a step's settings and its command line.

    Raises:
        ConfigError: a value that cannot be used; recipe and step are named.
    """
    where = f"[steps.{step.name}] of {work.recipe.name}"
    values = {
        key: work.source_of(step.references[key]) if key in step.references else value
        for key, value in step.settings.items()
    }
    if not step.command.serves:
        values["output"] = path_text(work.output_of(step))
    elif not work.stays(step):
        values.setdefault("port", 0)
    resolved = config.load(step.command.section, values, work.config_file, origin=where)
    _refuse_modes(step, resolved)
    words = arguments(step.command, values, where)
    if work.config_file is not None:
        words = inserted(words, ["--config", str(work.config_file)])
    return Planned(step, tuple(words), resolved)


def _refuse_modes(step: Step, resolved: Config) -> None:
    """A variable or a file that makes the command do something else, such as a dry run, would pass for the step."""
    section = getattr(resolved, step.command.section)
    for name, field_info in type(section).model_fields.items():
        key = config.key_of(name, field_info)
        origin = resolved.origins.get(f"{step.command.section}.{key}")
        if origin and key in step.command.modes and getattr(section, name) != field_info.default:
            raise ConfigError(f"{key!r} in {origin} is set by the run itself", "leave it out")
