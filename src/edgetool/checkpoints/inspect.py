"""What a checkpoint is: read from its tensors, and where its other files say something else, that is reported."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetool.checkpoints.checkpoint import INDEX_NAME, Checkpoint, read_json_object
from edgetool.checkpoints.config_claims import claimed_format
from edgetool.checkpoints.consistency import ModuleShape, config_problems
from edgetool.checkpoints.detect import QuantizationFound, detect
from edgetool.checkpoints.formats import FORMATS
from edgetool.checkpoints.tensor_file import TensorInfo, iter_chunks
from edgetool.errors import BadInput
from edgetool.progress import NullProgress, Progress

_QUANTIZED_PARTS = {suffix for target in FORMATS.values() for suffix in target.suffixes}
_TOKENIZER_NAMES = {"tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model"}
# dtype -> (unsigned integer of its size, bits of its exponent): all of them set means NaN or infinity
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


@dataclass(frozen=True)
class InspectReport:
    """The answer of `edgetool inspect`.

    parameters: weights of the model, a quantised one counted as one. bytes: data of all tensors. files: weight file ->
    size in bytes. dtypes: dtype -> number of tensors. quantization: format, bits, group_size, sym, desc_act and number
    of modules as the tensors themselves show them, None when they are not quantised. problems: one sentence each,
    empty when nothing is wrong.
    """

    path: str
    architecture: str | None
    model_type: str | None
    parameters: int
    bytes: int
    files: dict[str, int]
    dtypes: dict[str, int]
    quantization: dict[str, Any] | None
    tokenizer: bool
    chat_template: bool
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(path: Path, progress: Progress | None = None) -> InspectReport:
    """Describe the checkpoint at `path`. Reads every floating-point tensor once, to look for NaN and infinity.

    Raises BadInput when it is too damaged to be described: what Checkpoint.open refuses, and quantised modules whose
    tensors do not fit each other.
    """
    checkpoint = Checkpoint.open(path)
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    modules = _modules(checkpoint.tensors, found)
    problems = list(found.disagreements) if found else _unfounded_claim(checkpoint)
    problems += config_problems(checkpoint.config, modules)
    problems += _dtype_problems(checkpoint, quantized=found is not None)
    problems += _file_problems(checkpoint)
    problems += _not_finite(checkpoint, progress or NullProgress())
    quantization = found.to_dict() if found else None
    if quantization is not None:
        del quantization["disagreements"]  # they are among the problems
    architectures = checkpoint.config.get("architectures")
    return InspectReport(
        path=str(path),
        architecture=architectures[0] if isinstance(architectures, list) and architectures else None,
        model_type=checkpoint.config.get("model_type"),
        parameters=sum(math.prod(module.shape) for name, module in modules.items() if not name.endswith("inv_freq")),
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        files={file.name: file.stat().st_size for file in checkpoint.weight_files},
        dtypes=dict(sorted(Counter(info.dtype for info in checkpoint.tensors.values()).items())),
        quantization=quantization,
        tokenizer=any(file.name in _TOKENIZER_NAMES for file in checkpoint.side_files),
        chat_template=has_chat_template(checkpoint),
        problems=problems,
    )


def _modules(tensors: Mapping[str, TensorInfo], found: QuantizationFound | None) -> dict[str, ModuleShape]:
    """Every weight under the name it has when nothing is quantised, `x.weight` for a quantised module x."""
    modules = {}
    layouts = found.layouts if found else {}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in layouts or part not in _QUANTIZED_PARTS:
            modules[name] = ModuleShape(info.shape, quantized=False)
    for module, layout in layouts.items():
        modules[f"{module}.weight"] = ModuleShape((layout.out_features, layout.in_features), quantized=True)
    return modules


def _unfounded_claim(checkpoint: Checkpoint) -> list[str]:
    try:
        claim = claimed_format(checkpoint.config)
    except (BadInput, KeyError, TypeError, AttributeError):
        claim = "of an unknown kind"
    if claim is None:
        return []
    return [f"config.json has a quantization_config ({claim}); no quantised tensors of a format known here were found"]


def _dtype_problems(checkpoint: Checkpoint, quantized: bool) -> list[str]:
    if quantized:  # the configured dtype is then that of the computation
        return []
    config = checkpoint.config
    text = config.get("text_config")
    said = config.get("dtype") or config.get("torch_dtype") or (isinstance(text, dict) and text.get("dtype"))
    wanted = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}.get(str(said))
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    stored = sizes.most_common(1)[0][0]
    if wanted is None or stored == wanted:
        return []
    return [f"config.json says dtype {said}, most weights are stored as {stored}"]


def _file_problems(checkpoint: Checkpoint) -> list[str]:
    problems = []
    names = {file.name: file for file in checkpoint.side_files}
    if not names.keys() & _TOKENIZER_NAMES:
        problems.append("no tokenizer files")
    for name, file in names.items():
        if file.suffix != ".json":
            continue
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            problems.append(f"{name}: not valid JSON: {error}")
            continue
        if name == "tokenizer.json":
            problems += _tokenizer_problems(document, checkpoint.config)
    index = checkpoint.directory / INDEX_NAME
    if index.is_file():
        metadata = read_json_object(index).get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
        if said is not None and said != stored:
            problems.append(f"{INDEX_NAME} says total_size {said}, the tensors have {stored} bytes")
    return problems


def _tokenizer_problems(document: Any, config: Mapping[str, Any]) -> list[str]:
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    try:
        vocab = document["model"]["vocab"]
        # BPE and WordPiece map token -> id, Unigram lists tokens in the order of their ids
        ids = [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1]
        largest = max([*ids, *(token["id"] for token in document.get("added_tokens", []))])
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["tokenizer.json: not a tokenizer"]
    if isinstance(size, int) and largest >= size:
        return [f"tokenizer.json has token id {largest}, vocab_size in config.json is {size}"]
    return []


def has_chat_template(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says how a chat is put into a prompt."""
    for file in checkpoint.side_files:
        if file.name in ("chat_template.jinja", "chat_template.json"):
            return True
        if file.name == "tokenizer_config.json":
            try:
                if read_json_object(file).get("chat_template"):
                    return True
            except BadInput:
                continue  # _file_problems names it
    return False


def _not_finite(checkpoint: Checkpoint, progress: Progress) -> list[str]:
    problems = []
    tensors = [info for info in checkpoint.tensors.values() if info.dtype in _EXPONENTS]
    with progress.task("read weights", sum(info.nbytes for info in tensors), "B") as task:
        for info in tensors:
            kind, exponent = _EXPONENTS[info.dtype]
            mask = kind(exponent)
            bad = 0
            for chunk in iter_chunks(info):
                bad += int(np.count_nonzero((chunk.view(kind) & mask) == mask))
                task.advance(chunk.nbytes)
            if bad:
                count = math.prod(info.shape)
                problems.append(f"{info.path.name}: tensor {info.name}: {bad} of {count} values are NaN or infinite")
    return problems
