"""`edgetool compile-vcu128` from a resolved configuration to a published image, or to what is asked of one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME as RECORD_NAME
from edgetool.artifacts import OutputDirectory, disk_errors, sha256_file, write_manifest
from edgetool.checkpoints.checkpoint import CONFIG_NAME, Checkpoint, read_json_object
from edgetool.checkpoints.sources import ResolvedSource, resolve
from edgetool.config import CommonConfig, CompileConfig
from edgetool.errors import BadInput, ConfigError, EdgetoolError, Stopped, UsageError
from edgetool.fpga.compiler import Draft, compile_plan
from edgetool.fpga.halves import Losses
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.manifest import memory_of
from edgetool.fpga.program import NUMERICS
from edgetool.fpga.settings import CompileSettings
from edgetool.fpga.weights import Jobs, Rounded
from edgetool.fpga.writer import LEDGER_NAME, Emit, write_all
from edgetool.ledger import RunLedger, count_records
from edgetool.progress import Progress
from edgetool.runs import memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

SCHEMA = "edgetool.compile-vcu128/1"
_WORST_SHOWN = 5


def run_compile(config: CompileConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Do what the options ask for: compile, or --inspect, --diff, --extract, --verify or --push an image.

    Returns the result document. Raises any EdgetoolError; nothing appears at the output's place unless it is whole.
    """
    modes = [name for name in ("inspect", "diff", "extract", "verify", "push") if getattr(config, name) is not None]
    if set(modes) - {"inspect"} and len(set(modes) - {"inspect"}) > 1:
        raise UsageError(f"--{modes[0]} and --{modes[1]} are two commands", "give one of them")
    if not modes:
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
        source = _resolve(config.verify, config, common, progress)
        return verify.verify(image, Checkpoint.open(source.path), threads, progress)
    return checks.inspect(image, threads, progress)


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
    raise UsageError("compile-vcu128 needs the IMAGE", "edgetool compile-vcu128 IMAGE --extract NAME -o x.safetensors")


def _resolve(spec: str, config: CompileConfig, common: CommonConfig, progress: Progress) -> ResolvedSource:
    return resolve(
        spec,
        cache_dir=common.cache_dir,
        offline=common.offline,
        revision=config.revision,
        token=common.token(),
        progress=progress,
    )


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
    source = _resolve(config.model, config, common, progress)
    checkpoint = Checkpoint.open(source.path)
    out = OutputDirectory(config.output, config.overwrite, config.resume)
    refuse_overlap(out, [source.path])
    draft = compile_plan(checkpoint, settings, config.model)
    for warning in draft.warnings:
        progress.warn(warning)
    if config.dry_run:
        _check_place(out, config)
        return {"plan": plan_of(draft, emit, config)}
    progress.note("hashing the checkpoint")
    hashes = _input_hashes(checkpoint, threads)
    identity = {"source": hashes, "settings": settings.to_dict(), "emit": vars(emit), "numerics": NUMERICS,
                "hardware": VCU128.to_dict(), "edgetool": tool_versions()["edgetool"]}  # fmt: skip
    same = _unchanged(out.output, identity, threads)
    if same is not None:
        progress.note(f"{config.output} is up to date: same input, same settings, every byte as it was written")
        return _result(same, config, draft, unchanged=True, seconds=time.monotonic() - started)
    with out, contextlib.ExitStack() as stack:
        with disk_errors(out.partial):
            ledger = RunLedger.open(out.partial / LEDGER_NAME, identity)
        # not before: an unfinished run of another configuration, refused above, is not this one's to remove
        stack.enter_context(_nothing_worthless_kept(out))
        work = Jobs(checkpoint, draft.found, settings.int4, Losses(), Rounded())
        with stop_requests() as stop:
            written = write_all(draft, work, out.partial, emit, threads, hashes, ledger, stop, progress)
        record = _record(config, source, identity, draft, work, written.files)
        with disk_errors(out.partial):
            write_manifest(out.partial, record)
            (out.partial / LEDGER_NAME).unlink()
        out.publish()
    seconds = time.monotonic() - started
    return _result(record, config, draft, unchanged=False, seconds=seconds, resumed=written.resumed)


def _check_place(out: OutputDirectory, config: CompileConfig) -> None:
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
        if isinstance(error, BadInput) or not count_records(out.partial / LEDGER_NAME, "matrices"):
            out.discard()
        raise


def _input_hashes(checkpoint: Checkpoint, threads: int) -> dict[str, str]:
    """File name -> SHA-256 of all that decides the image: weights, config.json, tokenizer."""
    paths = [*checkpoint.weight_files, checkpoint.directory / CONFIG_NAME, *checkpoint.side_files]
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(sha256_file, paths)
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}


def _unchanged(output: Path, identity: Mapping[str, Any], threads: int) -> dict[str, Any] | None:
    """The record of an output that the same input and settings made and that nobody has changed since, or None."""
    try:
        record = read_json_object(output / RECORD_NAME)
    except EdgetoolError:
        return None
    files = record.get("files")
    if record.get("identity") != identity or not isinstance(files, dict) or not files:
        return None
    here = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    if here != {*files, RECORD_NAME}:
        return None
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: sha256_file(output / name), files)
        return record if all(a == b for a, b in zip(found, files.values(), strict=True)) else None


def _record(
    config: CompileConfig, source: ResolvedSource, identity: Mapping[str, Any], draft: Draft, work: Jobs,
    files: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """edgetool.json. It holds no time and no memory, so that two compilations are equal in every byte."""
    return {
        "schema": SCHEMA,
        "source": {"spec": source.spec, **source.provenance, "sha256": identity["source"]},
        "identity": dict(identity),
        "tools": tool_versions("numpy"),
        "max_context": draft.max_context,
        "losses": work.losses.to_list(),
        "rounded": _rounded(work),
        "verified": ["every matrix and constant lies where the plan says, without overlap", "SHA-256 of every file"],
        "files": dict(sorted(files.items())),
    }


def _rounded(work: Jobs) -> list[dict[str, Any]]:
    """Matrices that were rounded here, the worst first; four digits, which no order of summation changes."""
    records = [
        {"name": name, **{key: float(f"{value:.4g}") for key, value in error.to_dict().items()}}
        for name, error in work.rounded.by_name.items()
    ]
    return sorted(records, key=lambda record: (-record["relative"], record["name"]))


def plan_of(draft: Draft, emit: Emit, config: CompileConfig) -> dict[str, Any]:
    """What a dry run shows."""
    memory = memory_of(draft)
    disk = VCU128.pseudo_channels * memory["weights_bytes_per_pc"] * (emit.image + emit.tree)
    return {
        "output": str(config.output),
        "writes": [name for name, wanted in (("image", emit.image), ("edgellm-tree", emit.tree)) if wanted],
        "disk_bytes": disk + (memory["host_bytes"] + memory["ddr_constants_bytes"]) * emit.image,
        **_facts(draft),
        "memory": memory,
        "warnings": draft.warnings,
    }


def _facts(draft: Draft) -> dict[str, Any]:
    found, model, memory = draft.found, draft.model, memory_of(draft)
    return {
        "profile": draft.settings.profile,
        "model_type": model.model_type,
        "source_format": found.format,
        "bits": found.bits,
        "group_size": draft.matrices[0].layout.group,
        "sym": not any(matrix.layout.zeros for matrix in draft.matrices),
        "desc_act": found.desc_act,
        "lm_head": draft.lm_head,
        "int4_encoding": draft.settings.int4,
        "hbm_bytes_per_pc": memory["hbm_bytes_per_pc"],
        "kv_base": draft.hbm.kv.base,
        "max_context": draft.max_context,
        "largest_context": draft.hbm.largest_context,
        "gathers": vars(draft.orders.gathers),
        "estimate": draft.estimate,
    }


def _result(
    record: Mapping[str, Any], config: CompileConfig, draft: Draft, *, unchanged: bool, seconds: float, resumed: int = 0
) -> dict[str, Any]:
    rounded = record["rounded"]
    again = [one for one in rounded if one["name"] != "lm_head"]
    return {
        "output": str(config.output),
        **_facts(draft),
        "weights_bytes_per_pc": draft.hbm.weights_bytes_per_pc,
        "kv_bytes_per_pc": draft.hbm.kv.bytes_per_pc,
        "weight_read_bytes_per_token": draft.hbm.weight_read_bytes,
        "unchanged": unchanged,
        "resumed_matrices": resumed,
        "lm_head_error": next((one["relative"] for one in rounded if one["name"] == "lm_head"), None),
        "requantized": {"modules": len(again), "worst": again[:_WORST_SHOWN]} if again else None,
        "fp16_losses": record["losses"],
        "warnings": draft.warnings,
        "files": len(record["files"]),
        "seconds": round(seconds, 2),
        "peak_rss_bytes": memory_peak_bytes(),
    }
