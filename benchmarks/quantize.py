"""One table, in one run: edgetool's quantisers beside gptqmodel's and llmcompressor's, same model, same calibration.

    python benchmarks/quantize.py                          # every row whose environment exists
    python benchmarks/quantize.py --rows fp32 edgetool-gptq gptqmodel-gptq --json table.json
    python benchmarks/quantize.py --list

The peers live in environments of their own (`edgetool envs install gptqmodel`, `... llmcompressor`). All get the
same calibration token ids: edgetool's own choice from `--calib`, handed to the peers, and edgetool's record of what it
used is held against them afterwards. Each tool runs alone as a child process whose whole tree is measured (measure.py).
What each wrote is then judged by one evaluator (evaluate.py) on text that none has seen. No test asserts any of this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from edgetool.backends.environments import look, recipe_of
from edgetool.config import load
from edgetool.quantizers.calibration import calibration_from, texts_of
from measure import run

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
TIMEOUT_S = 3 * 3600.0


@dataclass(frozen=True)
class Row:
    """One line of the table. `environment` is None for edgetool itself and for the unquantised model."""

    title: str
    environment: str | None
    script: str | None
    method: str
    sym: bool = True
    options: tuple[str, ...] = ()


PLAIN = ("--scale-search", "minmax", "--shrinkage", "0", "--no-awq-scaling", "--no-asymmetric-calibration")
ROWS: dict[str, Row] = {
    "fp32": Row("unquantised", None, None, "none"),
    "edgetool-gptq": Row("edgetool GPTQ (default)", None, "edgetool", "gptq"),
    "edgetool-gptq-plain": Row("edgetool GPTQ, plain", None, "edgetool", "gptq", options=PLAIN),
    "edgetool-gptq-asym": Row("edgetool GPTQ, asym", None, "edgetool", "gptq", sym=False),
    "edgetool-awq": Row("edgetool AWQ, asym", None, "edgetool", "awq", sym=False),
    "edgetool-rtn": Row("edgetool RTN", None, "edgetool", "rtn"),
    "gptqmodel-gptq": Row("gptqmodel GPTQ", "gptqmodel", "gptqmodel_gptq.py", "gptq"),
    "llmcompressor-gptq": Row("llmcompressor GPTQ", "llmcompressor", "llmcompressor_oneshot.py", "gptq"),
    "llmcompressor-awq": Row("llmcompressor AWQ, asym", "llmcompressor", "llmcompressor_oneshot.py", "awq", sym=False),
}


@dataclass
class Measured:
    """A finished line. size_bytes counts the weight files alone."""

    row: str
    title: str
    version: str
    perplexity: float | None
    size_bytes: int
    cpu_s: float | None = None
    wall_s: float | None = None
    peak_rss_bytes: int | None = None


def interpreter(environment: str) -> Path | None:
    """The environment's Python, where `edgetool envs list` calls it ready."""
    there = look(recipe_of(environment), load("envs", {}).envs)
    return there.python if there.state == "ready" else None


class Bench:
    """One run of the table: the job every tool gets and the place where they work."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.model = resolve_model(options.model)
        self.tokens = work / "calibration.tokens.json"
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        texts = texts_of(options.calib, options.calib_column, offline=True)
        self.calibration = calibration_from(
            texts,
            tokenizer,
            source=options.calib,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
        )
        self.tokens.write_text(json.dumps(self.calibration.token_ids.tolist()))

    def measure(self, name: str) -> Measured:
        row = ROWS[name]
        if row.script is None:
            return Measured(name, row.title, "", self._perplexity(self.model), _weight_bytes(self.model))
        output = self.work / name
        log = self.work / f"{name}.log"
        build: Callable[[Row, Path], list[str]] = self._edgetool if row.script == "edgetool" else self._peer
        for _ in range(2 if self.options.warm_up else 1):
            shutil.rmtree(output, ignore_errors=True)
            cost = run(build(row, output), self._environment(), log, TIMEOUT_S)
            if cost.returncode != 0:
                raise SystemExit(f"{row.title} ended with {cost.returncode}; its log: {log}\n{_tail(log)}")
        if row.script == "edgetool" and row.method != "rtn":
            self._check_calibration(output)
        version = _version(row, output, log)
        return Measured(
            name,
            row.title,
            version,
            self._perplexity(output),
            _weight_bytes(output),
            cost.cpu_s,
            cost.wall_s,
            cost.peak_rss_bytes,
        )

    def _check_calibration(self, output: Path) -> None:
        if self.calibration.sha256 not in (output / "edgetool.json").read_text():
            raise SystemExit(f"{output.name}: edgetool did not calibrate with the token ids that the peers get")

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("EDGETOOL_")}
        return {
            **kept,
            "OMP_NUM_THREADS": str(self.options.threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def _edgetool(self, row: Row, output: Path) -> list[str]:
        o = self.options
        return [
            sys.executable, "-m", "edgetool", "quantize", str(self.model), "-o", str(output), "--method", row.method,
            "--bits", str(o.bits), "--group-size", str(o.group_size), "--sym" if row.sym else "--asym",
            "--calib", o.calib, *(["--calib-column", o.calib_column] if o.calib_column else []), "--seed", str(o.seed),
            "--calib-samples", str(o.samples), "--calib-seqlen", str(o.seqlen),
            "--threads", str(o.threads), "--device", "cpu", "--json", *row.options,
        ]  # fmt: skip

    def _peer(self, row: Row, output: Path) -> list[str]:
        assert row.environment is not None and row.script is not None
        scratch = self.work / "scratch"
        scratch.mkdir(exist_ok=True)
        job = self.work / f"{output.name}.job.json"
        job.write_text(
            json.dumps(
                {
                    "model": str(self.model),
                    "output": str(output),
                    "scratch": str(scratch),
                    "tokens": str(self.tokens),
                    "method": row.method,
                    "bits": self.options.bits,
                    "group_size": self.options.group_size,
                    "sym": row.sym,
                    "threads": self.options.threads,
                    "dtype": self.options.peer_dtype,
                }
            )
        )
        return [str(interpreter(row.environment)), str(HERE / "peers" / row.script), str(job)]

    def _perplexity(self, checkpoint: Path) -> float | None:
        o = self.options
        if o.text is None:
            return None
        log = self.work / f"{checkpoint.name}.perplexity.log"
        command = [
            sys.executable, str(HERE / "evaluate.py"), str(checkpoint), "--text", str(o.text),
            "--context", str(o.context), "--tokens", str(o.tokens), "--tokenizer", str(self.model),
            "--threads", str(o.threads),
        ]  # fmt: skip
        cost = run(command, self._environment(), log, TIMEOUT_S)
        if cost.returncode != 0:
            raise SystemExit(f"the evaluator failed on {checkpoint}\n{_tail(log)}")
        return float(_last_json(log)["perplexity"])


def resolve_model(spec: str) -> Path:
    """The directory of a model that edgetool names, e.g. `demo`, so that the peers can open it too."""
    from edgetool.checkpoints.sources import resolve
    from edgetool.config import load

    config = load("inspect", {}, complete=False)
    return resolve(spec, cache_dir=config.common.cache_dir).path


def default_text() -> Path | None:
    """The held-out text: wikitext-2-raw's test part, from $EDGETOOL_DATA_DIR or ../shared/data."""
    root = Path(os.environ.get("EDGETOOL_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    path = root / "text" / "wikitext-2-raw.test.txt"
    return path if path.is_file() else None


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-15:])


def _last_json(log: Path) -> dict[str, Any]:
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("{"):
            document: dict[str, Any] = json.loads(line)
            return document
    raise SystemExit(f"no result in {log}")


def _version(row: Row, output: Path, log: Path) -> str:
    if row.script == "edgetool":
        from edgetool import __version__

        return __version__
    return str(_last_json(log)["version"])


def table(lines: list[Measured], options: argparse.Namespace) -> str:
    """A Markdown table, with a caption that says under which conditions it holds."""

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    text = [
        f"{options.bits} bit, group {options.group_size}, {options.samples} x {options.seqlen} calibration tokens, "
        f"{options.threads} threads; perplexity on the first {options.tokens} tokens of "
        f"{options.text.name if options.text else '(no text)'}, windows of {options.context}",
        "",
        "| tool | version | perplexity | CPU s | wall s | peak RSS, GB | weights, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for m in lines:
        cells = [
            m.title,
            m.version,
            cell(m.perplexity, ".2f"),
            cell(m.cpu_s, ".0f"),
            cell(m.wall_s, ".0f"),
            cell(m.peak_rss_bytes, ".2f", 1e9),
            cell(m.size_bytes, ".1f", 1e6),
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="name the rows and whether they can run here")
    parser.add_argument("--model", default="demo", help="anything `edgetool quantize` takes")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calib", default="builtin", help="as in `edgetool quantize`: builtin or a file")
    parser.add_argument("--calib-column")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=default_text(), help="held-out text for the perplexity")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of it, from its beginning")
    parser.add_argument("--context", type=int, default=512, help="tokens a window, windows do not overlap")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-dtype", default="float32", choices=["float32", "bfloat16"], help="of llmcompressor")
    parser.add_argument(
        "--warm-up", action="store_true", help="run each tool twice, count the second (caches are warm)"
    )
    parser.add_argument("--work", type=Path, help="keep everything in this directory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def runnable(name: str) -> bool:
    environment = ROWS[name].environment
    return environment is None or interpreter(environment) is not None


def main() -> None:
    options = parse()
    if options.list:
        for name, row in ROWS.items():
            hint = "" if runnable(name) else f"   (edgetool envs install {row.environment})"
            print(f"{name:22} {row.title}{hint}")
        return
    lines: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="edgetool-bench-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work.resolve())
        for name in options.rows:
            if not runnable(name):
                print(
                    f"{name}: left out, no environment (edgetool envs install {ROWS[name].environment})",
                    file=sys.stderr,
                )
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            lines.append(bench.measure(name))
            print(f"  {lines[-1]}", file=sys.stderr, flush=True)
    print(table(lines, options))
    if options.json:
        conditions = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        document = {"conditions": conditions, "rows": [asdict(line) for line in lines]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
