"""The host as a process: `edgetool fpga-host`, and the child that `serve-fpga --image` starts for itself.

python -m edgetool.fpga_service.host_main      # its job (jobs.HostJob) on stdin; what it has to say on stderr
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetool.config import Config
from edgetool.config_board import FpgaHostConfig
from edgetool.errors import BadInput, ConfigError, EdgetoolError
from edgetool.fpga.image import Image
from edgetool.fpga_service.host import Host, Protocol
from edgetool.fpga_service.jobs import HostJob
from edgetool.fpga_service.preparing import board_of, requests
from edgetool.fpga_service.protocol_b import LARGEST_U16_VOCABULARY
from edgetool.fpga_service.work import Worker
from edgetool.progress import Progress
from edgetool.runs import need_packages
from edgetool.scheduler.leasing import Lease, Request, from_config
from edgetool.serving.starting import is_loopback, lease_and_bind

if TYPE_CHECKING:
    from edgetool.fpga_service.device import Device

READY_LINE = "host: answering"

Announce = Callable[[dict[str, Any]], None]
Listening = Sequence[tuple[Protocol, socket.socket]]


def serve(config: Config, progress: Progress, announce: Announce) -> None:
    """Lease the board and the ports, open the device, announce it, and serve until a signal ends the process.

    Raises:
        BadInput, VerificationFailed: the image is damaged.
        ConfigError, MissingDependency, ResourceUnavailable: refused before anything was started.
    """
    settings = config.fpga_host
    _check(settings)
    assert settings.image is not None
    begun_s = time.monotonic()
    board = board_of(settings)
    if not is_loopback(settings.listen):
        progress.warn(f"whoever reaches {settings.listen} can use the board: the protocols have no key")
    image = Image.open(settings.image)
    with contextlib.ExitStack() as held:
        lease, listening = _lease(config, image, held, progress)
        # set before torch looks for GPUs: it sees those of the lease and no others
        os.environ["CUDA_VISIBLE_DEVICES"] = lease.environment()["CUDA_VISIBLE_DEVICES"]
        progress.note(f"reading {settings.image}")
        on = "cuda" if lease.gpu_uuids else "cpu"
        device = _open(settings.image, board, settings.numerics, on, settings.threads)
        ports = {protocol: bound.getsockname()[1] for protocol, bound in listening}
        facts = device.facts
        if "B" in ports and facts.vocab > LARGEST_U16_VOCABULARY:
            progress.warn(f"a vocabulary of {facts.vocab} has no 16-bit ids: protocol B answers 32-bit commands only")

        def ready() -> None:
            announce(
                {
                    "listen": settings.listen,
                    "ports": ports,
                    "pid": os.getpid(),
                    "image": str(settings.image),
                    **asdict(facts),
                    "seconds_to_ready": round(time.monotonic() - begun_s, 3),
                }
            )

        run(device, listening, settings.max_queue, settings.timeout_s, progress.note, ready)
    signal.raise_signal(signal.SIGTERM)  # the command line's own handler decides how it ends


def run(
    device: Device,
    listening: Listening,
    max_queue: int,
    timeout_s: float,
    log: Callable[[str], None],
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM, or Ctrl-C, which is raised as KeyboardInterrupt."""
    worker = Worker(device, max_queue, log)

    async def serving() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask(*_: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait for the device
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(stop.set)

        signal.signal(signal.SIGTERM, ask)
        async with Host(worker, listening, timeout_s, log):
            ready()
            await stop.wait()

    before = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(serving())
    finally:
        worker.stop()  # also when it could not even begin to listen
        signal.signal(signal.SIGTERM, before)


def _check(settings: FpgaHostConfig) -> None:
    if settings.protocol == "both" and settings.port == settings.port_b != 0:
        raise ConfigError(f"port and port_b are both {settings.port}", "protocols A and B need a port each")
    need_packages("fpga-host", "fpga", "torch", "tokenizers", "transformers")


def _lease(config: Config, image: Image, held: contextlib.ExitStack, progress: Progress) -> tuple[Lease, Listening]:
    """The leased board, and the sockets of the protocols; the board is leased with the first port."""
    settings = config.fpga_host
    scheduler = from_config(config)
    wanted = requests(settings, image, scheduler.inventory())
    command = f"edgetool fpga-host --image {settings.image}"
    ports: dict[Protocol, int] = {"A": settings.port, "B": settings.port_b}
    leases: list[Lease] = []
    listening: list[tuple[Protocol, socket.socket]] = []
    for protocol, port in ports.items():
        if settings.protocol in (protocol, "both"):
            lease, bound = lease_and_bind(wanted, settings.listen, port, settings.wait_s, scheduler, command, progress)
            held.callback(lease.release)
            held.callback(bound.close)
            leases.append(lease)
            listening.append((protocol, bound))
            wanted = [Request()]
    return leases[0], listening


def _open(image: Path, board: str, numerics: str, device: str, threads: int | None) -> Device:
    from edgetool.fpga_service.simulator_device import open_device

    return open_device(image, numerics=numerics, device=device, threads=threads, board=board)  # type: ignore[arg-type]


def main() -> None:
    """The child: it is told its job on stdin, and ends when it is asked to."""
    try:
        job = HostJob.from_json(sys.stdin.read())
    except (ValueError, TypeError, KeyError) as error:
        print(f"error: stdin holds no job: {error}", file=sys.stderr)
        raise SystemExit(BadInput.exit_code) from None
    # a stop while the image is being read ends at once; nothing is to be put away yet
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listening = [(_protocol(name), socket.socket(fileno=number)) for name, number in job.listen]
    try:
        device = _open(Path(job.image), job.board, job.numerics, job.device, job.threads)
    except EdgetoolError as failure:
        print(f"error: {failure.message}", file=sys.stderr)
        raise SystemExit(failure.exit_code) from None
    with contextlib.suppress(KeyboardInterrupt):
        run(device, listening, job.max_queue, job.timeout_s, _say, lambda: _say(READY_LINE))


def _protocol(name: str) -> Protocol:
    return "B" if name == "B" else "A"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
