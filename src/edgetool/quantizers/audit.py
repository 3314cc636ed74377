"""After writing: read everything back and hold it against what was meant."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.errors import VerificationFailed
from edgetool.models import generation
from edgetool.models.streamed import StreamedModel, load_tokenizer
from edgetool.progress import Progress
from edgetool.quantizers.storage import storage_chunks

QUESTION = "What is the capital of France?"
SMOKE_TOKENS = 16
SMOKE_KEEP_BYTES = 0
"""The check must not need more memory than the run before it did."""


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
    found = detect(output.tensors, output.read, output.config)
    if found is None or claimed_quantization(output.config) is None:
        raise VerificationFailed("the output is not recognised as a quantised checkpoint")
    seen = (found.format, found.bits, found.sym or not spec.sym, sorted(found.modules))
    meant = (format_name, spec.bits, True, sorted(expected_crc32))
    if seen != meant or found.disagreements:
        detail = (
            "; ".join(found.disagreements) or f"found {seen[:3]} in {len(found.modules)} modules, meant {meant[:3]}"
        )
        raise VerificationFailed(f"the output's tensors and its config.json disagree: {detail}")
    checked: set[str] = set()
    with progress.task("verify", len(output.tensors), "tensor") as task:
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
        for name, info in output.tensors.items():
            if name in checked:
                continue
            if any(name.startswith(f"{module}.") and not name.endswith(".bias") for module in expected_crc32):
                raise VerificationFailed(f"{name} should not be in the output")
            if name not in source.tensors:
                raise VerificationFailed(f"{name} is not a tensor of the source")
            original = source.tensors[name]
            if math.prod(info.shape) != math.prod(original.shape):
                raise VerificationFailed(f"{name} has shape {list(info.shape)}, the source's {list(original.shape)}")
            # Reading through storage_chunks checks for NaN and infinity on the way.
            written = _crc(storage_chunks(info, dtype))
            if name not in changed and written != _crc(storage_chunks(original, dtype)):
                raise VerificationFailed(f"{name} is not the source's tensor")
            checked.add(name)
            task.advance()
    return {"tensors": len(checked), "quantized_modules": len(expected_crc32), "values": "crc32 of every module"}


def _crc(chunks: Any) -> int:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk.data, crc)
    return crc


def smoke(output: StreamedModel, source: StreamedModel, progress: Progress) -> dict[str, Any]:
    """A short greedy answer of the quantised model, checked not to be degenerate.

    A model whose original is degenerate on the same prompt (an untrained one) passes with `degenerate` saying so.
    Raises VerificationFailed otherwise.
    """
    tokenizer = load_tokenizer(output.checkpoint)
    prompt = generation.chat_prompt(tokenizer, QUESTION)
    progress.note("trying the result: a short generation")
    tokens = _answer(output, prompt, tokenizer.eos_token_id)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    reason = generation.degenerate(tokens)
    if reason is not None and generation.degenerate(_answer(source, prompt, tokenizer.eos_token_id)) is None:
        raise VerificationFailed(
            f"the quantised model does not generate language: {reason} (the original does): {text!r}",
            "use more bits, a smaller --group-size, or more calibration samples",
        )
    return {"prompt": QUESTION, "text": text, "degenerate": reason}


def _answer(model: StreamedModel, prompt: torch.Tensor, stop: int | None) -> list[int]:
    made = generation.generate(model, prompt, SMOKE_TOKENS, stop=stop, keep_bytes=SMOKE_KEEP_BYTES)
    return [int(token) for token in made[0]]


def memory_peak_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_peak_bytes(device: torch.device) -> int | None:
    """Most memory torch held on the device so far, None for the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
