"""Writes what a plan describes: matrices by many threads at their places, then everything small, then hashes.

The same plan gives the same bytes whatever the number of threads. A finished matrix is a line of the ledger with its
CRC, so that a killed run goes on where it was; what such a run finds on the disk is read and compared, not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import MANIFEST_NAME as RECORD_NAME
from edgetool.artifacts import atomic_write, disk_errors, sha256_file
from edgetool.checkpoints.requant import RoundingError
from edgetool.checkpoints.tensor_file import iter_chunks
from edgetool.errors import EdgetoolError, Stopped
from edgetool.fpga.compiler import Draft
from edgetool.fpga.halves import Losses, to_half
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image_format import (
    DDR_NAME,
    EMBEDDING_NAME,
    MANIFEST_NAME,
    PROGRAM_NAME,
    REPORT_NAME,
    TOKENIZER_DIRECTORY,
)
from edgetool.fpga.manifest import json_bytes, manifest_of, segments_of
from edgetool.fpga.report import report_page
from edgetool.fpga.sinks import ImageSink, Sink, TreeSink, checksum, put
from edgetool.fpga.tree import bias_file, norm_file
from edgetool.fpga.weights import Jobs, Matrix, Rounded, rows_per_block
from edgetool.ledger import RunLedger
from edgetool.progress import Progress

Array = npt.NDArray[Any]

LEDGER_NAME = "ledger.jsonl"
_NOT_OUTPUT = {LEDGER_NAME, RECORD_NAME}
_RECORD_EVERY_S = 2.0
_FLUSHED_AT_ONCE = 4
_TOKENIZER_NAMES = {
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
}


@dataclass(frozen=True)
class Emit:
    """What is written: the image, EdgeLLM's file tree, or both."""

    image: bool
    tree: bool


@dataclass
class Written:
    """What the run wrote: file -> sha256, and the manifest where there is an image."""

    files: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    resumed: int = 0


def write_all(
    draft: Draft,
    work: Jobs,
    directory: Path,
    emit: Emit,
    threads: int,
    source: dict[str, str],
    ledger: RunLedger,
    stop: threading.Event,
    progress: Progress,
) -> Written:
    """Fill `directory`. source: input file -> sha256, for the manifest.

    Raises BadInput for weights that cannot be held, Stopped when `stop` is set (finished matrices are kept).
    """
    written = Written()
    with disk_errors(directory):
        with contextlib.ExitStack() as stack:
            sinks: list[Sink] = []
            if emit.image:
                image = ImageSink(directory, draft.hbm.weights_bytes_per_pc, draft.hbm.addresses)
                sinks.append(stack.enter_context(contextlib.closing(image)))
            if emit.tree:
                sinks.append(TreeSink(directory))
            # beside the matrices: copying keeps one core busy where packing leaves it idle
            beside = stack.enter_context(ThreadPoolExecutor(1))
            rest = beside.submit(_write_the_rest, draft, work, directory, emit, stop)
            written.resumed = _Matrices(draft, work, sinks, threads, ledger, stop).write(progress)
            rest.result()
        progress.note("hashing what was written")
        written.files = _hashes(directory, threads)
        if emit.image:
            written.manifest = _write_documents(draft, directory, source, written.files)
    return written


@dataclass
class _Matrices:
    """The matrices of one run, the largest first."""

    draft: Draft
    work: Jobs
    sinks: list[Sink]
    threads: int
    ledger: RunLedger
    stop: threading.Event
    finished: int = 0
    fresh: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, progress: Progress) -> int:
        """Write what is not there yet; returns how many an earlier run had finished."""
        matrices = sorted(self.draft.matrices, key=lambda one: -one.layout.read_bytes)
        kept = self._still_whole(matrices)
        before = sum(matrix.layout.read_bytes for matrix in matrices if matrix.linear.name in kept)
        total = sum(matrix.layout.read_bytes for matrix in matrices)
        self.finished = len(kept)
        recorded_at = time.monotonic()
        pending = iter([matrix for matrix in matrices if matrix.linear.name not in kept])
        running: dict[Future[dict[str, Any]], Matrix] = {}
        with progress.task("pack weights", total, "B", before) as task, ThreadPoolExecutor(self.threads) as pool:
            try:
                while True:
                    for matrix in itertools.islice(pending, self.threads - len(running)):
                        running[pool.submit(self._write_one, matrix)] = matrix
                    if not running:
                        break
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        matrix = running.pop(future)
                        self._note(matrix, future.result())
                        task.advance(matrix.layout.read_bytes, note=matrix.linear.name)
                    if time.monotonic() - recorded_at > _RECORD_EVERY_S:
                        self._record()
                        recorded_at = time.monotonic()
            except BaseException as error:
                # Let the other threads end at their next block; what they finish meanwhile is kept.
                asked = self.stop.is_set()
                self.stop.set()
                for future, matrix in running.items():
                    with contextlib.suppress(Stopped, EdgetoolError, OSError):
                        self._note(matrix, future.result())
                with contextlib.suppress(OSError):
                    self._record()
                if isinstance(error, Stopped) and asked:
                    count = f"{self.finished} of {len(matrices)} matrices"
                    raise Stopped(f"stopped on request after {count}, all kept") from None
                raise
        self._record()
        return len(kept)

    def _note(self, matrix: Matrix, record: dict[str, Any]) -> None:
        self.fresh[matrix.linear.name] = record
        self._learn(matrix.linear.name, record)
        self.finished += 1

    def _learn(self, name: str, record: Mapping[str, Any]) -> None:
        """What the writing of a matrix, now or in an earlier run, has found out."""
        self.work.losses.merge(record["losses"])
        if record["rounded"] is not None:
            self.work.rounded.by_name[name] = RoundingError(**record["rounded"])

    def _record(self) -> None:
        if self.fresh:
            self.ledger.append({"matrices": dict(sorted(self.fresh.items()))})
            self.fresh = {}

    def _write_one(self, matrix: Matrix) -> dict[str, Any]:
        """One matrix into all sinks; returns the CRC-32 of its blocks and what its values lost."""
        crc, offset = 0, 0
        work = replace(self.work, losses=Losses(), rounded=Rounded())
        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(sink.matrix(matrix.linear)) for sink in self.sinks]
            for block in matrix.blocks(work):
                if self.stop.is_set():
                    raise Stopped("stopped on request")
                for files, start in places:
                    put(files, start + offset, block)
                for port in block:
                    crc = zlib.crc32(port.data, crc)
                offset += block.shape[1] * block.shape[2]
        error = work.rounded.by_name.get(matrix.linear.name)
        return {"crc32": crc, "losses": work.losses.to_dict(), "rounded": None if error is None else asdict(error)}

    def _still_whole(self, matrices: list[Matrix]) -> set[str]:
        """The matrices of an earlier run whose bytes are on the disk as its ledger says."""
        known = {name: one for record in self.ledger.having("matrices") for name, one in record["matrices"].items()}
        claimed = [matrix for matrix in matrices if matrix.linear.name in known]
        with ThreadPoolExecutor(self.threads) as pool:
            whole = pool.map(lambda matrix: self._is_whole(matrix, known[matrix.linear.name]["crc32"]), claimed)
            names = {matrix.linear.name for matrix, good in zip(claimed, whole, strict=True) if good}
        for name in sorted(names):
            self._learn(name, known[name])
        return names

    def _is_whole(self, matrix: Matrix, crc: int) -> bool:
        for sink in self.sinks:
            with sink.matrix(matrix.linear) as (files, start):
                if checksum(files, start, matrix.layout, rows_per_block(matrix.layout)) != crc:
                    return False
        return True


def _write_the_rest(draft: Draft, work: Jobs, directory: Path, emit: Emit, stop: threading.Event) -> None:
    """Everything but matrices and documents."""
    if emit.tree:
        _write_tree_constants(draft, work, directory)
    if emit.image:
        _write_ddr(draft, work, directory)
        _write_embedding(draft, work, directory, stop)
        _copy_tokenizer(draft, directory)


def _write_ddr(draft: Draft, work: Jobs, directory: Path) -> None:
    path = directory / DDR_NAME
    with path.open("wb") as file:
        file.truncate(draft.ddr.file_bytes)
        for constant in draft.ddr.constants:
            file.seek(constant.addr - VCU128.ddr_base)
            file.write(_little(draft.constant(constant, work)))


def _little(values: Array) -> bytes:
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _write_tree_constants(draft: Draft, work: Jobs, directory: Path) -> None:
    """Norms and biases of EdgeLLM's tree."""
    linears = {f"{linear.name}.bias": linear for linear in draft.model.linears()}
    for constant in draft.ddr.constants:
        if constant.role == "norm":
            name = norm_file(constant.name)
        elif constant.role == "bias":
            name = bias_file(linears[constant.name])
        else:
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(_little(draft.constant(constant, work)))


def _write_embedding(draft: Draft, work: Jobs, directory: Path, stop: threading.Event) -> None:
    name = draft.model.embedding
    info = work.checkpoint.tensors[name]
    (directory / EMBEDDING_NAME).parent.mkdir(exist_ok=True)
    with (directory / EMBEDDING_NAME).open("wb") as file:
        for chunk in iter_chunks(info, 1 << 22):
            if stop.is_set():
                raise Stopped("stopped on request after the matrices, all kept")
            file.write(np.ascontiguousarray(to_half(chunk, info.dtype, name, work.losses), "<f2").data)


def _copy_tokenizer(draft: Draft, directory: Path) -> None:
    """What turns text into ids and back, and the generation defaults."""
    (directory / TOKENIZER_DIRECTORY).mkdir(exist_ok=True)
    for path in draft.checkpoint.side_files:
        prefixed = path.name.startswith(("tokenizer", "tokenization_")) or path.suffix == ".tiktoken"
        if prefixed or path.name in _TOKENIZER_NAMES:
            (directory / TOKENIZER_DIRECTORY / path.name).write_bytes(path.read_bytes())


def _hashes(directory: Path, threads: int) -> dict[str, str]:
    """File -> sha256 of all that is in `directory` now but the run's own records."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in _NOT_OUTPUT)
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(_FLUSHED_AT_ONCE) as disk:
        flushes = disk.map(_flush, paths)  # the disk works while the processor does
        digests = pool.map(sha256_file, paths)
        hashes = {str(path.relative_to(directory)): digest for path, digest in zip(paths, digests, strict=True)}
        list(flushes)
        return hashes


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_documents(draft: Draft, directory: Path, source: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    """Program, manifest and report page; their hashes join `files`. Returns the manifest."""
    segments = segments_of(draft)
    for segment in segments:
        segment["sha256"] = files[segment["file"]]
    prefix = f"{TOKENIZER_DIRECTORY}/"
    tokenizer = {name.removeprefix(prefix): digest for name, digest in files.items() if name.startswith(prefix)}
    program = json_bytes(draft.program.to_dict())
    manifest = manifest_of(draft, source, segments, tokenizer, hashlib.sha256(program).hexdigest())
    documents = {
        PROGRAM_NAME: program,
        MANIFEST_NAME: json_bytes(manifest),
        REPORT_NAME: report_page(manifest).encode(),
    }
    for name, content in documents.items():
        atomic_write(directory / name, content)
        files[name] = hashlib.sha256(content).hexdigest()
    return manifest
