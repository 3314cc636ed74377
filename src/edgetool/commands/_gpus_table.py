"""What `edgetool gpus` shows, as tables for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from edgetool.console import Block, Output, Table, Text
from edgetool.progress_lines import duration
from edgetool.scheduler.lease_records import Entry
from edgetool.scheduler.leasing import Scheduler
from edgetool.scheduler.look import Look
from edgetool.scheduler.placement import Request, gib


def watch_until_stopped(scheduler: Scheduler, interval_s: float, output: Output) -> None:
    """Show the tables again and again; Ctrl-C is the way to end it."""
    from edgetool.errors import ConfigError

    if output.json:
        raise ConfigError("--watch shows tables, and --json is one document", "call edgetool gpus --json repeatedly")
    try:
        while True:
            shown = blocks(scheduler.look())
            output.clear()
            output.result({}, shown)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def blocks(look: Look) -> list[Block]:
    """GPUs, processes on them, leases, and who waits; what is empty is left out."""
    document = look.document()
    shown: list[Block] = []
    if document["gpus"]:
        shown.append(_gpus(document["gpus"], document["driver_version"]))
    elif document["driver_version"] is None:
        shown.append(Text("GPUs", "No NVIDIA driver. Ports and boards can be leased, and jobs run on the CPU."))
    else:
        shown.append(Text("GPUs", f"None, with driver {document['driver_version']}."))
    shown += _processes(document["gpus"])
    shown += _leases(look, document)
    shown += _waiting(look.scan.waiting)
    return shown


def _gpus(gpus: Sequence[dict[str, Any]], driver: str | None) -> Table:
    rows = []
    for gpu in gpus:
        note = gpu["error"] or ("MIG: lease its instances" if gpu["mig"] else "")
        use = gpu["utilization_percent"]
        rows.append(
            [
                str(gpu["index"]),
                gpu["class"],
                *_memory(gpu),
                "-" if use is None else f"{use} %",
                gpu["uuid"] or "-",
                note,
            ]
        )
        rows += [["", f"{gpu['class']}-MIG", *_memory(part), "", part["uuid"], ""] for part in gpu["mig"]]
    headers = ["GPU", "class", "total", "used", "reserved", "free", "busy", "UUID", ""]
    return Table(f"GPUs (driver {driver})" if driver else "GPUs", rows, headers)


def _memory(device: dict[str, Any]) -> list[str]:
    return [gib(device[f"memory_{kind}_bytes"]) for kind in ("total", "used", "reserved", "free")]


def _processes(gpus: Sequence[dict[str, Any]]) -> list[Block]:
    rows = [
        [
            str(gpu["index"]),
            str(process["pid"]),
            process["user"] or "-",
            process["class"],
            "-" if process["used_memory_bytes"] is None else gib(process["used_memory_bytes"]),
            _short(process["command"]),
        ]
        for gpu in gpus
        for process in gpu["processes"]
    ]
    return [Table("Processes", rows, ["GPU", "pid", "user", "class", "GPU memory", "command"])] if rows else []


def _leases(look: Look, document: dict[str, Any]) -> list[Block]:
    numbers = {unit.uuid: str(unit.index) for unit in look.units}
    listening = {port["port"] for port in document["ports"] if port["listening"]}
    rows = []
    for entry in look.held:
        record = entry.record
        indices = sorted({numbers.get(share.uuid, "?") for share in record.gpus})
        things = [f"GPU {', '.join(indices)}"] if indices else []
        if record.gpus:
            things.append("exclusive" if record.exclusive else f"{gib(record.gpus[0].memory_bytes)} each")
        things += [f"port {port}{'' if port in listening else ' (nobody listens)'}" for port in record.ports]
        things += [f"board {record.board}"] if record.board else []
        state = "orphaned" if entry.orphaned else "held"
        rows.append(
            [
                record.id,
                entry.user,
                str(record.pid),
                state,
                ", ".join(things) or "-",
                _age(entry),
                _short(record.command),
            ]
        )
    headers = ["lease", "user", "pid", "state", "resources", "age", "command"]
    return [Table("Leases", rows, headers)] if rows else []


def _waiting(waiting: Sequence[Entry]) -> list[Block]:
    rows = [
        [
            str(place),
            entry.user,
            str(entry.record.pid),
            str(Request.from_dict(entry.record.wanted) or "-"),
            _age(entry),
            _short(entry.record.command),
        ]
        for place, entry in enumerate(waiting, 1)
    ]
    return [Table("Waiting", rows, ["place", "user", "pid", "for", "age", "command"])] if rows else []


def _age(entry: Entry) -> str:
    return duration(max(0.0, time.time() - entry.record.since_unix_s))


def _short(command: str | None) -> str:
    command = command or "-"
    return command if len(command) <= 60 else command[:57] + "..."
