"""TCP ports of this machine: which the kernel does not give away by itself, and which somebody uses.

To bind a port, close it and hand its number on collides; so a port is leased first (leasing.py) and tested then, and
the lease lasts as long as the server.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from edgetool.scheduler.lease_records import user_name

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LISTEN = "0A"


def ephemeral_range() -> tuple[int, int]:
    """First and last port that the kernel gives to outgoing connections (ip(7), ip_local_port_range)."""
    with suppress(OSError, ValueError):
        first, last = _EPHEMERAL.read_text().split()
        return int(first), int(last)
    return 32_768, 60_999


def candidates(first: int, last: int, leased: Container[int]) -> Iterator[int]:
    """Ports from `first` to `last` that are not leased and lie outside the ephemeral range.

    Where the whole range is ephemeral, all of it: a port that is tested is better than none.
    """
    low, high = ephemeral_range()
    outside = [port for port in range(first, last + 1) if not low <= port <= high]
    return (port for port in outside or range(first, last + 1) if port not in leased)


class Trouble(NamedTuple):
    """Why no server can be started on a port, in words; `lasting` when waiting does not help."""

    why: str
    lasting: bool = False


def trouble(port: int, *, lingering_is_fine: bool = False) -> Trouble | None:
    """Why no server can be started on a port; None when one can.

    Tested by binding it on all addresses, IPv4 and IPv6. `lingering_is_fine`: connections of an ended server that are
    still being closed (TIME_WAIT) do not count; a server that sets SO_REUSEADDR, as most do, can bind beside them.
    """
    refused = _bind_error(port, reuse=False)
    if refused == errno.EADDRINUSE and lingering_is_fine:
        refused = _bind_error(port, reuse=True)
    if refused is None:
        return None
    if refused == errno.EACCES:
        return Trouble(f"port {port} is for privileged users only", lasting=True)
    user = listener(port)
    return Trouble(f"port {port} is in use" + (f": a process of {user} listens on it" if user else ""))


def listener(port: int) -> str | None:
    """The user whose process listens on a port; None when none does."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return user_name(int(fields[7]))
    return None


def _bind_error(port: int, *, reuse: bool) -> int | None:
    """The errno of binding a port on every address; None when it can be bound."""
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                probe.bind(("", port))
                if reuse:
                    probe.listen(1)  # a listener that set SO_REUSEADDR too is seen only now
        except OSError as error:
            if error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT}:
                continue  # a machine without IPv6
            return error.errno or errno.EADDRINUSE
        return None
    return errno.EADDRNOTAVAIL
