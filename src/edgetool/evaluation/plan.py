"""What is going to be measured: tasks with their questions, the two sides, the profile; all refusals come from here."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.sources import ResolvedSource, resolve_configured
from edgetool.config import Config, EvalConfig
from edgetool.errors import BadInput, ConfigError, UsageError
from edgetool.evaluation import served
from edgetool.evaluation.code_tasks import open_code_sandbox
from edgetool.evaluation.endpoint import connect
from edgetool.evaluation.gate import Gate, parse_gate
from edgetool.evaluation.identity import identity_of
from edgetool.evaluation.profile import Profile
from edgetool.evaluation.questions import Questions, find_questions, load_stock
from edgetool.evaluation.sandbox import Sandbox
from edgetool.evaluation.targets import Asking, InProcess, Remote, Target, need_template
from edgetool.evaluation.tasks import EvalTask, find_tasks
from edgetool.progress import Progress
from edgetool.runs import need_packages
from edgetool.serving.secrets import given_key

if TYPE_CHECKING:
    import torch

    from edgetool.evaluation.stock_tasks import StockTask

ORIGINAL, QUANTIZED = "original", "quantized"
CACHE = "eval"
"""Directory in edgetool's cache for answers, hashes and data."""


@dataclass(frozen=True)
class Side:
    """One of the two that are measured. name: original or quantized. source: where its checkpoint came from."""

    name: str
    target: Target
    source: ResolvedSource | None = None
    kept: bool = True
    """Whether its answers outlive the run: a checkpoint stays what it is, somebody's server need not."""


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before the first question."""

    tasks: tuple[EvalTask, ...]
    sides: tuple[Side, ...]
    questions: Questions
    stock: dict[str, StockTask]
    profile: Profile
    gate: Gate | None
    sandbox: Sandbox | None
    """Where generated code runs; None where no task has any."""

    def side(self, name: str) -> Side | None:
        """The side of this name, None where it is not measured."""
        return next((side for side in self.sides if side.name == name), None)


def check_usage(settings: EvalConfig) -> tuple[tuple[EvalTask, ...], Gate | None]:
    """The tasks and the gate; reads nothing.

    Raises ConfigError or UsageError for what cannot mean anything, MissingDependency for a package that is wanted.
    """
    if settings.model is None and settings.endpoint is None:
        raise UsageError("eval needs MODEL, or --endpoint URL", "edgetool eval --help")
    if not settings.tasks:
        raise UsageError("eval needs --tasks", "for instance --tasks arc_easy,perplexity")
    if settings.output is None and not settings.dry_run:
        raise UsageError("eval needs --output", "edgetool eval --help")
    tasks = find_tasks(settings.tasks)
    gate = None if settings.gate is None else parse_gate(settings.gate)
    if gate is not None:
        if settings.against is None:
            raise ConfigError(f"gate {gate.expression!r} compares with the original", "add --against ORIGINAL")
        gate.check([task.name for task in tasks])
        gate.check_windows(settings.limit)
    scoring = [task.name for task in tasks if task.kind in ("loglikelihood", "perplexity")]
    if scoring and settings.chat_template and settings.endpoint is not None and settings.model is None:
        raise ConfigError(
            f"{scoring[0]} scores given answers, which no server does within a chat template of its own",
            "give MODEL, whose tokenizer has the template, or leave --chat-template out",
        )
    _need_packages(tasks)
    return tasks, gate


def make_plan(config: Config, stopped: Callable[[], bool], progress: Progress) -> Plan:
    """Find and check everything. Raises any EdgetoolError; nothing is measured, loaded or served yet."""
    settings = config.eval
    tasks, gate = check_usage(settings)
    questions = find_questions(config, tasks)
    sandbox = open_code_sandbox(unsafe=settings.unsafe_exec) if questions.code else None
    sides = _sides(config, tasks, stopped, progress)
    stock = load_stock(config, questions, progress)
    profile = Profile(_profile(settings, tasks, questions, stock, sides))
    return Plan(tasks, sides, questions, stock, profile, gate, sandbox)


def _need_packages(tasks: tuple[EvalTask, ...]) -> None:
    by_framework = {"lm-eval": ("lm_eval",), "evalplus": ("evalplus",), "edgetool": ()}
    own = {"rouge": ("rouge_score", "jieba")}
    names = ["torch", "transformers", "lm_eval"]  # lm-eval has the models that all tasks ask
    names += [name for task in tasks for name in (*by_framework[task.framework], *own.get(task.kind, ()))]
    need_packages("eval", "eval", *names)


def _sides(
    config: Config, tasks: tuple[EvalTask, ...], stopped: Callable[[], bool], progress: Progress
) -> tuple[Side, ...]:
    settings = config.eval
    sides = []
    if settings.against is not None:
        make = _served if settings.via else _in_process
        sides.append(make(ORIGINAL, settings.against, config, tasks, stopped, progress))
    if settings.endpoint is not None:
        sides.append(_endpoint(config, tasks, stopped, progress))
    else:
        assert settings.model is not None
        make = _served if settings.via else _in_process
        sides.append(make(QUANTIZED, settings.model, config, tasks, stopped, progress))
    if settings.chat_template:
        _same_template(sides)
    return tuple(sides)


def opened(spec: str, config: Config, progress: Progress) -> tuple[ResolvedSource, Checkpoint]:
    """A model that was named, found and opened; --revision is MODEL's."""
    revision = config.eval.revision if spec == config.eval.model else None
    source = resolve_configured(spec, config.common, revision, progress)
    return source, Checkpoint.open(source.path)


def _asking(settings: EvalConfig) -> Asking:
    return Asking(
        settings.batch_size, settings.max_length, settings.concurrency, settings.timeout_s, settings.chat_template
    )


def dtype_on(device: torch.device, settings: EvalConfig) -> torch.dtype:
    """In what a checkpoint is computed on `device`."""
    import torch

    from edgetool.models.devices import fast_dtype

    return fast_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)


def _in_process(name: str, spec: str, config: Config, _: Any, stopped: Callable[[], bool], progress: Progress) -> Side:
    from edgetool.models.devices import resolve_device

    settings = config.eval
    source, checkpoint = opened(spec, config, progress)
    device = resolve_device(settings.device)
    dtype = dtype_on(device, settings)
    content = identity_of(checkpoint, config.common.cache_dir / CACHE, progress)
    target = InProcess(_title(spec, config.eval), checkpoint, content, _asking(settings), device, dtype, progress)
    return Side(name, target, source)


def _served(
    name: str, spec: str, config: Config, tasks: tuple[EvalTask, ...], stopped: Callable[[], bool], progress: Progress
) -> Side:
    settings = config.eval
    source, checkpoint = opened(spec, config, progress)
    length = served.length_tokens(checkpoint, settings.max_length)
    server = served.settings_for(config, spec, length)
    engine = server.serve_gpu
    if engine.engine != "vllm" and _scoring(tasks):
        raise BadInput(
            f"the engine {engine.engine} of serve-gpu gives no log-probabilities of a prompt, and {_scoring(tasks)[0]} "
            "needs them",
            "use vLLM, or measure in-process: leave --via out",
        )
    identity = {
        "checkpoint": identity_of(checkpoint, config.common.cache_dir / CACHE, progress),
        "via": "serve-gpu",
        "engine": engine.engine,
        "dtype": engine.dtype,
        "device": engine.device,
        "kv_cache_dtype": engine.kv_cache_dtype,
    }
    asking = _asking(settings.model_copy(update={"max_length": length}))
    target = Remote(
        _title(spec, config.eval), served.starter(server, progress), identity, checkpoint, asking, stopped,
        scores=bool(_scoring(tasks)),
    )  # fmt: skip
    return Side(name, target, source)


def _endpoint(config: Config, tasks: tuple[EvalTask, ...], stopped: Callable[[], bool], progress: Progress) -> Side:
    settings = config.eval
    assert settings.endpoint is not None
    source, tokenizer = (None, None) if settings.model is None else opened(settings.model, config, progress)
    endpoint = connect(settings.endpoint, given_key(config, progress), settings.endpoint_model)
    identity = {"endpoint": endpoint.url, "model": endpoint.model}

    def start(_: contextlib.ExitStack) -> Any:
        return endpoint

    scoring = _scoring(tasks)
    target = Remote(endpoint.model, start, identity, tokenizer, _asking(settings), stopped, scores=bool(scoring))
    target.client()  # a server that cannot do it is refused before another hour is spent on the original
    return Side(QUANTIZED, target, source, kept=False)


def _scoring(tasks: tuple[EvalTask, ...]) -> list[str]:
    return [task.name for task in tasks if task.kind in ("loglikelihood", "perplexity")]


def _title(spec: str, settings: EvalConfig) -> str:
    """A short name; where both sides have the same, with the directory above it."""
    short, other = (_last(one, 1) for one in (spec, settings.model if spec == settings.against else settings.against))
    return _last(spec, 2) if short == other else short


def _last(spec: str | None, parts: int) -> str:
    words = (spec or "").rstrip("/").split("/")
    return "/".join(words[-parts:])


def _same_template(sides: list[Side]) -> None:
    found = {side.name: _template(side.target) for side in sides}
    if len(set(found.values()) - {None}) > 1:
        raise BadInput(
            "the two models have different chat templates, so they would not be asked the same questions",
            "give the quantised model the original's chat_template.jinja, or leave --chat-template out",
        )


def _template(target: Target) -> str | None:
    from edgetool.models.streamed import load_tokenizer

    checkpoint = target.checkpoint if isinstance(target, InProcess) else getattr(target, "tokenizer", None)
    if checkpoint is None:
        return None
    need_template(checkpoint)
    return str(load_tokenizer(checkpoint).chat_template)


def _profile(
    settings: EvalConfig,
    tasks: tuple[EvalTask, ...],
    questions: Questions,
    stock: dict[str, StockTask],
    sides: tuple[Side, ...],
) -> dict[str, Any]:
    template = (
        next((found for side in sides if (found := _template(side.target))), None) if settings.chat_template else None
    )
    return {
        "tasks": {task.name: questions.facts(task, settings, stock) for task in tasks},
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else settings.chat_template,
        "system_prompt": settings.system_prompt,
        "seed": settings.seed,
        "dtype": next((side.target.identity["dtype"] for side in sides if "dtype" in side.target.identity), None),
        "max_length": settings.max_length,
    }


def target_id(target: Target) -> str:
    """SHA-256 (64 hex digits) of a target's identity and of the versions that compute: equal, equal answers."""
    from edgetool.runs import tool_versions

    versions = {name: value for name, value in tool_versions("torch", "transformers").items() if name != "edgetool"}
    text = json.dumps([target.identity, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
