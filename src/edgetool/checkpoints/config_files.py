"""config.json and the sidecars that repeat its quantisation, written so that old and new programs read the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.artifacts import atomic_write
from edgetool.checkpoints.checkpoint import CONFIG_NAME

_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration itself and, of a VLM, its parts for text and vision."""
    return [config] + [config[key] for key in ("text_config", "vision_config") if isinstance(config.get(key), dict)]


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Name the 16-bit dtype, "F16" or "BF16", at the top under both keys and wherever a part names one."""
    for section in sections(config):
        for key in ("dtype", "torch_dtype"):  # transformers 5 reads the first, older programs the second
            if section is config or key in section:
                section[key] = _DTYPES[dtype]


def spell_rope_twice(config: dict[str, Any]) -> None:
    """Repeat rope_parameters, which transformers 5 writes, under the keys of older programs.

    Those ignore the new key and then take the wrong base.
    """
    for section in sections(config):
        parameters = section.get("rope_parameters")
        if not isinstance(parameters, dict) or "rope_theta" not in parameters:
            continue
        section.setdefault("rope_theta", parameters["rope_theta"])
        kind = parameters.get("rope_type", "default")
        if kind != "default" and "rope_scaling" not in section:
            section["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}


def write_config(
    directory: Path, config: Mapping[str, Any], quantization: Mapping[str, Any] | None, side_config: str | None
) -> None:
    """Write config.json with `quantization` as its quantization_config, and the sidecar `side_config` that repeats it.

    None takes quantization_config away, wherever a VLM keeps it. Each file is replaced as a whole.
    """
    document: dict[str, Any] = json.loads(json.dumps(config))
    for section in sections(document):
        section.pop("quantization_config", None)
    if quantization is not None:
        document["quantization_config"] = dict(quantization)
    write_json(directory / CONFIG_NAME, document)
    if side_config is not None and quantization is not None:
        write_json(directory / side_config, quantization)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by `document` as indented JSON."""
    atomic_write(path, (json.dumps(document, indent=2) + "\n").encode())
