"""`edgetool convert` from a resolved configuration to a published checkpoint."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetool import __version__
from edgetool.artifacts import OutputDirectory, disk_errors, sha256_file, write_manifest
from edgetool.checkpoints.sources import ResolvedSource, resolve
from edgetool.config import CONVERT_TARGETS, CommonConfig, ConvertConfig
from edgetool.converter.config_repair import repair, write_new_config
from edgetool.converter.floats import DTYPE_OF
from edgetool.converter.plan import Plan, make_plan
from edgetool.converter.source import CheckpointSource, Source
from edgetool.converter.verify import Meant, Verified, open_side, verify
from edgetool.converter.write import Abandoned, cut, write_weights
from edgetool.errors import BadInput, EdgetoolError, ResourceUnavailable, Stopped, UsageError
from edgetool.ledger import RunLedger, count_records
from edgetool.progress import Progress
from edgetool.runs import memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

SCHEMA = "edgetool.convert/1"
LEDGER_NAME = "ledger.jsonl"

_NOT_IDENTITY = {"source", "output", "verify", "resume", "overwrite", "dry_run", "revision", "threads"}
"""Settings that do not decide what is written; the source counts by its files."""


def run_convert(config: ConvertConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Convert `config.source` into `config.output`, or repair its config.json.

    Returns the result document, or {"plan": ...} for a dry run. Raises any EdgetoolError, with what is known of the
    conversion in its details; nothing appears at the output's place unless everything was written and verified.
    """
    started = time.monotonic()
    if config.fix_config:
        return _fixed(config, started)
    if config.to is None:
        raise UsageError(f"convert needs --to FORMAT: {', '.join(CONVERT_TARGETS)}", "edgetool convert --help")
    if config.output is None:
        raise UsageError("convert needs --output", "edgetool convert --help")
    out = OutputDirectory(config.output, config.overwrite, config.resume)
    out.check()  # before a model is fetched for nothing
    source, resolved = open_source(config, common, progress)
    refuse_overlap(out, [Path(config.source), resolved.path])
    known = {"source_format": source.format, "format": config.to, "disagreements": list(source.disagreements)}
    with _with_details({**known, "tensors_compared": 0, "tensors_equal": 0, "refused": []}):
        for note in source.disagreements:
            progress.warn(note)
        plan = make_plan(
            source, config.to, sym=config.sym, rounding=config.requant, threads=_threads(config), progress=progress
        )
        if config.dry_run:
            return {"plan": _plan_document(config, source, plan)}
        return _Run(config, source, resolved, plan, out, progress, started).document()


def open_source(config: ConvertConfig, common: CommonConfig, progress: Progress) -> tuple[Source, ResolvedSource]:
    """The model that `config.source` names; a GGUF file is opened as it is, not imported."""
    path = Path(config.source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        from edgetool.converter.gguf_source import GgufSource

        if config.source_format not in ("auto", "gguf"):
            raise BadInput(f"{path} is a GGUF file, not {config.source_format}", "leave --from out")
        dtype = DTYPE_OF.get(config.to or "", "F16")
        return GgufSource.open(path, dtype), ResolvedSource(path, config.source, {"kind": "gguf", "file": path.name})
    resolved = resolve(
        config.source,
        cache_dir=common.cache_dir,
        offline=common.offline,
        revision=config.revision,
        token=common.token(),
        progress=progress,
    )
    return CheckpointSource.open(resolved.path, config.source_format), resolved


def _threads(config: ConvertConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Run:
    """One run, up to a published checkpoint."""

    config: ConvertConfig
    source: Source
    resolved: ResolvedSource
    plan: Plan
    out: OutputDirectory
    progress: Progress
    started: float

    def document(self) -> dict[str, Any]:
        """Do everything; returns the result."""
        with self.out:
            with disk_errors(self.out.partial):
                ledger = RunLedger.open(self.out.partial / LEDGER_NAME, self._identity())
            with _kept_only_if_useful(self.out), stop_requests() as stop, _Hashes() as hashes:
                return self._finished(ledger, stop, hashes)

    def _finished(self, ledger: RunLedger, stop: threading.Event, hashes: _Hashes) -> dict[str, Any]:
        for path in self.source.files:
            hashes.add(path)
        self._write(ledger, stop, hashes)
        verified = self._verify(stop)
        result = self._result(verified)
        manifest = {
            "schema": SCHEMA,
            "result": result,
            "source": {
                "spec": self.resolved.spec,
                "provenance": self.resolved.provenance,
                "sha256": hashes.of(self.source.files),
            },
            "config": json.loads(self.config.model_dump_json()),
            "tools": tool_versions("numpy"),
            "verified": {"linears": self.config.verify, **asdict(verified)},
            "files": hashes.of(sorted(self.out.partial.glob("*.safetensors"))),
        }
        with disk_errors(self.out.partial):
            write_manifest(self.out.partial, manifest)
        self.out.publish()
        # last, so that a run that was killed while everything was flushed to the disk finds its shards
        (self.out.output / LEDGER_NAME).unlink()
        return result

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with one that it goes on with. Times stand for content until verification."""
        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self.source.files}
        config = json.loads(self.config.model_dump_json(exclude=_NOT_IDENTITY))
        return {"source": files, "source_format": self.source.format, "config": config, "edgetool": __version__}

    def _write(self, ledger: RunLedger, stop: threading.Event, hashes: _Hashes) -> None:
        shards = cut(self.plan, self.config.max_shard_size_bytes)
        try:
            write_weights(
                self.source,
                self.plan,
                shards,
                self.out.partial,
                ledger,
                threads=_threads(self.config),
                stop_requested=stop.is_set,
                finished=hashes.add,
                progress=self.progress,
            )
        except Abandoned:
            done = len(ledger.having("shard"))
            raise Stopped(f"stopped on request after {done} of {len(shards)} weight files") from None
        self.source.write_side_files(self.out.partial)
        write_new_config(self.source, self.plan, self.out.partial)

    def _verify(self, stop: threading.Event) -> Verified:
        if stop.is_set():
            raise Stopped("stopped on request: everything is written and not yet verified")
        if self.config.verify == "none":
            return Verified(0, 0)
        linears = {name: (layout.bits, layout.group_size) for name, layout in self.source.layouts.items()}
        return verify(
            open_side(self.resolved.path, self.source.format, linears),
            self.out.partial,
            Meant(self.plan.target, linears if self.plan.spec else {}, rounding=self.config.requant),
            sample=self.config.verify == "sample",
            threads=_threads(self.config),
            progress=self.progress,
        )

    def _result(self, verified: Verified) -> dict[str, Any]:
        spec = self.plan.spec
        return {
            "source": self.config.source,
            "source_format": self.source.format,
            "format": self.plan.target,
            "output": str(self.config.output),
            "bits": spec.bits if spec else 16,
            "group_size": spec.group_size if spec else None,
            "sym": spec.sym if spec else None,
            "desc_act": spec.desc_act if spec else None,
            "modules": len(self.source.layouts),
            "tensors_compared": verified.compared,
            "tensors_equal": verified.equal,
            "refused": [],
            "disagreements": list(self.source.disagreements),
            "warnings": list(self.plan.warnings),
            "verify": self.config.verify,
            "seconds": round(time.monotonic() - self.started, 3),
            "source_bytes": sum(path.stat().st_size for path in self.source.files),
            "output_bytes": sum(path.stat().st_size for path in self.out.partial.glob("*.safetensors")),
            "peak_rss_bytes": memory_peak_bytes(),
        }


class _Hashes:
    """SHA-256 of files, taken in a thread beside the work."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sha256")
        self._found: dict[Path, Future[str]] = {}

    def add(self, path: Path) -> None:
        """Hash `path`, which no longer changes."""
        self._found[path] = self._pool.submit(sha256_file, path)

    def of(self, paths: Any) -> dict[str, str]:
        """File name -> hash; waits for those that are not ready."""
        return {path.name: self._found[path].result() for path in paths}

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


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
def _with_details(details: dict[str, Any]) -> Iterator[None]:
    """Put `details` into the failure document of whatever fails; what the error itself says goes first."""
    try:
        yield
    except EdgetoolError as error:
        error.details = {**details, **error.details}
        raise


def _plan_document(config: ConvertConfig, source: Source, plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    return {
        "source": config.source,
        "source_format": source.format,
        "format": plan.target,
        "bits": spec.bits if spec else 16,
        "group_size": spec.group_size if spec else None,
        "sym": spec.sym if spec else None,
        "desc_act": spec.desc_act if spec else None,
        "modules": len(source.layouts),
        "tensors": sum(len(unit.entries) for unit in plan.units),
        "weight_files": len(cut(plan, config.max_shard_size_bytes)),
        "output_bytes": plan.output_bytes,
        "refused": [],
        "disagreements": list(source.disagreements),
        "warnings": list(plan.warnings),
    }


def _fixed(config: ConvertConfig, started: float) -> dict[str, Any]:
    """Repair the configuration of the checkpoint directory `config.source` in place."""
    path = Path(config.source).expanduser()
    if not path.is_dir() or config.source == "demo":
        raise BadInput(
            f"--fix-config repairs a checkpoint directory in place, and {config.source} is none",
            "give the path of a checkpoint directory",
        )
    source, fixed = repair(path, config.source_format)
    spec = source.spec
    return {
        "source": config.source,
        "source_format": source.format,
        "format": source.format,
        "bits": spec.bits if spec else 16,
        "group_size": spec.group_size if spec else None,
        "sym": spec.sym if spec else None,
        "desc_act": spec.desc_act if spec else None,
        "modules": len(source.layouts),
        "tensors_compared": 0,
        "tensors_equal": 0,
        "refused": [],
        "disagreements": list(source.disagreements),
        "fixed": fixed,
        "seconds": round(time.monotonic() - started, 3),
    }
