"""Commands that read files and write others, timed beside `cp` of the same files, in turns."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from measure import Cost, run

TIMEOUT_S = 1800.0
COLUMNS = ("GB/s", "`cp`", "of `cp`", "`cp`, `sync`", "of that", "CPU s", "of `cp`", "peak RSS, GB")
"""Headings of the cells of a row."""


@dataclass(frozen=True)
class Trial:
    """What is timed: a command that reads `files` and writes the output. `again`: only its second run counts."""

    files: Sequence[Path]
    command: Sequence[str]
    again: bool = False


@dataclass
class Measured:
    """A finished row: medians over the repetitions."""

    row: str
    input_gb: float
    wall_s: float
    gb_per_s: float
    cp_gb_per_s: float
    cp_sync_gb_per_s: float
    cpu_s: float
    cp_cpu_s: float
    peak_rss_bytes: int

    def cells(self) -> list[str]:
        """The row's cells under COLUMNS."""
        return [
            f"{self.gb_per_s:.2f}",
            f"{self.cp_gb_per_s:.2f}",
            f"{self.gb_per_s / self.cp_gb_per_s:.2f}",
            f"{self.cp_sync_gb_per_s:.2f}",
            f"{self.gb_per_s / self.cp_sync_gb_per_s:.2f}",
            f"{self.cpu_s:.2f}",
            f"{self.cp_cpu_s:.2f}",
            f"{self.peak_rss_bytes / 1e9:.2f}",
        ]


class BesideCp:
    """Times trials whose output is `output`, each between two copies of its files."""

    def __init__(self, work: Path, idle: float) -> None:
        """idle: wait with each command until this share of the machine is idle."""
        self.work = work
        self.output = work / "output"
        self.idle = idle

    def measure(self, trials: Mapping[str, Callable[[], Trial]], repeat: int) -> list[Measured]:
        """All trials by row name, `repeat` times in turn."""
        copies: dict[str, list[Cost]] = {name: [] for name in trials}
        synced: dict[str, list[float]] = {name: [] for name in trials}
        costs: dict[str, list[Cost]] = {name: [] for name in trials}
        size_gb: dict[str, float] = {}
        for turn in range(repeat):
            for name, make in trials.items():
                trial = make()
                size_gb[name] = sum(path.stat().st_size for path in trial.files) / 1e9
                output = shlex.quote(str(self.output))
                copy = f"mkdir {output} && cp {shlex.join(map(str, trial.files))} {output}"
                copies[name].append(self.timed(["bash", "-c", copy], trial.files))
                synced[name].append(self.timed(["bash", "-c", f"{copy} && sync {output}/*"], trial.files).wall_s)
                cost = self.timed(trial.command, trial.files)
                costs[name].append(self.timed(trial.command, trial.files, keep=True) if trial.again else cost)
                seconds = (copies[name][-1].wall_s, synced[name][-1], costs[name][-1].wall_s)
                shown = "cp {:.2f}, cp and sync {:.2f}, edgetool {:.2f} GB/s".format(
                    *(size_gb[name] / s for s in seconds)
                )
                print(f"{turn + 1}/{repeat} {name}: {shown}", file=sys.stderr, flush=True)
        return [self._row(name, size_gb[name], costs[name], copies[name], synced[name]) for name in trials]

    def _row(
        self, name: str, size_gb: float, costs: Sequence[Cost], copies: Sequence[Cost], synced: Sequence[float]
    ) -> Measured:
        wall_s = statistics.median(cost.wall_s for cost in costs)
        return Measured(
            row=name,
            input_gb=size_gb,
            wall_s=wall_s,
            gb_per_s=size_gb / wall_s,
            cp_gb_per_s=size_gb / statistics.median(cost.wall_s for cost in copies),
            cp_sync_gb_per_s=size_gb / statistics.median(synced),
            cpu_s=statistics.median(cost.cpu_s for cost in costs),
            cp_cpu_s=statistics.median(cost.cpu_s for cost in copies),
            peak_rss_bytes=max(cost.peak_rss_bytes for cost in costs),
        )

    def timed(self, command: Sequence[str], warm: Sequence[Path] = (), *, keep: bool = False) -> Cost:
        """Time `command` with `warm` in the page cache and nothing waiting to be written.

        The output is removed before, unless `keep`.
        """
        if not keep:
            shutil.rmtree(self.output, ignore_errors=True)
        os.sync()
        for path in warm:
            with path.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
        wait_until_idle(self.idle)
        log = self.work / "log"
        cost = run(command, os.environ, log, TIMEOUT_S)
        if cost.returncode != 0:
            raise SystemExit(f"{shlex.join(command)} ended with {cost.returncode}:\n{log.read_text(errors='replace')}")
        return cost


def wait_until_idle(share: float) -> None:
    """Return once at least `share` of the machine was idle for half a second."""
    while share > 0:
        before = psutil.cpu_times()
        time.sleep(0.5)
        after = psutil.cpu_times()
        total = sum(after) - sum(before)
        if after.idle + after.iowait - before.idle - before.iowait >= share * total:
            return


def add_options(parser: argparse.ArgumentParser, repeat: int) -> None:
    """The options that these benchmarks share."""
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 0.12 GB each (default 8: 1.2 GB in all)")
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument("--idle", type=float, default=0.0, help="wait with each command until this share is idle")
    parser.add_argument("--work", type=Path, help="keep the checkpoint in this directory, on the disk to be measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")


def write_json(options: argparse.Namespace, lines: Sequence[Measured]) -> None:
    """The figures with the conditions they hold under, where --json asks for them."""
    if options.json is None:
        return
    conditions: dict[str, Any] = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    document = {"conditions": conditions, "rows": [asdict(line) for line in lines]}
    options.json.write_text(json.dumps(document, indent=2) + "\n")
