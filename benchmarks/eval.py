"""`edgetool eval` beside lm-evaluation-harness' own command line, in turns: the same scores, and what they cost.

    python benchmarks/eval.py MODEL --data-dir DIR [--task arc_easy] [--limit 200] [--rounds 2] [--json table.json]

Both get the same model directory, rows, dtype, batch size and number of threads (one: on a busy machine two spin).
Turns alternate (theirs, ours, ours, theirs, ...), so that a machine that gets slower meets both. edgetool starts each
time with an empty cache. Then what a repeated run costs: answered from its output, and, with another output, from the
answers in the cache. Compare CPU seconds where others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgetool.evaluation.data import examine, local_dataset
from edgetool.evaluation.data_rows import DATASETS
from edgetool.evaluation.tasks import EvalTask, find_tasks
from measure import Cost, run

LIMIT_S = 3600.0


class Both:
    """The two command lines for one task, each in directories of its own below `work`."""

    def __init__(self, model: Path, task: EvalTask, settings: argparse.Namespace, work: Path) -> None:
        self.model, self.task, self.settings, self.work = model, task, settings, work
        found, problems = examine([task], settings.data_dir)
        assert not problems, problems
        self.root = work / "root"
        place = self.root / DATASETS[task.dataset].hub
        place.parent.mkdir(parents=True)
        place.symlink_to(local_dataset(found[task.name], work / "rows").resolve())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGETOOL_", "HF_"))}
        self.environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.count = 0

    def theirs(self) -> tuple[Cost, dict[str, float]]:
        """`python -m lm_eval run`, and its figures."""
        self.count += 1
        out = self.work / f"theirs-{self.count}"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
        command += [
            "--model_args",
            f"pretrained={self.model},dtype={self.settings.dtype}",
            "--tasks",
            self.task.upstream,
        ]
        command += ["--batch_size", str(self.settings.batch_size), "--limit", str(self.settings.limit)]
        command += ["--output_path", str(out)]
        environment = {**self.environment, "HF_HOME": str(self.work / f"hf-{self.count}")}
        cost = self._run(["env", "-C", str(self.root), *command], environment)
        (results,) = out.rglob("results_*.json")
        found = json.loads(results.read_text())["results"][self.task.upstream]
        return cost, {name: value for name, value in found.items() if "," in name and isinstance(value, float)}

    def ours(self, cache: Path | None = None, output: Path | None = None) -> tuple[Cost, dict[str, float]]:
        """`edgetool eval`, and upstream's figures of it; cache and output are its own unless they are given."""
        self.count += 1
        output = output or self.work / f"ours-{self.count}"
        command = [sys.executable, "-m", "edgetool", "eval", str(self.model), "--tasks", self.task.name, "--quiet"]
        command += ["--data-dir", str(self.settings.data_dir), "--limit", str(self.settings.limit), "-o", str(output)]
        command += ["--batch-size", str(self.settings.batch_size), "--dtype", self.settings.dtype, "--device", "cpu"]
        command += ["--cache-dir", str(cache or self.work / f"cache-{self.count}"), "--threads", "1"]
        cost = self._run(command, self.environment)
        found = json.loads((output / "results.json").read_text())["tasks"][self.task.name]
        return cost, found["sides"]["model"]["metrics"]

    def _run(self, command: list[str], environment: dict[str, str]) -> Cost:
        log = self.work / "log"
        cost = run(command, environment, log, LIMIT_S)
        assert cost.returncode == 0, log.read_text(errors="replace")[-3000:]
        return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    settings.data_dir = settings.data_dir.absolute()
    (task,) = find_tasks([settings.task])
    work = Path(tempfile.mkdtemp(prefix="edgetool-eval-"))
    try:
        table = measured(Both(settings.model.absolute(), task, settings, work), settings.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name, row in table["rows"].items():
        print(
            f"{name:28} CPU {row['cpu_s']:7.1f} s   wall {row['wall_s']:7.1f} s   {row['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    print(f"overhead: CPU {table['overhead_cpu']:+.1%}, wall {table['overhead_wall']:+.1%}; scores {table['scores']}")
    if settings.json:
        settings.json.write_text(json.dumps(table, indent=2))


def measured(both: Both, rounds: int) -> dict[str, Any]:
    """Costs by row, medians of the rounds; the figures of both are compared to the last digit."""
    costs: dict[str, list[Cost]] = {"lm_eval run": [], "edgetool eval": []}
    figures: list[dict[str, float]] = []
    for number in range(rounds):
        turns = [("lm_eval run", both.theirs), ("edgetool eval", both.ours)]
        for name, turn in turns if number % 2 == 0 else reversed(turns):
            cost, found = turn()
            costs[name].append(cost)
            figures.append(found)
    shared = [{name: one[name] for name in figures[0] if name in figures[1]} for one in figures]
    equal = all(one == shared[0] for one in shared) and len(shared[0]) > 0
    cache, output = both.work / "again-cache", both.work / "again"
    both.ours(cache, output)
    costs["again, from its output"] = [both.ours(cache, output)[0]]
    costs["again, from the answers"] = [both.ours(cache, both.work / "again-2")[0]]
    rows = {
        name: {
            "cpu_s": statistics.median(cost.cpu_s for cost in found),
            "wall_s": statistics.median(cost.wall_s for cost in found),
            "peak_rss_bytes": max(cost.peak_rss_bytes for cost in found),
        }
        for name, found in costs.items()
    }
    ours, theirs = rows["edgetool eval"], rows["lm_eval run"]
    return {
        "rows": rows,
        "overhead_cpu": ours["cpu_s"] / theirs["cpu_s"] - 1,
        "overhead_wall": ours["wall_s"] / theirs["wall_s"] - 1,
        "scores": "equal in every digit" if equal else f"DIFFER: {shared}",
    }


if __name__ == "__main__":
    main()
