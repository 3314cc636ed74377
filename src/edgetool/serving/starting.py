"""What starting a server takes: its port, its address, and processes of edgetool under a lease."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from edgetool.errors import ConfigError, ResourceUnavailable
from edgetool.process import Child
from edgetool.scheduler import Lease


def url_of(listen: str, port: int) -> str:
    """The address, for clients on this machine, of a server that listens on `listen`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(listen, f"[{listen}]" if ":" in listen else listen)  # noqa: S104
    return f"http://{host}:{port}"


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
