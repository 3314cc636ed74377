"""What starting a server takes: its port, its address, and processes of edgetool under a lease."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgetool.errors import ConfigError, ResourceUnavailable
from edgetool.process.child import Child
from edgetool.progress import Progress
from edgetool.scheduler.leasing import Lease, Request, Scheduler

_PORT_TRIES = 5


def url_of(listen: str, port: int) -> str:
    """The address, for clients on this machine, of a server that listens on `listen`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(listen, f"[{listen}]" if ":" in listen else listen)  # noqa: S104
    return f"http://{host}:{port}"


def is_loopback(listen: str) -> bool:
    """Whether only this machine reaches a server that listens on `listen`."""
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return listen == "localhost"


def lease_and_bind(
    requests: Sequence[Request],
    listen: str,
    port: int,
    wait_s: float,
    scheduler: Scheduler,
    command: str,
    progress: Progress,
) -> tuple[Lease, socket.socket]:
    """A lease on one of `requests` and on `port` (0: any), and that port bound.

    The requests are tried in their order; when none can be had at once, the first is waited for.

    Raises ResourceUnavailable when it is not to be had in time, and ConfigError for an address that is not ours.
    """
    wanted = [replace(request, port=port) if port else replace(request, ports=1) for request in requests]
    for _ in range(_PORT_TRIES):
        lease = _acquire(wanted, wait_s, scheduler, command, progress)
        try:
            return lease, bind(listen, lease.ports[0])
        except BaseException as error:
            lease.release()
            if port or not isinstance(error, ResourceUnavailable):
                raise
    raise ResourceUnavailable(f"no port of {listen} could be bound", "choose one with --port")


def _acquire(wanted: list[Request], wait_s: float, scheduler: Scheduler, command: str, progress: Progress) -> Lease:
    for request in wanted if len(wanted) > 1 else ():
        with contextlib.suppress(ResourceUnavailable):
            return scheduler.acquire(request, command=command)
    return scheduler.acquire(wanted[0], command=command, wait_s=wait_s, progress=progress)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port. Raises ConfigError for an address that is not ours, ResourceUnavailable otherwise."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"host {host!r} is no address: {error.strerror}", "use --host 127.0.0.1") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is not an address of this machine", "use --host 127.0.0.1") from error
        raise ResourceUnavailable(f"port {port} of {host}: {error.strerror}", "use another --port, or 0") from error
    return listening


def own_environment(lease: Lease) -> dict[str, str]:
    """For processes of edgetool itself: everything but its settings, which their jobs hold already."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGETOOL_")}
    return {**kept, "TOKENIZERS_PARALLELISM": "false", **lease.environment()}


def start_child(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    passed: tuple[int, ...],
    stdin: bytes | None,
    lease: Lease,
) -> Child:
    """Start a process under `lease`, with `stdin` to read."""
    reading = None
    if stdin is not None:
        # a job fits into a pipe's buffer (64 KiB), so writing it does not wait for a reader
        reading, writing = os.pipe()
        os.write(writing, stdin)
        os.close(writing)
    try:
        child = Child.start(command, log=log, env=environment, stdin=reading, pass_fds=passed)
    finally:
        if reading is not None:
            os.close(reading)
    lease.adopt(child.pid)
    return child
