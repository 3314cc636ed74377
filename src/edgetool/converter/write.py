"""The weight files of a conversion: a shard at a time, each linear once, with bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import disk_errors
from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.checkpoint import shard_index, write_index
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.repack import repack
from edgetool.checkpoints.scratch import Scratch
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorFileWriter
from edgetool.converter.fit import fit, needs_codes
from edgetool.converter.floats import DTYPE_OF, beyond, delivered, infinite, narrowed
from edgetool.converter.plan import Plan, Unit
from edgetool.converter.source import CheckpointSource, Source
from edgetool.ledger import RunLedger
from edgetool.progress import Progress

Array = npt.NDArray[Any]
Pieces = Array | Iterator[Array]

_IN_FLIGHT_BYTES = 256 * 2**20
_BLOCK_VALUES = 1 << 18  # weights rounded to 16 bit at a time, so that they are written from the cache


class Abandoned(Exception):
    """A stop was asked for: the shard at hand is not finished, those before it are."""


def cut(plan: Plan, max_shard_bytes: int) -> list[tuple[str, list[Unit]]]:
    """(file name, units) of each weight file; a linear's tensors stay together."""
    units = {unit.name: unit for unit in plan.units}
    shards = shard_index([(unit.name, unit.nbytes) for unit in plan.units], max_shard_bytes)
    return [(file_name, [units[name] for name in names]) for file_name, names in shards]


def write_weights(
    source: Source,
    plan: Plan,
    shards: Sequence[tuple[str, Sequence[Unit]]],
    directory: Path,
    ledger: RunLedger,
    *,
    threads: int,
    stop_requested: Callable[[], bool],
    written: Callable[[Path], None],
    remembered: Callable[[Sequence[str]], Mapping[str, Any]],
    progress: Progress,
) -> None:
    """Write the shards that `ledger` does not name, and the index.

    written: told every shard's file, as soon as its content is complete. remembered(names): what the ledger has to
    keep about these tensors.

    Raises Abandoned when a stop is requested, with the shard at hand removed; BadInput for damage in the source.
    """
    scratch = Scratch()
    done = {record["shard"] for record in ledger.having("shard")}
    before = sum(unit.nbytes for name, units in shards if name in done for unit in units)
    with progress.task("write", plan.output_bytes, "B", before=before) as task, disk_errors(directory):
        if before:
            task.advance(before)
        for file_name, units in shards:
            path = directory / file_name
            if file_name not in done:
                entries = [entry for unit in units for entry in unit.entries]
                with TensorFileWriter(path, entries) as writer:
                    with _Workers(threads, stop_requested) as workers:
                        for unit in units:
                            workers.do(unit.work_bytes, partial(_write_unit, source, plan, unit, writer, scratch))
                            task.advance(unit.nbytes)
                    written(path)  # before it is flushed to the disk, which takes as long as hashing it
                ledger.append({"shard": file_name, **remembered([unit.name for unit in units])})
            else:
                written(path)
        write_index(
            directory,
            [(name, [entry[0] for unit in units for entry in unit.entries]) for name, units in shards],
            plan.output_bytes,
        )


def converted(source: Source, plan: Plan, name: str, scratch: Scratch | None = None) -> Mapping[str, Pieces]:
    """Tensor name -> values, whole or in flat pieces, of what the module or plain tensor `name` becomes.

    With `scratch` they are good until the thread's next call.
    """
    if name in source.plain:
        tensor = source.plain[name]
        return {name: (delivered(tensor, DTYPE_OF[plan.target]) if plan.target in DTYPE_OF else tensor).chunks()}
    if plan.spec is None:
        return {f"{name}.weight": _weights(source, name, DTYPE_OF[plan.target], scratch)}
    layout = source.layouts[name]
    spec = replace(plan.spec, desc_act=not layout.g_idx_trivial)
    arrays: Mapping[str, Pieces] | None = _repacked(source, name, plan.target, spec, scratch)
    if arrays is None:
        linear = fit(source.linear(name), plan.target, plan.spec)
        arrays = FORMATS[plan.target].write(linear, plan.spec, name)
    return {f"{name}.{suffix}": array for suffix, array in arrays.items()}


def _write_unit(source: Source, plan: Plan, unit: Unit, writer: TensorFileWriter, scratch: Scratch) -> None:
    for name, data in converted(source, plan, unit.name, scratch).items():
        writer.write(name, data)


def _repacked(
    source: Source, module: str, target: str, spec: Spec, scratch: Scratch | None
) -> Mapping[str, Pieces] | None:
    """The packed words moved without becoming codes, where nothing in them changes."""
    if not isinstance(source, CheckpointSource):
        return None
    kind, own = source.format_of(module)

    def adapt(layer: QuantizedLinear) -> QuantizedLinear | None:
        return None if needs_codes(layer, target, spec) else fit(layer, target, spec)

    return repack(source.packed(module, scratch), kind, target, own, spec, module, adapt, scratch)


def _weights(source: Source, module: str, dtype: str, scratch: Scratch | None) -> Iterator[Array]:
    """The weights in F16 or BF16 (uint16 bits), some rows at a time: float32 products, rounded once."""
    linear = None if module in source.inexact else source.linear(module)
    weight = source.weight(module) if linear is None else linear.codes  # for its shape only, if there are codes
    step = max(1, _BLOCK_VALUES // weight.shape[1])
    lost = 0
    for start in range(0, len(weight), step):
        shape = weight[start : start + step].shape
        out: Array
        if linear is None:
            out = narrowed(weight[start : start + step], dtype)
        else:
            kind = NUMPY_DTYPES[dtype]
            out = np.empty(shape, kind) if scratch is None else scratch.empty("weights", shape, kind)
            linear.rows(start, start + step).dequantize(out)
        lost += infinite(out, dtype)
        yield out
    if lost:
        raise beyond(dtype, module, lost, weight.size)


class _Workers:
    """Threads that take jobs as long as what is in flight fits the memory set aside for it.

    Leaving waits for all jobs, or raises what the first failing one raised once the running ones have ended.
    """

    def __init__(self, threads: int, stop_requested: Callable[[], bool]) -> None:
        self._pool = ThreadPoolExecutor(max(1, threads), "convert")
        self._stop_requested = stop_requested
        self._changed = threading.Condition()
        self._in_flight_bytes = 0
        self._futures: list[Any] = []
        self._failed = False

    def __enter__(self) -> _Workers:
        return self

    def do(self, work_bytes: int, job: Callable[[], None]) -> None:
        """Hand `job` to a thread, as soon as there is memory for it. Raises Abandoned when a stop was requested."""
        if self._stop_requested():
            raise Abandoned
        with self._changed:
            # one that is larger than all the memory set aside runs alone
            self._changed.wait_for(
                lambda: (
                    self._failed or self._in_flight_bytes == 0 or self._in_flight_bytes + work_bytes <= _IN_FLIGHT_BYTES
                )
            )
            if self._failed:
                return
            self._in_flight_bytes += work_bytes
        self._futures.append(self._pool.submit(self._run, work_bytes, job))

    def _run(self, work_bytes: int, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._changed:
                self._in_flight_bytes -= work_bytes
                self._changed.notify_all()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                wait(self._futures, return_when=FIRST_EXCEPTION)
        finally:
            self._pool.shutdown(cancel_futures=True)
        if kind is None:
            for future in self._futures:
                if not future.cancelled():
                    future.result()
