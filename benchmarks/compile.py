"""`edgetool compile-vcu128` beside `cp` of the same checkpoint, in one run: GB/s of input, CPU seconds, peak memory.

    python benchmarks/compile.py                       # makes a checkpoint of 1.2 GB and prints the table
    python benchmarks/compile.py --rows sim warm --repeat 5 --json table.json

The checkpoint is that of benchmarks/convert.py: random codes in the shape of Qwen2.5-7B, some layers of it, GPTQ, and a
tied output matrix that `--lm-head rtn4` rounds. Every command is a child process; start-up, hashing of the input and of
the image, and flushing to the disk count. Rows and copies take turns, with the files in the page cache and nothing left
to be flushed. `warm` is the same command again, when the image is there and nothing has changed. `reference` packs one
matrix weight by weight in plain Python, and is scaled to the whole. No test asserts any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from convert import FFN, HIDDEN, KEY_VALUE, VOCABULARY, make_checkpoint
from measure import Cost, run

TIMEOUT_S = 1800.0
ROWS = {
    "sim": ("sim", ("--profile", "sim")),
    "edgellm": ("edgellm, image alone", ("--profile", "edgellm", "--emit", "image")),
    "both": ("edgellm, image and file tree", ("--profile", "edgellm", "--emit", "both")),
    "one-job": ("sim, --jobs 1", ("--profile", "sim", "--jobs", "1")),
    "warm": ("sim again, nothing changed", ("--profile", "sim")),
}


@dataclass
class Measured:
    """A finished line: medians over the repetitions."""

    row: str
    wall_s: float
    gb_per_s: float
    cp_gb_per_s: float
    cp_sync_gb_per_s: float
    cp_cpu_s: float
    cpu_s: float
    peak_rss_bytes: int


def measure(options: argparse.Namespace, work: Path) -> tuple[float, list[Measured]]:
    """Input size in GB, and all rows, `repeat` times in turn, each between two copies of the same files."""
    source = work / f"gptq-{options.layers}"
    if not (source / "config.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(source, options.layers, True)
    files = sorted(source.glob("*.safetensors"))
    size_gb = sum(path.stat().st_size for path in files) / 1e9
    copies: dict[str, list[Cost]] = {name: [] for name in options.rows}
    synced: dict[str, list[float]] = {name: [] for name in options.rows}
    costs: dict[str, list[Cost]] = {name: [] for name in options.rows}
    output = work / "output"
    copy = f"mkdir {shlex.quote(str(output))} && cp {shlex.join(map(str, files))} {shlex.quote(str(output))}"
    for turn in range(options.repeat):
        for name in options.rows:
            copies[name].append(timed(["bash", "-c", copy], files, output, work))
            sync = f"{copy} && sync {shlex.quote(str(output))}/*"
            synced[name].append(timed(["bash", "-c", sync], files, output, work).wall_s)
            command = compile_command(source, output, *ROWS[name][1])
            cost = timed(command, files, output, work)
            if name == "warm":
                cost = timed(command, files, None, work)
            costs[name].append(cost)
            speeds = [size_gb / seconds for seconds in (copies[name][-1].wall_s, synced[name][-1], cost.wall_s)]
            shown = "cp {:.2f}, cp and sync {:.2f}, edgetool {:.2f} GB/s".format(*speeds)
            print(f"{turn + 1}/{options.repeat} {name}: {shown}", file=sys.stderr, flush=True)
    lines = []
    for name in options.rows:
        wall_s = statistics.median(cost.wall_s for cost in costs[name])
        lines.append(
            Measured(
                row=ROWS[name][0],
                wall_s=wall_s,
                gb_per_s=size_gb / wall_s,
                cp_gb_per_s=size_gb / statistics.median(cost.wall_s for cost in copies[name]),
                cp_sync_gb_per_s=size_gb / statistics.median(synced[name]),
                cp_cpu_s=statistics.median(cost.cpu_s for cost in copies[name]),
                cpu_s=statistics.median(cost.cpu_s for cost in costs[name]),
                peak_rss_bytes=max(cost.peak_rss_bytes for cost in costs[name]),
            )
        )
    return size_gb, lines


def compile_command(source: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "edgetool", "compile-vcu128", str(source), "-o", str(output), "--lm-head", "rtn4",
        *options, "--json", "--quiet",
    ]  # fmt: skip


def timed(command: list[str], warm: Sequence[Path], output: Path | None, work: Path) -> Cost:
    """Time `command` with `warm` in the page cache and nothing waiting to be written; `output` is removed before."""
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for path in warm:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    log = work / "log"
    cost = run(command, os.environ, log, TIMEOUT_S)
    if cost.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {cost.returncode}:\n{log.read_text(errors='replace')}")
    return cost


def reference_weights_per_s(n: int = 64, k: int = 3584) -> float:
    """Weights a second of a packer that follows the formulas with plain loops over elements."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (n, k)).tolist()
    scales = rng.normal(0, 1, (n, k // 128)).astype(np.float16)
    started = time.perf_counter()
    row_bytes = k // 2 + 32 * -(-k // 2048)
    ports = [bytearray(-(-n // 32) * row_bytes) for _ in range(32)]
    for row in range(n):
        port, base = ports[row % 32], row // 32 * row_bytes
        for column in range(k):
            start = base + column // 2048 * 1056
            at = start + 2 * (column % 2048 // 128)
            if column % 128 == 0:
                port[at : at + 2] = scales[row, column // 128].tobytes()
            at = start + 32 + column % 2048 // 2
            port[at] |= (codes[row][column] - 8 & 15) << 4 * (column % 2)
    return n * k / (time.perf_counter() - started)


def weights(layers: int) -> int:
    """4-bit weights of the checkpoint's image."""
    layer = HIDDEN * (2 * HIDDEN + 2 * KEY_VALUE + 3 * FFN)
    return layers * layer + VOCABULARY * HIDDEN


def table(lines: Sequence[Measured], size_gb: float, options: argparse.Namespace) -> str:
    """A Markdown table, with a caption that says under which conditions it holds."""
    slow = reference_weights_per_s()
    total_s = weights(options.layers) / slow
    text = [
        f"{size_gb:.2f} GB, GPTQ 4 bits, group 128; medians of {options.repeat}, GB of checkpoint a second",
        "",
        "| what | s | GB/s | `cp` | of `cp` | `cp`, `sync` | of that | CPU s | of `cp` | peak RSS, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for m in lines:
        cells = [
            m.row,
            f"{m.wall_s:.2f}",
            f"{m.gb_per_s:.2f}",
            f"{m.cp_gb_per_s:.2f}",
            f"{m.gb_per_s / m.cp_gb_per_s:.2f}",
            f"{m.cp_sync_gb_per_s:.2f}",
            f"{m.gb_per_s / m.cp_sync_gb_per_s:.2f}",
            f"{m.cpu_s:.2f}",
            f"{m.cp_cpu_s:.2f}",
            f"{m.peak_rss_bytes / 1e9:.2f}",
        ]
        text.append("| " + " | ".join(cells) + " |")
    text.append(f"| reference, weight by weight (scaled) | {total_s:.0f} | {size_gb / total_s:.4f} | | | | | | | |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 0.12 GB each (default 8: 1.2 GB in all)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the checkpoint in this directory, on the disk to be measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetool-bench-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        size_gb, lines = measure(options, work)
    print(table(lines, size_gb, options))
    if options.json:
        conditions = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        document = {"conditions": conditions, "input_gb": size_gb, "rows": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
