"""`edgetool convert` from a resolved configuration to a published checkpoint."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import OutputDirectory, disk_errors, write_manifest
from edgetool.config import CONVERT_TARGETS, CommonConfig, ConvertConfig
from edgetool.converter.config_repair import repair, write_new_config
from edgetool.converter.floats import DTYPE_OF
from edgetool.converter.opening import Opened, open_source, planned, prepared
from edgetool.converter.plan import Plan
from edgetool.converter.report import facts, plan_facts, spec_facts
from edgetool.converter.verify import Meant, Verified, open_side, verify
from edgetool.converter.write import Abandoned, cut, write_weights
from edgetool.errors import BadInput, EdgetoolError, ResourceUnavailable, Stopped, UsageError
from edgetool.ledger import RunLedger, count_records
from edgetool.progress import Progress
from edgetool.runs import FileHashes, free_disk_bytes, memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

RECORD_SCHEMA = "edgetool.convert-record/1"
_MOST_THREADS = 8  # moving words is a matter of memory and disk, and each thread keeps some memory
LEDGER_NAME = "ledger.jsonl"

_NOT_IDENTITY = {"source", "output", "verify", "resume", "overwrite", "dry_run", "revision", "threads"}
"""Settings that do not decide what is written; the source counts by its files."""


def run_convert(config: ConvertConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Convert `config.source` into `config.output`, or repair its config.json.

    Returns the result document, or {"plan": ...} for a dry run. Raises any EdgetoolError, with what is known of the
    conversion in its details; nothing appears at the output's place unless everything was written and verified.
    """
    started = time.monotonic()
    known: dict[str, Any] = {
        "source_format": None,
        "format": config.to,
        "tensors_compared": 0,
        "tensors_equal": 0,
        "refused": [],
    }
    with _in_details(known):
        return _repaired(config, started) if config.fix_config else _converted(config, common, progress, started, known)


def _converted(
    config: ConvertConfig, common: CommonConfig, progress: Progress, started: float, known: dict[str, Any]
) -> dict[str, Any]:
    if config.to is None:
        raise UsageError(f"convert needs --to FORMAT: {', '.join(CONVERT_TARGETS)}", "edgetool convert --help")
    if config.output is None:
        raise UsageError("convert needs --output", "edgetool convert --help")
    out = OutputDirectory(config.output, config.overwrite, config.resume)
    out.check()  # before a model is fetched for nothing
    source, resolved = open_source(config, common, progress)
    refuse_overlap(out, [Path(config.source), resolved.path])
    opened = prepared(source, resolved, config)
    known |= {"source_format": source.format, "disagreements": list(source.disagreements), **opened.facts}
    for note in source.disagreements:
        progress.warn(note)
    opened, plan = planned(config, opened, _threads(config), progress)
    if config.dry_run:
        return {"plan": {**facts(config, opened, plan), **plan_facts(config, plan)}}
    there = sum(path.stat().st_size for path in out.partial.glob("*")) if out.resuming else 0
    free_disk_bytes(out.output, plan.output_bytes - there, "converting")
    return _Run(config, opened, plan, out, progress, started).document()


def _threads(config: ConvertConfig) -> int:
    return config.threads or min(len(os.sched_getaffinity(0)), _MOST_THREADS)


@dataclass(frozen=True)
class _Run:
    """One run, up to a published checkpoint."""

    config: ConvertConfig
    opened: Opened
    plan: Plan
    out: OutputDirectory
    progress: Progress
    started: float

    def document(self) -> dict[str, Any]:
        """Do everything; returns the result."""
        with self.out:
            ledger = self._ledger()
            if self.opened.requantized is not None:
                for record in ledger.having("requantized"):
                    self.opened.requantized.restore(record["requantized"])
            with _kept_only_if_useful(self.out), stop_requests() as stop, FileHashes(_threads(self.config)) as hashes:
                return self._finished(ledger, stop, hashes)

    def _ledger(self) -> RunLedger:
        fresh = not any(self.out.partial.iterdir())
        try:
            with disk_errors(self.out.partial):
                return RunLedger.open(self.out.partial / LEDGER_NAME, self._identity())
        except BaseException:
            if fresh:  # else it is another run's, which may still be gone on with
                self.out.discard()
            raise

    def _finished(self, ledger: RunLedger, stop: threading.Event, hashes: FileHashes) -> dict[str, Any]:
        source, resolved, rounded = self.opened.source, self.opened.resolved, self.opened.requantized
        for path in source.files:
            hashes.add(path)
        self._write(ledger, stop, hashes)
        verified = self._verify(stop)
        result = self._result(verified)
        manifest = {
            "schema": RECORD_SCHEMA,
            "result": result,
            "source": {
                "spec": resolved.spec,
                "provenance": resolved.provenance,
                "sha256": hashes.of(source.files),
            },
            "config": json.loads(self.config.model_dump_json()),
            "tools": tool_versions("numpy"),
            "verified": {"linears": self.config.verify, **asdict(verified)},
            "requantized": {name: error.to_dict() for name, error in rounded.errors.items()} if rounded else {},
            "files": hashes.of(self._weight_files()),
        }
        with disk_errors(self.out.partial):
            write_manifest(self.out.partial, manifest)
        self.out.publish()
        # last, so that a run that was killed while everything was flushed to the disk finds its shards
        (self.out.output / LEDGER_NAME).unlink()
        return result

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with one that it goes on with. Times stand for content until verification."""
        source = self.opened.source
        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files}
        config = json.loads(self.config.model_dump_json(exclude=_NOT_IDENTITY))
        return {"source": files, "source_format": source.format, "config": config, "edgetool": __version__}

    def _weight_files(self) -> list[Path]:
        return sorted([*self.out.partial.glob("*.safetensors"), *self.out.partial.glob("*.gguf")])

    def _write(self, ledger: RunLedger, stop: threading.Event, hashes: FileHashes) -> None:
        source, directory = self.opened.source, self.out.partial
        if self.plan.gguf is not None:
            from edgetool.converter.gguf_target import FILE_NAME, write_gguf

            write_gguf(
                source,
                self.plan.gguf,
                directory / FILE_NAME,
                threads=_threads(self.config),
                progress=self.progress,
                stop_requested=stop.is_set,
            )
            hashes.add(directory / FILE_NAME)
            return
        shards = cut(self.plan, self.config.max_shard_size_bytes)
        try:
            write_weights(
                source,
                self.plan,
                shards,
                directory,
                ledger,
                threads=_threads(self.config),
                stop_requested=stop.is_set,
                written=hashes.add,
                remembered=self._remembered,
                progress=self.progress,
            )
        except Abandoned:
            done = len(ledger.having("shard"))
            raise Stopped(f"stopped on request after {done} of {len(shards)} weight files") from None
        source.write_side_files(directory)
        write_new_config(source, self.plan, directory)

    def _remembered(self, names: Sequence[str]) -> dict[str, Any]:
        rounded = self.opened.requantized
        return {} if rounded is None else {"requantized": rounded.state(names)}

    def _verify(self, stop: threading.Event) -> Verified:
        if stop.is_set():
            raise Stopped("stopped on request: everything is written and not yet verified")
        if self.config.verify == "none":
            return Verified(0, 0)
        opened, target = self.opened, self.plan.target
        made = {name: (layout.bits, layout.group_size) for name, layout in opened.source.layouts.items()}
        return verify(
            open_side(opened.resolved.path, opened.source.format, opened.layouts, DTYPE_OF.get(target, "F16")),
            self.out.partial,
            Meant(
                target,
                made if self.plan.spec else {},
                order=opened.order,
                crc32=opened.requantized.crc32 if opened.requantized else {},
                rounding=self.config.requant,
            ),
            sample=self.config.verify == "sample",
            threads=_threads(self.config),
            stop_requested=stop.is_set,
            progress=self.progress,
        )

    def _result(self, verified: Verified) -> dict[str, Any]:
        rounded = self.opened.requantized
        return {
            **facts(self.config, self.opened, self.plan),
            **({"requantized": rounded.report()} if rounded else {}),
            "output": str(self.config.output),
            "tensors_compared": verified.compared,
            "tensors_equal": verified.equal,
            "verify": self.config.verify,
            "seconds": round(time.monotonic() - self.started, 3),
            "source_bytes": sum(path.stat().st_size for path in self.opened.source.files),
            "output_bytes": sum(path.stat().st_size for path in self._weight_files()),
            "peak_rss_bytes": memory_peak_bytes(),
        }


@contextmanager
def _kept_only_if_useful(out: OutputDirectory) -> Iterator[None]:
    """Remove the partial directory of a run that fails, unless finished shards in it can be gone on with.

    That is so when it was stopped, or the machine had too little of something; not when input or output is wrong.
    """
    try:
        yield
    except BaseException as error:
        resumable = isinstance(error, ResourceUnavailable | Stopped) or not isinstance(error, Exception)
        if not resumable or not count_records(out.partial / LEDGER_NAME, "shard"):
            out.discard()
        raise


@contextmanager
def _in_details(details: dict[str, Any]) -> Iterator[None]:
    """Put `details` into the failure document of whatever fails; what the error itself says goes first."""
    try:
        yield
    except EdgetoolError as error:
        error.details = {**details, **error.details}
        raise


def _repaired(config: ConvertConfig, started: float) -> dict[str, Any]:
    """Repair the configuration of the checkpoint directory `config.source` in place."""
    path = Path(config.source).expanduser()
    if not path.is_dir() or config.source == "demo":
        raise BadInput(
            f"--fix-config repairs a checkpoint directory in place, and {config.source} is none",
            "give the path of a checkpoint directory",
        )
    source, fixed = repair(path, config.source_format)
    return {
        "source": config.source,
        "source_format": source.format,
        "format": source.format,
        "output": config.source,
        **spec_facts(source.spec),
        "quantized_modules": len(source.layouts),
        "tensors_compared": 0,
        "tensors_equal": 0,
        "refused": [],
        "disagreements": list(source.disagreements),
        "fixed": fixed,
        "seconds": round(time.monotonic() - started, 3),
    }
