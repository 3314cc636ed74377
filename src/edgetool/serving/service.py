"""`edgetool serve-gpu`: from its settings to servers that answer, and on until they are stopped or fail."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetool.backends import environments
from edgetool.checkpoints.sources import resolve_configured
from edgetool.config import Config
from edgetool.errors import BackendFailed, ConfigError, MissingDependency, ResourceUnavailable
from edgetool.process.child import Restarts, describe
from edgetool.progress import Progress
from edgetool.runs import need_packages
from edgetool.scheduler.leasing import from_config
from edgetool.serving import shared_memory, vllm_engine
from edgetool.serving.plan import Plan, make_plan
from edgetool.serving.registry import Record, Registry
from edgetool.serving.secrets import Key, choose_key
from edgetool.serving.server import Interpreters, Server, lease_for

Announce = Callable[[dict[str, Any]], None]

_LOOK_S = 0.1
_CONNECT_LIMIT_S = 3.0


def make_plans(config: Config, progress: Progress) -> list[Plan]:
    """One plan, or two with `--with`. Raises what `make_plan` raises."""
    settings = config.serve_gpu
    vllm_engine.check_extra(settings.extra)
    inventory = from_config(config).inventory()
    shared = "serve_gpu.gpu_memory_utilization" in config.origins
    plans: list[Plan] = []
    for spec in filter(None, (settings.model, settings.with_model)):
        own = settings
        if plans:  # the name and context that were given are those of the first
            own = settings.model_copy(update={"served_model_name": None})
        taken = sum(plan.allowed.needed_bytes + plan.allowed.kv_cache_bytes for plan in plans)
        path = resolve_configured(spec, config.common, settings.revision, progress).path
        plan = make_plan(spec, path, own, inventory, shared=shared, taken_bytes=taken)
        if any(plan.served_model_name == other.served_model_name for other in plans):
            plan = replace(plan, served_model_name=f"{plan.served_model_name}-original")
        plans.append(plan)
    return plans


def dry_run(config: Config, progress: Progress) -> dict[str, Any]:
    """The plans, and the state of the environment that they need; nothing is leased or started."""
    plans = [plan.to_dict() for plan in make_plans(config, progress)]
    result: dict[str, Any] = {"plan": plans[0], **({"with": plans[1]} if len(plans) > 1 else {})}
    if config.serve_gpu.engine == "vllm":
        name = _environment_name(config, plans[0]["device"])
        there = environments.look(environments.recipe_of(name), config.envs)
        result["environment"] = {"name": name, "state": there.state, "python": str(there.python), "why": there.why}
    return result


@dataclass(frozen=True)
class Started:
    """Servers that are ready, and what keeps and describes them. documents: as in the result, without the key."""

    servers: list[Server]
    documents: list[dict[str, Any]]
    key: Key
    record: Record
    interpreters: Interpreters
    registry: Registry


@contextlib.contextmanager
def started(config: Config, progress: Progress) -> Iterator[Started]:
    """Start the servers and wait until they are ready; at the end of the block nothing of them is left.

    Raises:
        BadInput, ConfigError, MissingDependency, ResourceUnavailable: refused before anything was started.
        BackendFailed: an engine did not start.
        VerificationFailed: a model starts but does not speak.
    """
    settings = config.serve_gpu
    key = choose_key(config, progress)
    plans = make_plans(config, progress)
    for plan in plans:
        for warning in plan.allowed.warnings:
            progress.warn(warning)
    if not settings.front and settings.engine == "vllm":
        progress.warn("without the front /metrics, /invocations and other routes of vLLM answer without a key")
    registry = Registry(settings.state_dir)
    with contextlib.ExitStack() as held:
        interpreters = _interpreters(config, plans[0].device, held)
        _check_ray(config, interpreters, progress)
        record = registry.claim(
            settings.name or _as_name(plans[0].served_model_name),
            exact=settings.name is not None,
            model=str(settings.model),
            engine=settings.engine,
            device=plans[0].device,
        )
        held.callback(registry.drop, record)
        servers = [
            _start(plan, number, config, key, record, interpreters, progress, held) for number, plan in enumerate(plans)
        ]
        documents = [_document(server, record, number) for number, server in enumerate(servers)]
        registry.ready(record, documents, _segments(servers))
        yield Started(servers, documents, key, record, interpreters, registry)


def serve(config: Config, progress: Progress, announce: Announce) -> None:
    """Start the servers, announce them once they are ready, and keep them until an exception ends the wait.

    Raises as `started`, and BackendFailed where an engine ended and was not to be started again.
    """
    with started(config, progress) as ready:
        announce(_result(ready.documents, ready.key))
        _keep(ready.servers, ready.record, ready.interpreters, ready.registry, progress)


def _start(
    plan: Plan,
    number: int,
    config: Config,
    key: Key,
    record: Record,
    interpreters: Interpreters,
    progress: Progress,
    held: contextlib.ExitStack,
) -> Server:
    settings = config.serve_gpu
    command = f"edgetool serve-gpu {plan.model} --name {record.name}"
    port = settings.port if number == 0 else 0
    lease, listening = lease_for(plan, settings, port, from_config(config), command, progress)
    scratch = Path(record.scratch) / str(number)
    scratch.mkdir()
    server = Server(plan, settings, key.text, lease, listening, scratch)
    held.callback(server.stop, settings.drain_s + settings.grace_s)
    server.start(interpreters, _log(record, number), progress)
    return server


def _log(record: Record, number: int) -> Path:
    log = Path(record.log)
    return log.with_suffix(".original.log") if number else log


def _segments(servers: list[Server]) -> list[str]:
    trees = [server.engine.tree() for server in servers if server.engine is not None]
    return shared_memory.segments(process.pid for tree in trees for process in tree)


def _keep(
    servers: list[Server], record: Record, interpreters: Interpreters, registry: Registry, progress: Progress
) -> None:
    restarts = [Restarts(server.settings.restarts) for server in servers]
    ready_at = [time.monotonic() for _ in servers]
    while True:
        for number, server in enumerate(servers):
            if server.front is not None and server.front.poll() is not None:
                raise server.front.failure(f"the front of {server.url} ended")
            assert server.engine is not None
            code = server.engine.poll()
            if code is None:
                continue
            what = f"the engine of {server.url} ended ({describe(code)})"
            failure = server.engine.failure(what)
            pause_s = restarts[number].pause_after(time.monotonic() - ready_at[number])
            count = restarts[number].count
            if pause_s is None:
                again = f" after {count} restarts" if count else ""
                raise BackendFailed(failure.message.replace(what, what + again, 1))
            progress.warn(f"{what}; restart {count} of {server.settings.restarts} in {pause_s:.0f} s")
            time.sleep(pause_s)
            server.start_engine(interpreters, _log(record, number), progress)
            ready_at[number] = time.monotonic()
            documents = [_document(one, record, place) for place, one in enumerate(servers)]
            registry.ready(record, documents, _segments(servers))
            progress.note(f"{server.url} answers again")
        time.sleep(_LOOK_S)


def _document(server: Server, record: Record, number: int) -> dict[str, Any]:
    plan, settings = server.plan, server.settings
    assert server.engine is not None
    return {
        "name": record.name,
        "url": server.url,
        "openai_base_url": f"{server.url}/v1",
        "host": settings.host,
        "port": server.port,
        "pid": os.getpid(),
        "engine_pid": server.engine.pid,
        "model": plan.model,
        "served_model_name": plan.served_model_name,
        "engine": settings.engine,
        "device": plan.device,
        "dtype": plan.allowed.dtype,
        "max_model_len": plan.allowed.max_model_len,
        "seconds_to_ready": round(server.seconds_to_ready, 3),
        "log": str(_log(record, number)),
        "lease": server.lease.id,
        "gpus": list(server.lease.gpu_uuids),
    }


def _result(documents: list[dict[str, Any]], key: Key) -> dict[str, Any]:
    result = {**documents[0], "api_key": key.text if key.generated else None}
    if len(documents) > 1:
        result["with"] = documents[1]
    return result


def _environment_name(config: Config, device: str) -> str:
    return config.serve_gpu.env or ("vllm-cpu" if device == "cpu" else "vllm")


def _interpreters(config: Config, device: str, held: contextlib.ExitStack) -> Interpreters:
    if config.serve_gpu.engine == "transformers":
        need_packages("serving", "serve", "fastapi", "uvicorn", "torch", "transformers")
        return Interpreters(Path())
    if config.serve_gpu.front:
        need_packages("serving", "serve", "fastapi", "uvicorn")
    interpreter = held.enter_context(environments.use(_environment_name(config, device), config.envs))
    return Interpreters(interpreter.python, interpreter.fds)


def _check_ray(config: Config, interpreters: Interpreters, progress: Progress) -> None:
    """Raise where no Ray cluster answers: vLLM would start a cluster of one machine instead and say nothing."""
    settings = config.serve_gpu
    if settings.distributed is None:
        return
    if not environments.probe(interpreters.engine, "ray")["found"]:
        hint = "install ray there, in the version that vLLM asks for"
        raise MissingDependency(f"{interpreters.engine} has no ray", hint)
    address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--distributed ray needs the address of the cluster's head, not {address!r}",
            "use --ray-address HOST:6379, as `ray start --head` prints it",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_LIMIT_S).close()
    except OSError as error:
        raise ResourceUnavailable(
            f"no Ray cluster answers at {address}: {error}", "start one: ray start --head --port=6379"
        ) from error
    progress.note(f"workers run on the Ray cluster at {address}; edgetool leases the port only, Ray places the workers")


def _as_name(text: str) -> str:
    """A name for the registry made of any text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64] or "server"
