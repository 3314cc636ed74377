"""`edgetool serve-fpga`: from its settings to a gateway that answers, and on until it is stopped or fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetool.config import Config, ServeFpgaConfig
from edgetool.config_board import split_at_port
from edgetool.errors import BackendFailed, ResourceUnavailable
from edgetool.fpga_service.embedded import EmbeddedHost, listen_at, private_directory
from edgetool.fpga_service.jobs import HostJob
from edgetool.fpga_service.preparing import board_of, checked_image, client_keys, context_tokens, need_extra, requests
from edgetool.progress import Progress
from edgetool.scheduler.leasing import Lease, from_config
from edgetool.serving.secrets import Key
from edgetool.serving.starting import lease_and_bind, url_of

if TYPE_CHECKING:
    import uvicorn

    from edgetool.fpga_service.exchange import Counter
    from edgetool.fpga_service.gateway import Gateway
    from edgetool.fpga_service.host_client import HostClient
    from edgetool.fpga_service.recording import Recorder

Announce = Callable[[dict[str, Any]], None]

_FIRST_LOOK_S = 10.0
"""How long a host of others may take to be there before the gateway says that it is away."""
_LOOK_S = 0.02
_HELLO_S = 86_400.0
"""Our own host is watched as a process, so its hello may take as long as loading a large image takes."""
_KEEP_ALIVE_S = 75


def dry_run(config: Config) -> dict[str, Any]:
    """{"plan": what would be served, and where}. Raises what `serve` raises before it starts anything."""
    need_extra(config.serve_fpga)
    settings = config.serve_fpga
    image = checked_image(settings)
    keys, generated = client_keys(config, None)
    plan = {
        "image": None if settings.image is None else str(settings.image),
        "host": settings.host,
        "listen": settings.listen,
        "port": settings.port,
        "numerics": settings.numerics if image is not None else None,
        "max_model_len": context_tokens(settings, image),
        "max_queue": settings.max_queue,
        "timeout_s": settings.timeout_s,
        "keys": sorted(keys) if generated is None else ["made when it starts"],
        "record": None if settings.record is None else str(settings.record),
    }
    return {"plan": plan}


def serve(config: Config, progress: Progress, announce: Announce) -> None:
    """Start it, announce it once it answers, and keep it until an exception ends the wait.

    Raises:
        BadInput, ConfigError, MissingDependency, ResourceUnavailable: refused before anything was started.
        BackendFailed: the host of the image ended, and was not to be started again.
    """
    settings = config.serve_fpga
    need_extra(settings)
    image = checked_image(settings)
    keys, generated = client_keys(config, progress)
    begun_s = time.monotonic()
    with contextlib.ExitStack() as held:
        recorder, counter = _recorder(settings, held), _counter(settings)
        scheduler = from_config(config)
        lease, listening = lease_and_bind(
            requests(settings, image, scheduler.inventory()),
            settings.listen,
            settings.port,
            settings.wait_s,
            scheduler,
            _command(settings),
            progress,
        )
        held.callback(lease.release)
        held.callback(listening.close)
        host = None if image is None else _start_host(settings, lease, held, progress)
        gateway = _gateway(settings, keys, host, recorder, counter)
        port = int(listening.getsockname()[1])

        def ready() -> None:
            announce(_document(settings, gateway, host, lease, port, generated, time.monotonic() - begun_s))

        asyncio.run(_run(gateway, host, settings, listening, ready, progress))


def _command(settings: ServeFpgaConfig) -> str:
    where = f"--host {settings.host}" if settings.image is None else f"--image {settings.image}"
    return f"edgetool serve-fpga {where}"


def _start_host(
    settings: ServeFpgaConfig, lease: Lease, held: contextlib.ExitStack, progress: Progress
) -> EmbeddedHost:
    scratch = held.enter_context(private_directory())
    log = settings.state_dir / "logs" / f"port-{lease.ports[0]}.log"
    try:
        listening = listen_at(scratch / "host.sock")
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ResourceUnavailable(f"cannot prepare the host of the image: {error}") from error
    assert settings.image is not None
    job = HostJob(
        image=str(settings.image.absolute()),
        board=board_of(settings),
        numerics=settings.numerics,
        device="cuda" if lease.gpu_uuids else "cpu",
        listen=(("A", listening.fileno()),),
        max_queue=settings.max_queue + 1,
        timeout_s=settings.timeout_s,
        threads=settings.threads,
    )
    host = EmbeddedHost(job, lease, listening, log, settings.restarts)
    held.callback(host.stop, settings.grace_s)
    progress.note(f"starting the simulator of {settings.image}; log: {log}")
    host.start()
    return host


def _recorder(settings: ServeFpgaConfig, held: contextlib.ExitStack) -> Recorder | None:
    if settings.record is None:
        return None
    from edgetool.fpga_service.recording import Recorder

    recorder = Recorder(settings.record, contents=settings.record_contents)
    held.callback(recorder.close)
    return recorder


def _gateway(
    settings: ServeFpgaConfig,
    keys: Mapping[str, str],
    host: EmbeddedHost | None,
    recorder: Recorder | None,
    counter: Counter | None,
) -> Gateway:
    from edgetool.fpga_service.gateway import Gateway, GatewaySettings

    told = GatewaySettings(
        served_model_name=settings.served_model_name,
        max_model_len=settings.max_model_len,
        temperature=settings.temperature,
        max_queue=settings.max_queue,
        timeout_s=settings.timeout_s,
        rate_limit=settings.rate_limit,
        keys=keys,
        cors_origins=settings.cors_origins,
    )
    return Gateway(_client(settings, host), told, recorder, counter)


def _counter(settings: ServeFpgaConfig) -> Counter | None:
    if settings.tokenizer is None:
        return None
    from edgetool.fpga_service.counting import TokenCounter

    return TokenCounter(settings.tokenizer)


def _client(settings: ServeFpgaConfig, host: EmbeddedHost | None) -> HostClient:
    from edgetool.fpga_service.host_client import HostClient

    if host is not None:
        where = Path(host.listening.getsockname())
        return HostClient("simulator", 0, socket=where, hello_timeout_s=_HELLO_S)
    assert settings.host is not None
    return HostClient(*split_at_port(settings.host))


async def _run(
    gateway: Gateway,
    host: EmbeddedHost | None,
    settings: ServeFpgaConfig,
    listening: socket.socket,
    ready: Callable[[], None],
    progress: Progress,
) -> None:
    """Serve until a signal comes, or until the host is given up."""
    import uvicorn

    from edgetool.fpga_service.gateway import make_app

    server = uvicorn.Server(
        uvicorn.Config(
            make_app(gateway),
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=1 + int(settings.drain_s),
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    tasks = [serving]
    ending = asyncio.create_task(_end_answers(gateway, settings.drain_s, server))
    try:
        await _until_ready(gateway, host, settings, server, serving, progress)
        if not serving.done():
            ready()
        if host is not None:
            tasks.append(asyncio.create_task(host.keep(progress)))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.should_exit = True
        for task in tasks[1:]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        ending.cancel()
        if gateway.recorder is not None and gateway.recorder.failure is not None:
            progress.warn(f"recording ended early: {gateway.recorder.failure}")
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


async def _end_answers(gateway: Gateway, drain_s: float, server: uvicorn.Server) -> None:
    """What is under way after the drain ends with an error for its client, before the server cuts it off."""
    while not server.should_exit:
        await asyncio.sleep(_LOOK_S)
    await asyncio.sleep(drain_s)
    await gateway.host.close()


async def _until_ready(
    gateway: Gateway,
    host: EmbeddedHost | None,
    settings: ServeFpgaConfig,
    server: uvicorn.Server,
    serving: asyncio.Task[None],
    progress: Progress,
) -> None:
    """Wait until it answers. A host of others that is away is said, and waited for while serving."""
    begun_s = time.monotonic()
    limit_s = settings.ready_timeout_s if host is not None else _FIRST_LOOK_S
    while not serving.done() and not (server.started and gateway.host.ready):
        failure = None if host is None else host.ended()
        if failure is not None:
            raise failure
        if server.started and (time.monotonic() - begun_s > limit_s or (host is None and gateway.host.state == "away")):
            if host is None:
                progress.warn(f"the host is away: {gateway.host.why}; requests are answered 503 until it is there")
                return
            raise BackendFailed(f"the host of {settings.image} was not ready after {limit_s:.0f} s; log: {host.log}")
        await asyncio.sleep(_LOOK_S)


def _document(
    settings: ServeFpgaConfig,
    gateway: Gateway,
    host: EmbeddedHost | None,
    lease: Lease,
    port: int,
    generated: Key | None,
    seconds: float,
) -> dict[str, Any]:
    """What `edgetool.serve-fpga/1` says."""
    facts = gateway.host.facts
    url = url_of(settings.listen, port)
    return {
        "url": url,
        "openai_base_url": f"{url}/v1",
        "listen": settings.listen,
        "port": port,
        "pid": os.getpid(),
        "host_pid": None if host is None or host.child is None else host.child.pid,
        "host": settings.host,
        "model": gateway.name,
        "max_model_len": gateway.context_tokens,
        "image": None if settings.image is None else str(settings.image),
        "image_sha256": None if facts is None else facts.image_sha256,
        "numerics": None if facts is None else facts.numerics,
        "board": lease.board if facts is None else facts.board,
        "lease": lease.id,
        "log": None if host is None else str(host.log),
        "seconds_to_ready": round(seconds, 3),
        "api_key": None if generated is None else generated.text,
    }
