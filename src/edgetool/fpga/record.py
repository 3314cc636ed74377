"""edgetool.json of an image: what made it, so that the same command again knows that there is nothing to do.

It holds no time and no memory, unlike other commands' records: two compilations are equal in every byte of the
directory. Those are in the result that the command prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME as RECORD_NAME
from edgetool.artifacts import sha256_file
from edgetool.checkpoints.checkpoint import CONFIG_NAME, Checkpoint, read_json_object
from edgetool.checkpoints.sources import ResolvedSource
from edgetool.errors import EdgetoolError
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.program import NUMERICS
from edgetool.fpga.settings import CompileSettings
from edgetool.fpga.weights import Jobs
from edgetool.fpga.writer import Emit
from edgetool.runs import tool_versions

RECORD_SCHEMA = "edgetool.compile-vcu128-record/1"


@dataclass(frozen=True)
class Hashed:
    """source: input file -> sha256. unchanged: the record of the output, where the same input made just that."""

    source: dict[str, str]
    unchanged: dict[str, Any] | None


def identity_of(settings: CompileSettings, emit: Emit) -> dict[str, Any]:
    """What an output is but its source: two runs of one identity and one source give the same bytes."""
    return {
        "settings": settings.to_dict(),
        "emit": vars(emit),
        "numerics": NUMERICS,
        "hardware": VCU128.to_dict(),
        "edgetool": tool_versions()["edgetool"],
    }


def hash_source(checkpoint: Checkpoint, identity: Mapping[str, Any], output: Path, threads: int) -> Hashed:
    """Hash all that decides the image, and beside it an output that may be up to date: the disk is read once, together.

    identity: what the image is but its source.
    """
    inputs = [*checkpoint.weight_files, checkpoint.directory / CONFIG_NAME, *checkpoint.side_files]
    record = record_of(output, identity)
    outputs = [] if record is None else [output / name for name in record["files"]]
    paths = sorted([*inputs, *outputs], key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(paths, pool.map(sha256_file, paths), strict=True))
    source = {path.name: digests[path] for path in inputs}
    if record is not None:
        same = all(digests[output / name] == digest for name, digest in record["files"].items())
        if not same or record["identity"]["source"] != source:
            record = None
    return Hashed(source, record)


def record_of(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an output made with the same settings, of which no file is missing or added; else None."""
    try:
        record = read_json_object(output / RECORD_NAME)
    except EdgetoolError:
        return None
    files, made = record.get("files"), record.get("identity")
    if not isinstance(made, dict) or not isinstance(files, dict) or not files:
        return None
    if {key: value for key, value in made.items() if key != "source"} != identity:
        return None
    here = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    return record if here == {*files, RECORD_NAME} else None


def make_record(
    source: ResolvedSource,
    identity: Mapping[str, Any],
    work: Jobs,
    files: Mapping[str, str],
    verified: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of edgetool.json. identity: with its source. files: output file -> sha256."""
    return {
        "schema": RECORD_SCHEMA,
        "source": {"spec": source.spec, **source.provenance, "sha256": identity["source"]},
        "identity": dict(identity),
        "tools": tool_versions("numpy"),
        "losses": work.losses.to_list(),
        "rounded": _rounded(work),
        "verified": dict(verified),
        "files": dict(sorted(files.items())),
    }


def _rounded(work: Jobs) -> list[dict[str, Any]]:
    """Matrices that were rounded here, the worst first; four digits, which no order of summation changes."""
    records = [
        {"name": name, **{key: float(f"{value:.4g}") for key, value in error.to_dict().items()}}
        for name, error in work.rounded.by_name.items()
    ]
    return sorted(records, key=lambda record: (-record["relative"], record["name"]))
