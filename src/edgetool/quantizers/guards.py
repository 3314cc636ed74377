"""What stands around a run: what is refused before it starts, what a failure leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from edgetool.artifacts import OutputDirectory, sha256_file
from edgetool.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.detect import detect
from edgetool.config import QuantizeConfig
from edgetool.errors import BadInput, MissingDependency, Stopped
from edgetool.ledger import count_records, refuse_difference

_NOT_IDENTITY = {"model", "output", "resume", "overwrite", "dry_run", "revision", "threads"}
"""Settings that do not decide what is written; the model counts by its files."""


def memory_named(what: str) -> AbstractContextManager[None]:
    """Turn running out of memory into ResourceUnavailable that names `what` and how to calibrate with less."""
    from edgetool.models.devices import out_of_memory_named

    return out_of_memory_named(what, "lower --calib-samples or --calib-seqlen")


def need_torch() -> None:
    """Raise MissingDependency where torch or transformers is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"quantising needs {error.name or 'torch'}, which is not installed", "pip install 'edgetool[quant]'"
        ) from error


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise BadInput for a checkpoint that is quantised already, by its tensors or by what config.json says."""
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    if found is not None:
        raise BadInput(
            f"{checkpoint.directory} is quantised already: {found.format}, {found.bits} bits, group {found.group_size}",
            "quantise the original model instead",
        )
    claim = claimed_quantization(checkpoint.config)
    if claim is not None:
        raise BadInput(
            f"{checkpoint.directory} is quantised already, says config.json: {claim.get('quant_method', 'unknown')}",
            "quantise the original model instead",
        )


def input_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """File name -> SHA-256 of every file that is read: weights, config.json, tokenizer and what goes with them."""
    others = [checkpoint.directory / CONFIG_NAME, *checkpoint.side_files]
    return {**checkpoint.sha256(), **{path.name: sha256_file(path) for path in others}}


def refuse_other_run(directory: Path, manifest: dict[str, Any], config: QuantizeConfig, checkpoint: Checkpoint) -> None:
    """Raise BadInput if a run that only has to be published is not the one that is asked for now."""
    now = json.loads(config.model_dump_json(exclude=_NOT_IDENTITY))
    known = {key: value for key, value in manifest.get("config", {}).items() if key in now}
    refuse_difference(directory, known, now)
    refuse_difference(directory, manifest.get("source", {}).get("sha256"), input_hashes(checkpoint))


@contextmanager
def nothing_worthless_kept(out: OutputDirectory, ledger: Path) -> Iterator[None]:
    """Remove the partial directory of a run that fails before its first layer is done: there is nothing to resume."""
    before = set(out.partial.iterdir())
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        if not before and not count_records(ledger, "layer"):
            out.discard()
        raise
