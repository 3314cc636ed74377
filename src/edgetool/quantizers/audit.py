"""After writing: read everything back and hold it against what was meant."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import psutil
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.errors import BadInput, VerificationFailed
from edgetool.models import generation
from edgetool.models.architectures import map_layers
from edgetool.models.streamed import StreamedModel, load_tokenizer
from edgetool.progress import Progress, Task
from edgetool.quantizers.storage import storage_chunks, stored_dtype_of
from edgetool.runs import memory_peak_bytes

QUESTION = "What is the capital of France?"
SMOKE_TOKENS = 16
SPEAKING_SURENESS = 0.05
"""A model that gives its own first choices less than this on average is untrained."""


def audit(
    output: Checkpoint,
    source: Checkpoint,
    spec: Spec,
    format_name: str,
    expected_crc32: Mapping[str, int],
    changed: set[str],
    dtype: str,
    progress: Progress,
) -> dict[str, Any]:
    """Compare every tensor of `output` with what the engine meant to write.

    expected_crc32: module -> CRC-32 of its dequantised float32 values as the engine used them; the values are read
        back here through the format's reader, so that packing, zeros and scales are all covered.
    changed: names of 16-bit tensors that AWQ folded a scale into; all others must equal the source's.
    Returns counts for the manifest. Raises VerificationFailed naming the first tensor that is wrong.
    """
    try:
        with progress.task("verify", len(output.tensors), "tensor") as task:
            checked = _check_modules(output, spec, format_name, expected_crc32, task)
            _check_others(output, source, checked, expected_crc32, changed, dtype, task)
    except BadInput as error:  # the readers blame their input, which here is what has just been written
        raise VerificationFailed(f"the output is damaged: {error.message}") from error
    return {
        "tensors": len(output.tensors),
        "quantized_modules": len(expected_crc32),
        "values": "crc32 of every module",
    }


def _check_modules(
    output: Checkpoint, spec: Spec, format_name: str, expected_crc32: Mapping[str, int], task: Task
) -> set[str]:
    """Compare the quantised modules and what config.json says of them; returns the names of their tensors."""
    written_as = format_name if format_name.startswith("gptq") else None
    found = detect(output.tensors, output.read, output.config, written_as=written_as)
    if found is None or claimed_quantization(output.config) is None:
        raise VerificationFailed("the output is not recognised as a quantised checkpoint")
    for module in sorted(set(found.modules) ^ set(expected_crc32)):
        wrong = "should not be quantised" if module in found.modules else "is not quantised in the output"
        raise VerificationFailed(f"{module} {wrong}")
    seen, meant = (found.format, found.bits, found.sym or not spec.sym), (format_name, spec.bits, True)
    if seen != meant or found.disagreements:
        detail = "; ".join(found.disagreements) or f"found {seen}, meant {meant}"
        raise VerificationFailed(f"the output's tensors and its config.json disagree: {detail}")
    checked: set[str] = set()
    for module, crc in expected_crc32.items():
        linear = read_linear(output, module, found)
        layout = FORMATS[format_name].layout(linear.out_features, linear.in_features, spec)
        for suffix, (kind, shape) in layout.items():
            name = f"{module}.{suffix}"
            info = output.tensors.get(name)
            if info is None or (info.dtype, info.shape) != (kind, shape):
                raise VerificationFailed(f"{name} is {info and (info.dtype, info.shape)}, meant {(kind, shape)}")
            checked.add(name)
        if zlib.crc32(linear.dequantize().data) != crc:
            raise VerificationFailed(f"{module}: the values read back are not those that were written")
        task.advance(len(layout))
    return checked


def _check_others(
    output: Checkpoint,
    source: Checkpoint,
    checked: set[str],
    modules: Collection[str],
    changed: set[str],
    dtype: str,
    task: Task,
) -> None:
    """Compare every tensor that is not quantised with the source's, both ways."""
    replaced = {f"{module}.weight" for module in modules}
    for name, info in output.tensors.items():
        if name in checked:
            continue
        if name not in source.tensors or name in replaced:
            raise VerificationFailed(f"{name} should not be in the output")
        original = source.tensors[name]
        kinds = {stored_dtype_of(original.dtype, dtype)} | ({dtype} if name in changed else set())
        if info.shape != original.shape or info.dtype not in kinds:
            meant = f"{' or '.join(sorted(kinds))} {list(original.shape)}"
            raise VerificationFailed(f"{name} is {info.dtype} {list(info.shape)}, meant {meant}")
        # Reading through storage_chunks checks for NaN and infinity on the way.
        written = _crc(storage_chunks(info, dtype))
        if name not in changed and written != _crc(storage_chunks(original, dtype)):
            raise VerificationFailed(f"{name} is not the source's tensor")
        task.advance()
    if map_layers(source.config, source.tensors).lm_head is None:
        replaced |= {name for name in source.tensors if name.endswith("lm_head.weight")}  # a copy of the embedding
    missing = sorted(set(source.tensors) - set(output.tensors) - replaced)
    if missing:
        raise VerificationFailed(f"{missing[0]} is missing in the output ({len(missing)} tensors are)")


def _crc(chunks: Any) -> int:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk.data, crc)
    return crc


def smoke(output: StreamedModel, source: StreamedModel, progress: Progress) -> dict[str, Any]:
    """A short greedy answer of the quantised model, checked not to be degenerate.

    Raises VerificationFailed if it is, unless the original does no better: it is degenerate too, or so unsure of its
    tokens that they mean nothing (random weights). Then `degenerate` in the result says what was seen.
    """
    tokenizer = load_tokenizer(output.checkpoint)
    prompt = generation.chat_prompt(tokenizer, QUESTION)
    progress.note("trying the result: a short generation")
    tokens = _answer(output, prompt, tokenizer.eos_token_id)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    reason = generation.degenerate(tokens)
    if reason is not None and _speaks(source, prompt, tokenizer.eos_token_id):
        raise VerificationFailed(
            f"the quantised model does not generate language: {reason} (the original does): {text!r}",
            "use more bits, a smaller --group-size, or more calibration samples",
        )
    return {"prompt": QUESTION, "text": text, "degenerate": reason}


def _answer(
    model: StreamedModel, prompt: torch.Tensor, stop: int | None, choose: generation.Choose = generation.greedy
) -> list[int]:
    spare = _spare_bytes(model.device)
    made = generation.generate(model, prompt, SMOKE_TOKENS, choose, stop=stop, keep_bytes=spare)
    return [int(token) for token in made[0]]


def _speaks(model: StreamedModel, prompt: torch.Tensor, stop: int | None) -> bool:
    """Whether the model's own answer is no babble and its tokens are more than the first of many equals."""
    sureness: list[float] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        sureness.append(float(logits[0].softmax(0).max()))
        return generation.greedy(logits)

    if generation.degenerate(_answer(model, prompt, stop, choose)) is not None:
        return False
    return not sureness or sum(sureness) / len(sureness) >= SPEAKING_SURENESS


def _spare_bytes(device: torch.device) -> int:
    """What a check may take without needing more memory than the run before it did; on a GPU, half of what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return max(0, memory_peak_bytes() - psutil.Process().memory_info().rss) * 3 // 4


def gpu_peak_bytes(device: torch.device) -> int | None:
    """Most memory torch held on the device so far, None for the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
