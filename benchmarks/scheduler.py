"""Leases under load: 8 processes that take 1,000 random leases each, one process alone, and `edgetool gpus --json`.

    .venv/bin/python benchmarks/scheduler.py [--processes 8] [--leases 1000] [--json FILE]

Double grants are counted by files of their own: each GPU, port and board has one, whose flock a process takes when it
is granted the thing and gives back before it releases the lease. The machine is the recorded one of the tests, so that
figures need no GPU; the time that NVML takes is therefore not in them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgetool.errors import ResourceUnavailable
from edgetool.scheduler.inventory import read_recorded
from edgetool.scheduler.leasing import Request, Scheduler

RECORDED = Path(__file__).parent.parent / "tests" / "fakes" / "nvml_eight_gpus.json"
GIB = 2**30


def any_request(dice: random.Random) -> Request:
    """One or two whole GPUs, a board, a port, or several of these."""
    kind = dice.random()
    if kind < 0.6:
        return Request(gpus=dice.choice((1, 1, 2)), gpu_class="4090", min_free_bytes=20 * GIB, exclusive=True)
    if kind < 0.8:
        return Request(ports=dice.choice((1, 2)))
    return Request(board=dice.choice(("vcu128-0", "vcu128-1")), ports=1)


def work(directory: Path, seed: int, count: int, results: Any) -> None:
    """Take leases, one after another; report the seconds that each took and the double grants that were seen."""
    dice = random.Random(seed)
    scheduler = Scheduler(directory / "leases", lambda: read_recorded(RECORDED))
    taken_s: list[float] = []
    doubles = refused = 0
    while len(taken_s) < count:
        request = any_request(dice)
        begun_s = time.perf_counter()
        try:
            lease = scheduler.acquire(request, command=f"benchmark {seed}", wait_s=60)
        except ResourceUnavailable:
            refused += 1
            continue
        taken_s.append(time.perf_counter() - begun_s)
        names = [*lease.gpu_uuids, *(str(port) for port in lease.ports), *([lease.board] if lease.board else [])]
        files = [os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in names]
        for file in files:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                doubles += 1
        time.sleep(dice.choice((0, 0, 0.001)))
        for file in files:
            os.close(file)
        lease.release()
    results.put((taken_s, doubles, refused))


def measure(processes: int, leases: int) -> dict[str, Any]:
    """Run `work` in that many processes at once."""
    with tempfile.TemporaryDirectory() as made:
        results: Any = multiprocessing.Queue()
        begun_s = time.perf_counter()
        workers = [
            multiprocessing.Process(target=work, args=(Path(made), seed, leases, results)) for seed in range(processes)
        ]
        for worker in workers:
            worker.start()
        answers = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
        wall_s = time.perf_counter() - begun_s
    taken_s = sorted(value for answer in answers for value in answer[0])
    return {
        "processes": processes,
        "leases": len(taken_s),
        "double_grants": sum(answer[1] for answer in answers),
        "refused": sum(answer[2] for answer in answers),
        "p50_ms": 1e3 * taken_s[len(taken_s) // 2],
        "p99_ms": 1e3 * taken_s[len(taken_s) * 99 // 100],
        "largest_ms": 1e3 * taken_s[-1],
        "leases_per_s": len(taken_s) / wall_s,
    }


def command_line(times: int = 20) -> dict[str, float]:
    """Wall and CPU milliseconds of `edgetool gpus --json`, start of the interpreter included."""
    wall_ms, cpu_ms = [], []
    with tempfile.TemporaryDirectory() as made:
        env = {**os.environ, "EDGETOOL_LOCK_DIR": str(Path(made) / "leases"), "EDGETOOL_NVML_FIXTURE": str(RECORDED)}
        for _ in range(times):
            before, begun_s = os.times(), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "edgetool", "gpus", "--json"], env=env, check=True, capture_output=True
            )
            after = os.times()
            wall_ms.append(1e3 * (time.perf_counter() - begun_s))
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            cpu_ms.append(1e3 * cpu)
    return {"least_wall_ms": min(wall_ms), "median_wall_ms": sorted(wall_ms)[times // 2], "least_cpu_ms": min(cpu_ms)}


def main() -> None:
    """Print the tables of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--leases", type=int, default=1000, help="leases a process")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    rows = [measure(1, arguments.leases), measure(arguments.processes, arguments.leases)]
    print("| processes | leases | double grants | acquire p50, ms | p99, ms | largest, ms | leases/s |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['processes']} | {row['leases']:,} | {row['double_grants']} | {row['p50_ms']:.2f} "
            f"| {row['p99_ms']:.1f} | {row['largest_ms']:.0f} | {row['leases_per_s']:.0f} |"
        )
    start = command_line()
    print(
        "\nedgetool gpus --json: " + ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in start.items())
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"leases": rows, "command_line": start}, indent=2) + "\n")


if __name__ == "__main__":
    main()
