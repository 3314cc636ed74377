"""One server: an engine under a lease, a front that owns the port, and the way from nothing to ready and back."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool.config import ServeGpuConfig
from edgetool.errors import ResourceUnavailable
from edgetool.process.child import Child, Ended
from edgetool.progress import Progress
from edgetool.scheduler.leasing import Lease, Scheduler
from edgetool.serving import vllm_engine
from edgetool.serving.jobs import EngineJob, FrontJob
from edgetool.serving.phases import TRANSFORMERS, VLLM, PhaseReader
from edgetool.serving.plan import Plan
from edgetool.serving.ready import Endpoint, check_answers, healthy
from edgetool.serving.starting import lease_and_bind, own_environment, start_child, url_of

_LOOK_S = 0.3


@dataclass(frozen=True)
class Interpreters:
    """Whose Python runs the engine, and descriptors that keep its environment from being removed meanwhile."""

    engine: Path
    fds: tuple[int, ...] = ()


class Server:
    """A started server. `start` makes one; `stop` ends everything that belongs to it."""

    def __init__(
        self, plan: Plan, settings: ServeGpuConfig, key: str, lease: Lease, listening: socket.socket, scratch: Path
    ) -> None:
        """Use `lease_for` and `start`."""
        self.plan = plan
        self.settings = settings
        self.key = key
        self.lease = lease
        self.listening = listening
        self.port = int(listening.getsockname()[1])
        self.scratch = scratch
        self.engine: Child | None = None
        self.front: Child | None = None
        self.seconds_to_ready = 0.0

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        return url_of(self.settings.host, self.port)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.key, self.plan.served_model_name)

    @property
    def socket_path(self) -> Path:
        return self.scratch / "engine.sock"

    def start(self, interpreters: Interpreters, log: Path, progress: Progress) -> None:
        """Start engine and front, and wait until the server is ready.

        Raises:
            BackendFailed: the engine or the front ended, or was not ready in time.
            VerificationFailed: it answers, but not with language.
        """
        begun = time.monotonic()
        if self.settings.front:
            self.front = self._start_front(log.with_suffix(".front.log"))
        self.start_engine(interpreters, log, progress)
        self.seconds_to_ready = time.monotonic() - begun

    def start_engine(self, interpreters: Interpreters, log: Path, progress: Progress) -> None:
        """The engine alone, until it is ready: the first time, and again after it failed."""
        self.socket_path.unlink(missing_ok=True)
        if self.settings.engine == "vllm":
            command, environment, stdin = self._vllm(interpreters)
            phases = VLLM
        else:
            command, environment, stdin = self._transformers()
            phases = TRANSFORMERS
        passed = self.lease.fds + interpreters.fds
        if not self.settings.front and self.settings.engine == "transformers":
            passed += (self.listening.fileno(),)
        if not self.settings.front and self.settings.engine == "vllm":
            self.listening.close()  # vLLM binds the port itself
        self.engine = start_child(command, environment, log, passed, stdin, self.lease)
        reader = PhaseReader(phases)
        name = "vLLM" if self.settings.engine == "vllm" else "the transformers engine"
        with progress.task(f"start {name}", len(phases), "phase") as task:

            def on_line(line: str) -> None:
                step = reader.read(line)
                if step is not None:
                    task.advance(step[0], note=step[1])

            self.engine.wait_ready(self._check(), self.settings.ready_timeout_s, on_line)
            if self.settings.check:
                task.advance(0, note="first answer")
                check_answers(self.endpoint)

    def _check(self) -> Any:
        """A check that asks no more often than `_LOOK_S`, and notices a front that has ended."""
        last = -1.0

        def check() -> bool:
            nonlocal last
            if self.front is not None and self.front.poll() is not None:
                raise self.front.failure("the front of the server ended before it was ready")
            if time.monotonic() - last < _LOOK_S:
                return False
            ready = healthy(self.endpoint)
            last = time.monotonic()
            return ready

        return check

    def stop(self, grace_s: float) -> list[Ended]:
        """End the engine, whose streams then end in the front, and then the front; give the lease back."""
        ended: list[Ended] = []

        def end(child: Child | None, limit_s: float) -> None:
            if child is not None:
                ended.append(child.stop(limit_s))

        with contextlib.ExitStack() as last:  # whatever happens, all of it happens, from the last line up
            last.callback(self.lease.release)
            last.callback(self.listening.close)
            last.callback(end, self.front, 2.0)
            last.callback(end, self.engine, grace_s)
        return ended

    def _vllm(self, interpreters: Interpreters) -> tuple[list[str], dict[str, str], bytes | None]:
        allowed, settings = self.plan.allowed, self.settings
        start = vllm_engine.Start(
            python=interpreters.engine,
            model=self.plan.checkpoint.directory,
            served_model_name=self.plan.served_model_name,
            max_model_len=allowed.max_model_len,
            dtype=allowed.dtype,
            device=self.plan.device,
            kv_cache_bytes=allowed.kv_cache_bytes,
            kv_cache_dtype=settings.kv_cache_dtype,
            gpu_memory_utilization=self.plan.utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
            socket=self.socket_path if settings.front else None,
            host=settings.host,
            port=self.port,
            distributed=settings.distributed,
            shutdown_timeout_s=int(settings.drain_s),
            threads=settings.threads,
            extra=settings.extra,
        )
        environment = vllm_engine.environment(start, self.key, os.environ, scratch=self.scratch)
        environment |= self.lease.environment()
        if settings.distributed is not None:
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray's own business
            if settings.ray_address is not None:
                environment["RAY_ADDRESS"] = settings.ray_address
        return vllm_engine.command(start), environment, None

    def _transformers(self) -> tuple[list[str], dict[str, str], bytes]:
        settings, allowed = self.settings, self.plan.allowed
        job = EngineJob(
            model=str(self.plan.checkpoint.directory),
            key=self.key,
            served_model_name=self.plan.served_model_name,
            max_model_len=allowed.max_model_len,
            dtype=allowed.dtype,
            device=self.plan.device,
            socket=str(self.socket_path) if settings.front else None,
            listen_fd=None if settings.front else self.listening.fileno(),
            threads=settings.threads,
            drain_s=settings.drain_s,
        )
        command = [sys.executable, "-m", "edgetool.serving.transformers_engine"]
        return command, own_environment(self.lease), job.to_json().encode()

    def _start_front(self, log: Path) -> Child:
        job = FrontJob(
            key=self.key,
            listen_fd=self.listening.fileno(),
            engine_socket=str(self.socket_path),
            served_model_name=self.plan.served_model_name,
            chat=self.plan.chat,
            batch=self.settings.batch,
        )
        command = [sys.executable, "-m", "edgetool.serving.front"]
        passed = (*self.lease.fds, self.listening.fileno())
        return start_child(command, own_environment(self.lease), log, passed, job.to_json().encode(), self.lease)


def lease_for(
    plan: Plan, settings: ServeGpuConfig, port: int, scheduler: Scheduler, command: str, progress: Progress
) -> tuple[Lease, socket.socket]:
    """A lease on what the plan needs and on a port, and that port bound.

    The requests of the plan are tried in their order; when none can be had at once, the first is waited for.

    Raises ResourceUnavailable when it is not to be had in time, and ConfigError for an address that is not ours.
    """
    try:
        return lease_and_bind(plan.requests, settings.host, port, settings.wait_s, scheduler, command, progress)
    except ResourceUnavailable as error:
        # what `gpus run` calls --min-free is a share here
        message = error.message.replace(
            "--min-free how much of it is needed", "--gpu-memory-utilization which share of it is needed"
        )
        raise ResourceUnavailable(message, error.hint) from error
