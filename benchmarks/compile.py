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
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from beside_cp import COLUMNS, BesideCp, Measured, Trial, add_options, write_json
from convert import FFN, HIDDEN, KEY_VALUE, VOCABULARY, make_checkpoint

ROWS = {
    "sim": ("sim", ("--profile", "sim")),
    "edgellm": ("edgellm, image alone", ("--profile", "edgellm", "--emit", "image")),
    "both": ("edgellm, image and file tree", ("--profile", "edgellm", "--emit", "both")),
    "one-job": ("sim, --jobs 1", ("--profile", "sim", "--jobs", "1")),
    "warm": ("sim again, nothing changed", ("--profile", "sim")),
}


def measure(options: argparse.Namespace, work: Path) -> list[Measured]:
    """All rows, the same checkpoint in each."""
    source = work / f"gptq-{options.layers}"
    if not (source / "config.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(source, options.layers, True)
    files = sorted(source.glob("*.safetensors"))
    beside = BesideCp(work, options.idle)

    def trial(name: str) -> Trial:
        return Trial(files, compile_command(source, beside.output, *ROWS[name][1]), again=name == "warm")

    return beside.measure({name: partial(trial, name) for name in options.rows}, options.repeat)


def compile_command(source: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "edgetool", "compile-vcu128", str(source), "-o", str(output), "--lm-head", "rtn4",
        *options, "--json", "--quiet",
    ]  # fmt: skip


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


def table(lines: Sequence[Measured], options: argparse.Namespace) -> str:
    """A Markdown table, with a caption that says under which conditions it holds."""
    size_gb = lines[0].input_gb
    total_s = weights(options.layers) / reference_weights_per_s()
    text = [
        f"{size_gb:.2f} GB, GPTQ 4 bits, group 128; medians of {options.repeat}, GB of checkpoint a second",
        "",
        f"| what | s | {' | '.join(COLUMNS)} |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    text += ["| " + " | ".join([ROWS[m.row][0], f"{m.wall_s:.2f}", *m.cells()]) + " |" for m in lines]
    empty = " |" * (len(COLUMNS) - 1)
    text.append(f"| reference, weight by weight (scaled) | {total_s:.0f} | {size_gb / total_s:.4f} |{empty}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    add_options(parser, repeat=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetool-bench-") as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        lines = measure(options, work)
    print(table(lines, options))
    write_json(options, lines)


if __name__ == "__main__":
    main()
