"""`edgetool convert` beside `cp` of the same files, in one run: GB/s of input, CPU seconds, peak memory.

    python benchmarks/convert.py                       # makes a checkpoint of 1.2 GB and prints the table
    python benchmarks/convert.py --rows gptq-awq awq-ct --repeat 5 --json table.json

The checkpoint holds random 4-bit codes in the shape of Qwen2.5-7B, some layers of it, in several shards. Every command
is a child process, and start-up, reading, writing, hashing and flushing count. `cp` stops when the data is in the page
cache; edgetool flushes its files to the disk before it says that they are there, so `cp` with `sync` of its files is
timed too. Rows and copies take turns, files are in the page cache before, and nothing is left to be flushed when one
starts. No test asserts any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beside_cp import COLUMNS, BesideCp, Measured, Trial, add_options, write_json
from edgetool.checkpoints.checkpoint import shard_index, write_index
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorFileWriter

GROUP_SIZE = 128
HIDDEN, FFN, KEY_VALUE = 3584, 18944, 512  # Qwen2.5-7B
VOCABULARY = 32000  # a fifth of its own, so that copied embeddings are a small part
_BLOCK_WORDS = 1 << 22


@dataclass(frozen=True)
class Row:
    """One conversion: from what an earlier row (or the generator) wrote, to a format."""

    source: str
    target: str
    verify: str = "none"


ROWS = {
    "gptq-awq": Row("gptq", "awq"),
    "awq-ct": Row("awq", "compressed-tensors"),
    "gptq-ct": Row("gptq", "compressed-tensors"),
    "gptq-v2": Row("gptq", "gptq_v2"),
    "gptq-awq-all": Row("gptq", "awq", "all"),
    "awq-ct-all": Row("awq", "compressed-tensors", "all"),
    "gptq-fp16": Row("gptq", "fp16"),
}


def linears(layers: int) -> dict[str, tuple[int, int]]:
    """Module -> (out_features, in_features)."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in shapes.items()}


def make_checkpoint(directory: Path, layers: int, sym: bool) -> None:
    """Random codes and scales as GPTQ version 1 stores them. The same arguments give the same bytes."""
    directory.mkdir(parents=True)
    spec = Spec(bits=4, group_size=GROUP_SIZE, sym=sym)
    entries = [("model.embed_tokens.weight", "F16", (VOCABULARY, HIDDEN)), ("model.norm.weight", "F16", (HIDDEN,))]
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            entries.append((f"model.layers.{layer}.{norm}.weight", "F16", (HIDDEN,)))
        for name in ("q_proj", "k_proj", "v_proj"):
            size = HIDDEN if name == "q_proj" else KEY_VALUE
            entries.append((f"model.layers.{layer}.self_attn.{name}.bias", "F16", (size,)))
    for module, (out_features, in_features) in linears(layers).items():
        for suffix, (dtype, shape) in FORMATS["gptq"].layout(out_features, in_features, spec).items():
            entries.append((f"{module}.{suffix}", dtype, shape))
    sizes = {name: int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize for name, dtype, shape in entries}
    by_name = {entry[0]: entry for entry in entries}
    rng = np.random.default_rng(0)
    shards = shard_index(list(sizes.items()), 400_000_000)
    for file_name, names in shards:
        with TensorFileWriter(directory / file_name, [by_name[name] for name in names]) as writer:
            for name in names:
                writer.write(name, values(*by_name[name], rng, sym))
    write_index(directory, shards, sum(sizes.values()))
    quantization = FORMATS["gptq"].quantization_config(spec, ["lm_head"])
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "quantization_config": quantization,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "quantize_config.json").write_text(json.dumps(quantization, indent=2))


def values(
    name: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator, sym: bool
) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's content in flat pieces: any codes, small positive scales, groups in order."""
    count = int(np.prod(shape))
    if name.endswith("g_idx"):
        yield (np.arange(count) // GROUP_SIZE).astype(np.int32)
        return
    for start in range(0, count, _BLOCK_WORDS):
        size = min(_BLOCK_WORDS, count - start)
        if name.endswith("qzeros"):  # stored one less; 7 is the middle
            nibbles = np.full((size, 8), 7, np.uint32) if sym else rng.integers(4, 10, (size, 8), dtype=np.uint32)
            yield (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(axis=1, dtype=np.uint32).view(np.int32)
        elif dtype == "I32":
            yield rng.integers(-(2**31), 2**31, size, dtype=np.int32)
        elif name.endswith("scales"):
            yield rng.uniform(0.001, 0.01, size).astype(np.float16)
        else:
            yield (rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)).astype(np.float16)


class Bench:
    """Checkpoints by format name, and the child processes that are timed on them."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.beside = BesideCp(work, options.idle)
        self.checkpoints = {"gptq": work / f"gptq-{options.layers}-{'sym' if options.sym else 'asym'}"}
        if not (self.checkpoints["gptq"] / "config.json").is_file():
            shutil.rmtree(self.checkpoints["gptq"], ignore_errors=True)
            make_checkpoint(self.checkpoints["gptq"], options.layers, options.sym)

    def measure(self, names: Sequence[str]) -> list[Measured]:
        """The rows of these names."""
        return self.beside.measure({name: partial(self._trial, ROWS[name]) for name in names}, self.options.repeat)

    def _trial(self, row: Row) -> Trial:
        source = self._source_of(row)
        command = self._convert(source, self.beside.output, row.target, row.verify)
        return Trial(sorted(source.glob("*.safetensors")), command)

    def _source_of(self, row: Row) -> Path:
        """The row's input; one that is another row's output is made once and kept."""
        if row.source not in self.checkpoints:
            target = self.work / f"{row.source}-kept"
            shutil.rmtree(target, ignore_errors=True)
            self.beside.timed(self._convert(self.checkpoints["gptq"], target, row.source, "none"))
            self.checkpoints[row.source] = target
        return self.checkpoints[row.source]

    def _convert(self, source: Path, output: Path, target: str, verify: str) -> list[str]:
        return [
            sys.executable, "-m", "edgetool", "convert", str(source), "-o", str(output), "--to", target,
            "--verify", verify, "--threads", str(self.options.threads), "--json", "--quiet",
        ]  # fmt: skip


def table(lines: Sequence[Measured], options: argparse.Namespace) -> str:
    """A Markdown table, with a caption that says under which conditions it holds."""
    kind = "symmetric" if options.sym else "asymmetric"
    text = [
        f"{lines[0].input_gb:.2f} GB, 4 bits, group {GROUP_SIZE}, {kind}; {options.threads} threads; "
        f"medians of {options.repeat}, GB of input a second",
        "",
        f"| conversion | `--verify` | {' | '.join(COLUMNS)} |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for m in lines:
        row = ROWS[m.row]
        text.append("| " + " | ".join([f"{row.source} -> {row.target}", row.verify, *m.cells()]) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=True, help="zeros all in the middle")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add_options(parser, repeat=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetool-bench-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        lines = Bench(options, work.resolve()).measure(options.rows)
    print(table(lines, options))
    write_json(options, lines)


if __name__ == "__main__":
    main()
