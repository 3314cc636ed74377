"""`edgetool run` as tables: its plan, and what became of its steps."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from edgetool.console import Block, Table, Text
from edgetool.pipeline.report import in_short, without_free_port
from edgetool.pipeline.work import StepResult
from edgetool.progress_lines import duration, size


def plan_blocks(plan: Mapping[str, Any]) -> list[Block]:
    """The plan of all steps, and their command lines."""
    rows = [
        [
            step["name"],
            step["state"],
            _size(step["memory_bytes"]),
            _size(step["disk_bytes"]),
            _size(step["input_bytes"]),
        ]
        for step in plan["steps"]
    ]
    rows.append(["all", "", _size(plan["memory_bytes"]), _size(plan["disk_bytes"]), ""])
    commands = "\n".join(shlex.join(step["command"]) for step in plan["steps"])
    blocks: list[Block] = [
        Table(f"plan of {plan['recipe']} (nothing was written)", rows, ["step", "state", "memory", "disk", "input"]),
        Text("commands", commands),
    ]
    if plan["ladder"]:
        rungs = [", ".join(f"{key} {value}" for key, value in rung.items()) for rung in plan["ladder"]]
        blocks.append(Text("when the gate does not hold", "\n".join(f"{n}. {rung}" for n, rung in enumerate(rungs, 1))))
    return blocks


def result_blocks(found: Mapping[str, Any]) -> list[Block]:
    """One row a step, the rung, and where to look and go on."""
    steps = [step for step in found["steps"] if "command" in step]
    rows = [
        [
            step["name"],
            step["state"],
            "-" if step["seconds"] is None else duration(step["seconds"]),
            in_short(StepResult.from_dict(step)),
        ]
        for step in steps
    ]
    blocks: list[Block] = [Table(found["output"], rows, ["step", "state", "took", "result"])]
    if len(found["attempts"]) > 1:
        tried = [[str(one["rung"]), _changes(one["changes"]), one["reason"] or ""] for one in found["attempts"]]
        blocks.append(Table("ladder", tried, ["rung", "changes", "gate"]))
    told = [f"report: {found['report']}"] if found["report"] else []
    server = found.get("server")
    if server:
        told.append(f"serving at {server['url']}; Ctrl-C stops it")
        if server["api_key"]:
            told.append(f"key, shown once: {server['api_key']}")
    else:
        served = [step for step in steps if step["command"][1].startswith("serve-")]
        told += [f"to serve it: {shlex.join(without_free_port(step['command']))}" for step in served[-1:]]
    return [*blocks, Text("", "\n".join(told))]


def _changes(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "as in the recipe"


def _size(value: int | None) -> str:
    return "-" if not value else size(value)
