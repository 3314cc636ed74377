"""A checkpoint directory in Hugging Face layout: config.json, safetensors weights in one file or shards, side files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.tensor_file import AnyArray, TensorInfo, read_header, read_rows, read_tensor, to_float32
from edgetool.errors import BadInput

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_NOT_SIDE_NAMES = {CONFIG_NAME, INDEX_NAME, "edgetool.json", "quantize_config.json", "quant_config.json"}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".tflite"} | _PICKLE_SUFFIXES
_INCOMPLETE_HINT = "fetch the checkpoint again: the download is incomplete"
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers are read and checked against each other, no weight has been loaded.

    `tensors` maps every tensor's name to where it lies. `weight_files` are the files that hold them, sorted by name.
    `side_files` are the other top-level files a user of the model needs (tokenizer, chat template, generation_config,
    preprocessor, licence, remote code), sorted; weights in other formats, indexes and quantisation sidecars are not
    among them.
    Paths may be symbolic links (the hub's cache is made of them); they are read, not resolved.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    weight_files: list[Path]
    side_files: list[Path]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config, index and headers. Raises BadInput naming the file, and the tensor where one is at fault."""
        if not directory.is_dir():
            raise BadInput(f"{directory}: " + ("not a directory" if directory.exists() else "no such directory"))
        if not (directory / CONFIG_NAME).is_file():
            raise BadInput(f"{directory}: no {CONFIG_NAME}: not a checkpoint in Hugging Face layout", _hint(directory))
        config = read_json_object(directory / CONFIG_NAME)
        weight_map = _read_index(directory)
        if weight_map is None:
            files = _weight_files(directory)
        else:
            files = sorted({directory / name for name in weight_map.values()})
        for path in files:
            if not path.is_file():
                raise BadInput(f"{path}: shard is missing", hint=_INCOMPLETE_HINT)
        tensors = _gather(files)
        if weight_map is not None:
            _compare_with_index(directory, weight_map, tensors)
        if not tensors:
            raise BadInput(f"{directory}: the weight files hold no tensors: {', '.join(path.name for path in files)}")
        return cls(directory, config, MappingProxyType(tensors), files, _side_files(directory))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BadInput(f"{self.directory}: no tensor {name!r} in this checkpoint")
        return self.tensors[name]

    def read(self, name: str) -> AnyArray:
        """The tensor as stored (BF16 as uint16 bit patterns)."""
        return read_tensor(self._info(name))

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor widened to float32."""
        info = self._info(name)
        try:
            return to_float32(read_tensor(info), info.dtype)
        except BadInput as error:
            raise BadInput(f"{info.path}: tensor {name!r}: {error.message}", error.hint) from None

    def read_rows(self, name: str, rows: npt.NDArray[np.integer[Any]]) -> AnyArray:
        """Rows of the tensor as stored, without reading the others: shape [len(rows), *shape[1:]]."""
        return read_rows(self._info(name), rows)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        from edgetool.artifacts import sha256_file

        return {path.name: sha256_file(path) for path in self.weight_files}

    def sha256(self) -> dict[str, str]:
        """File name -> hex SHA-256 of every weight file. Reads all of them the first time."""
        return dict(self._hashes)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object. Raises BadInput naming the file and, where it is not JSON, the line."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path}: must hold a JSON object, holds a {type(document).__name__}")
    return document


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard file name, or None when the checkpoint has no index."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: weight_map is missing, empty or not an object")
    for tensor, name in weight_map.items():
        # a name with a path in it could make us read, and a converter publish, files outside the checkpoint
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise BadInput(f"{path}: tensor {tensor!r} lies in {name!r}, which is not a plain .safetensors file name")
    if (directory / SINGLE_NAME).is_file() and SINGLE_NAME not in weight_map.values():
        raise BadInput(
            f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME} with other shards; loaders differ over them",
            hint=f"remove {SINGLE_NAME} or the index with its shards",
        )
    return weight_map


def _weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint without an index."""
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    files = sorted(path for path in directory.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{directory}: no safetensors weights", hint=_hint(directory))
    shards = [match for path in files if (match := _SHARD_NAME.fullmatch(path.name))]
    for match in shards:
        for number in range(1, int(match["count"]) + 1):
            name = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            if not (directory / name).is_file():
                raise BadInput(f"{directory / name}: shard is missing", hint=_INCOMPLETE_HINT)
    if len(files) > 1 and len(shards) != len(files):
        names = ", ".join(path.name for path in files)
        raise BadInput(f"{directory}: several weight files and no {INDEX_NAME} to say which count: {names}")
    return files


def _hint(directory: Path) -> str | None:
    """What to do about a directory without usable weights, judged by what lies in it."""
    if (directory / "hbm").is_dir() and (directory / "manifest.json").is_file():
        return "it is a compiled image: edgetool serve-fpga --image serves it; others want what it was compiled from"
    suffixes = {path.suffix for path in directory.iterdir()}
    if suffixes & _PICKLE_SUFFIXES:
        return (
            "pickled weights (.bin, .pt) can run code when loaded and are not read: fetch the safetensors version, or, "
            'if you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
        )
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    return f"give the .gguf file itself: {directory / ggufs[0]}" if ggufs else None


def _gather(files: Sequence[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise BadInput(f"{path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = info
    return tensors


def _compare_with_index(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    path = directory / INDEX_NAME
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise BadInput(f"{path}: names tensor {name!r}, which is not in {file_name}")
        if tensors[name].path.name != file_name:
            raise BadInput(f"{path}: places tensor {name!r} in {file_name}; it is in {tensors[name].path.name}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise BadInput(f"{info.path}: tensor {name!r} is not named by {INDEX_NAME}")


def _side_files(directory: Path) -> list[Path]:
    found = []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name.startswith(".") or name in _NOT_SIDE_NAMES or name.endswith(".index.json"):
            continue
        if path.suffix in _WEIGHT_SUFFIXES:
            continue
        if path.is_symlink() and not path.exists():
            raise BadInput(f"{path}: is a link to a file that is not there", hint=_INCOMPLETE_HINT)
        if path.is_file():
            found.append(path)
    return found


def shard_index(entries: Sequence[tuple[str, int]], max_shard_bytes: int) -> list[tuple[str, list[str]]]:
    """Cut tensors (name, nbytes), in their order, into files of at most `max_shard_bytes` of data each.

    A tensor larger than that gets a file of its own. Returns (file name, tensor names) pairs: `model.safetensors` when
    all fits in one file, else `model-00001-of-0000n.safetensors` and so on.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in entries:
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    if len(groups) == 1:
        return [(SINGLE_NAME, groups[0])]
    return [(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names) for number, names in enumerate(groups, 1)]


def write_index(directory: Path, shards: Sequence[tuple[str, Sequence[str]]], total_size_bytes: int) -> None:
    """Write the index for `shards` as shard_index gives them; nothing for a single model.safetensors."""
    if len(shards) == 1 and shards[0][0] == SINGLE_NAME:
        return
    weight_map = {name: file_name for file_name, names in shards for name in names}
    document = {"metadata": {"total_size": total_size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
