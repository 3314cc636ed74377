"""What the gateway of `edgetool serve-fpga` costs: latency and requests/s before a host that answers at once.

    python benchmarks/serve_fpga_gateway.py [--requests 2000] [--repeat 3] [--json table.json]

Three servers take turns, each a process of its own, asked by the same plain client over connections that stay open: the
host alone by its own protocol, a bare FastAPI route on uvicorn that returns a constant of the gateway's size, and the
gateway before that host. Latency is measured one request at a time; what the gateway adds is its latency less the
host's. Requests/s are measured with many at once, on whatever cores are left beside the client, the host and the
gateway. benchmarks/serve_fpga.py prints this table beside the simulator's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAKE_HOST = ROOT / "tests" / "fakes" / "fake_host.py"
MARKER = b"<|END|>"
QUESTION = "What is the capital of France?"
BODY = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}).encode()
START_LIMIT_S = 120.0
AT_ONCE = 16

Ask = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def ask_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + BODY)
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"the server answers {answer[:80]!r}")
    lines = answer.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    await reader.readexactly(length)


def asks_of_a_host() -> Ask:
    """Requests by the extension of protocol A, with a hello before the first of each connection."""
    ids = iter(range(1, 1 << 40))
    greeted: set[asyncio.StreamWriter] = set()

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer not in greeted:
            greeted.add(writer)
            nonce = hashlib.sha256(os.urandom(16)).hexdigest()[:32]
            hello = {"messages": [{"role": "user", "content": "Hi"}], "edgetool": {"hello": 1, "nonce": nonce}}
            writer.write(framed({**hello, "max_tokens": 1}))
            await read_frame(reader)
        request = {"type": "chat", "id": next(ids), "messages": [{"role": "user", "content": QUESTION}]}
        writer.write(framed(request))
        while b'"done"' not in await read_frame(reader):
            pass

    return ask


def framed(document: dict[str, Any]) -> bytes:
    payload = json.dumps(document).encode() + MARKER
    return struct.pack(">I", len(payload)) + payload


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">I", await reader.readexactly(4))
    return await reader.readexactly(length)


async def load(port: int, ask: Ask, at_once: int, requests: int) -> dict[str, float]:
    """Latencies and rate of `requests` requests over `at_once` connections."""
    latencies: list[float] = []

    async def use(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await ask(reader, writer)  # the first of a connection is not counted
        for _ in range(count):
            begun_s = time.perf_counter()
            await ask(reader, writer)
            latencies.append(time.perf_counter() - begun_s)
        writer.close()

    begun_s = time.perf_counter()
    await asyncio.gather(*(use(requests // at_once) for _ in range(at_once)))
    seconds = time.perf_counter() - begun_s
    ordered = sorted(latencies)
    return {
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[int(len(ordered) * 0.99)],
        "requests_per_s": len(ordered) / seconds,
    }


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """A server as a child, and the first line or document that it prints."""
    with log.open("wb") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
    assert child.stdout is not None
    try:
        said, until_s = "", time.monotonic() + START_LIMIT_S
        while not (said.endswith("}\n") or said.strip().isdigit()):
            line = child.stdout.readline().decode()
            if not line or time.monotonic() > until_s:
                raise SystemExit(f"{command} did not start:\n{log.read_text()[-2000:]}")
            said += line
        yield said
    finally:
        child.terminate()
        child.wait(30)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rows by name: medians over the repetitions; and what the gateway adds to the host's latency."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGETOOL_")}
    environment = {**kept, "EDGETOOL_LOCK_DIR": str(work / "locks"), "XDG_STATE_HOME": str(work / "state")}
    python, found = sys.executable, {}
    with contextlib.ExitStack() as held:
        host = [python, str(FAKE_HOST), "--pieces", "4"]
        host_port = int(held.enter_context(running(host, environment, work / "host.log")))
        bare = [python, __file__, "--bare"]
        bare_port = int(held.enter_context(running(bare, environment, work / "bare.log")))
        gateway = [python, "-m", "edgetool", "serve-fpga", "--host", f"127.0.0.1:{host_port}", "--port", "0"]
        gateway += ["--max-queue", "1000", "--json", "--quiet"]
        document = json.loads(held.enter_context(running(gateway, environment, work / "gateway.log")))
        servers: dict[str, tuple[int, Ask]] = {
            "the host alone": (host_port, asks_of_a_host()),
            "a bare uvicorn route": (bare_port, ask_http),
            "the gateway before the host": (document["port"], ask_http),
        }
        runs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in servers}
        for turn in range(options.repeat):
            for name, (port, ask) in servers.items():
                one = asyncio.run(load(port, ask, 1, options.requests // 2))
                many = asyncio.run(load(port, ask, AT_ONCE, options.requests))
                runs[name].append((one, many))
                rate = f"p50 {one['p50_ms']:.2f} ms, {many['requests_per_s']:.0f} requests/s"
                print(f"{turn + 1}/{options.repeat} {name}: {rate}", file=sys.stderr, flush=True)
    for name, pairs in runs.items():
        found[name] = {
            "p50_ms": statistics.median(one["p50_ms"] for one, _ in pairs),
            "p99_ms": statistics.median(one["p99_ms"] for one, _ in pairs),
            "requests_per_s": statistics.median(many["requests_per_s"] for _, many in pairs),
            "best_requests_per_s": max(many["requests_per_s"] for _, many in pairs),
        }
    alone, before = found["the host alone"], found["the gateway before the host"]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "at_once": AT_ONCE,
        "rows": [{"row": name, **figures} for name, figures in found.items()],
        "added_p50_ms": before["p50_ms"] - alone["p50_ms"],
        "added_p99_ms": before["p99_ms"] - alone["p99_ms"],
    }


def serve_bare() -> None:
    """The bare route: FastAPI on uvicorn, a constant of the size of the gateway's answer."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    choice = {"index": 0, "message": {"role": "assistant", "content": f"echo: {QUESTION}"}, "logprobs": None}
    usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    answer = {"id": "chatcmpl-" + 32 * "0", "object": "chat.completion", "created": 1_700_000_000, "model": "echo"}
    app = FastAPI(openapi_url=None)

    @app.post("/v1/chat/completions")
    async def bare() -> JSONResponse:
        return JSONResponse({**answer, "choices": [{**choice, "finish_reason": "stop"}], "usage": usage})

    # asyncio switches Nagle's algorithm off only where the protocol is named
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listening])


def show(found: dict[str, Any]) -> None:
    """The table on stdout."""
    print(
        f"{found['cores']} cores, load average {found['load_average']:.1f}; {found['at_once']} at once for requests/s"
    )
    print(f"{'':32}{'p50 ms':>9}{'p99 ms':>9}{'requests/s':>12}{'best':>8}")
    for one in found["rows"]:
        latency = f"{one['p50_ms']:>9.2f}{one['p99_ms']:>9.2f}"
        print(f"{one['row']:32}{latency}{one['requests_per_s']:>12.0f}{one['best_requests_per_s']:>8.0f}")
    print(f"{'added by the gateway':32}{found['added_p50_ms']:>9.2f}{found['added_p99_ms']:>9.2f}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `measure` needs, besides --repeat."""
    parser.add_argument("--requests", type=int, default=2000, help="requests of a turn with many at once")


def main() -> None:
    if sys.argv[1:] == ["--bare"]:
        serve_bare()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
