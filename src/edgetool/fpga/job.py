"""`edgetool compile-vcu128` from a resolved configuration to a published image, or to what is asked of one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME as RECORD_NAME
from edgetool.artifacts import OutputDirectory, disk_errors, write_manifest
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.sources import resolve_configured
from edgetool.config import CommonConfig, CompileConfig
from edgetool.errors import BadInput, ConfigError, Stopped, UsageError, VerificationFailed
from edgetool.fpga.compiler import compile_plan
from edgetool.fpga.halves import Losses
from edgetool.fpga.record import hash_source, identity_of, make_record, record_of
from edgetool.fpga.results import disk_bytes, plan_of, result_of
from edgetool.fpga.settings import CompileSettings
from edgetool.fpga.verify import verify_sample
from edgetool.fpga.weights import Jobs, Rounded
from edgetool.fpga.writer import LEDGER_NAME, Emit, write_all
from edgetool.ledger import RunLedger, count_records
from edgetool.progress import Progress
from edgetool.runs import free_disk_bytes, refuse_overlap, stop_requests


def run_compile(config: CompileConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Do what the options ask for: compile, or --inspect, --diff, --extract, --verify, --verify-run or --push an image.

    Returns the result document. Raises any EdgetoolError; nothing appears at the output's place unless it is whole.
    """
    asked = [name for name in ("diff", "extract", "verify", "verify_run", "push") if getattr(config, name) is not None]
    if len(asked) > 1:
        raise UsageError(f"{_option(asked[0])} and {_option(asked[1])} are two commands", "give one of them")
    if config.trace is not None and config.verify_run is None:
        raise UsageError("--trace needs --verify-run", "edgetool compile-vcu128 IMAGE --verify-run CKPT --trace FILE")
    if not asked and config.inspect is None:
        return compile_checkpoint(config, common, progress)
    from edgetool.fpga import checks, push, verify

    threads = threads_of(config)
    if config.diff is not None:
        return checks.diff(*config.diff)
    if config.push is not None:
        if config.device is None:
            raise UsageError("--push needs --device", "for example --device /dev/xdma0_h2c_0, or an empty file to try")
        return push.push(config.push, config.device, threads, progress)
    image = _image_of(config)
    if config.extract is not None:
        if config.output == Path():
            raise UsageError("--extract needs --output", f"edgetool compile-vcu128 {image} --extract NAME -o FILE")
        return checks.extract(image, config.extract, config.output, config.overwrite)
    if config.verify is not None:
        source = resolve_configured(config.verify, common, config.revision, progress)
        return verify.verify(image, Checkpoint.open(source.path), threads, progress)
    if config.verify_run is not None:
        from edgetool.fpga.verify_run import RunSettings, verify_run
        from edgetool.models.devices import resolve_device

        source = resolve_configured(config.verify_run, common, config.revision, progress)
        where = str(resolve_device("auto")) if config.numerics == "fast" else "cpu"
        settings = RunSettings(config.numerics, where, threads, config.trace, config.overwrite)
        return verify_run(image, Checkpoint.open(source.path), settings, progress)
    return checks.inspect(image, threads, progress)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def threads_of(config: CompileConfig) -> int:
    """Threads to use: as given, else one for each core this process may run on."""
    return config.jobs or len(os.sched_getaffinity(0))


def _image_of(config: CompileConfig) -> Path:
    if config.inspect is not None:
        return config.inspect
    if config.model:
        return Path(config.model).expanduser()
    if config.output != Path() and config.extract is None:
        return config.output
    asked = "--extract NAME -o x.safetensors"
    if config.extract is None:
        asked = f"--verify {config.verify}" if config.verify is not None else f"--verify-run {config.verify_run}"
    raise UsageError("compile-vcu128 needs the IMAGE", f"edgetool compile-vcu128 IMAGE {asked}")


def settings_of(config: CompileConfig) -> CompileSettings:
    """What decides the content of an image."""
    return CompileSettings(
        profile=config.profile,
        max_context=config.max_context,
        lm_head=config.lm_head,
        int4=config.int4,
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        requant=config.requant,
    )


def emit_of(config: CompileConfig) -> Emit:
    """What is written: as given; without --emit the image, and for edgellm the tree too."""
    emit = config.emit or ("both" if config.profile == "edgellm" else "image")
    if emit != "image" and config.profile != "edgellm":
        raise ConfigError(
            f"--emit {emit}: EdgeLLM's file tree belongs to profile edgellm, and profile is {config.profile}",
            "add --profile edgellm, or leave --emit out",
        )
    return Emit(image=emit in ("image", "both"), tree=emit in ("edgellm-tree", "both"))


def compile_checkpoint(config: CompileConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Compile `config.model` into `config.output`; {"plan": ...} for a dry run."""
    started = time.monotonic()
    if not config.model:
        raise UsageError("compile-vcu128 needs MODEL", "edgetool compile-vcu128 --help")
    if config.output == Path():
        raise UsageError("compile-vcu128 needs --output", f"edgetool compile-vcu128 {config.model} -o image")
    emit, settings, threads = emit_of(config), settings_of(config), threads_of(config)
    source = resolve_configured(config.model, common, config.revision, progress)
    checkpoint = Checkpoint.open(source.path)
    out = OutputDirectory(config.output, config.overwrite, config.resume)
    refuse_overlap(out, [source.path])
    draft = compile_plan(checkpoint, settings, config.model)
    for warning in draft.warnings:
        progress.warn(warning)
    if config.dry_run:
        _check_place(out)
        return {"plan": plan_of(draft, emit, config.output)}
    identity = identity_of(settings, emit)
    if record_of(out.output, identity) is None:
        out.check()  # before hashing for nothing
    progress.note("hashing the checkpoint")
    hashed = hash_source(checkpoint, identity, out.output, threads)
    identity["source"] = hashed.source
    if hashed.unchanged is not None:
        progress.note(f"{config.output} is up to date: same input, same settings, every byte as it was written")
        seconds = time.monotonic() - started
        return result_of(hashed.unchanged, config.output, draft, unchanged=True, seconds=seconds)
    if not out.resuming:
        free_disk_bytes(out.output, disk_bytes(draft, emit), "the image")
    with out, contextlib.ExitStack() as stack:
        with disk_errors(out.partial):
            ledger = RunLedger.open(out.partial / LEDGER_NAME, identity)
        # not before: an unfinished run of another configuration, refused above, is not this one's to remove
        stack.enter_context(_nothing_worthless_kept(out))
        work = Jobs(checkpoint, draft.found, settings.int4, Losses(), Rounded())
        with stop_requests() as stop:
            written = write_all(draft, work, out.partial, emit, threads, hashed.source, ledger, stop, progress)
        verified = verify_sample(out.partial, checkpoint, progress) if emit.image else {}
        record = make_record(source, identity, work, written.files, verified)
        with disk_errors(out.partial):
            write_manifest(out.partial, record)
            (out.partial / LEDGER_NAME).unlink()
        out.publish()
    seconds = time.monotonic() - started
    return result_of(record, config.output, draft, unchanged=False, seconds=seconds, resumed=written.resumed)


def _check_place(out: OutputDirectory) -> None:
    """As `out.check()`, but an image that may turn out to be up to date is no obstacle to a plan."""
    if not (out.output / RECORD_NAME).is_file():
        out.check()


@contextmanager
def _nothing_worthless_kept(out: OutputDirectory) -> Iterator[None]:
    """A failed run leaves nothing but what --resume can use."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if isinstance(error, BadInput | VerificationFailed) or not count_records(out.partial / LEDGER_NAME, "matrices"):
            out.discard()
        raise
