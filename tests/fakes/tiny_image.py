"""A compiled image of a tiny random model with a real tokenizer and chat template: it answers, with nonsense."""

from __future__ import annotations

from pathlib import Path

from edgetool.config import CommonConfig, CompileConfig
from edgetool.fpga.job import compile_checkpoint
from edgetool.progress import NullProgress
from tests.fakes.quantized_models import Shape, make_quantized
from tests.fakes.tiny_models import VOCAB_SIZE, tiny_tokenizer


def make_tiny_image(directory: Path, *, max_context: int = 512) -> Path:
    """Write the checkpoint to `directory`/q and its image to `directory`/image, and return the latter."""
    made = make_quantized(directory / "q", "llama", shape=Shape(vocab=VOCAB_SIZE))
    tiny_tokenizer().save_pretrained(made.path)
    image = directory / "image"
    config = CompileConfig(model=str(made.path), output=image, lm_head="rtn4", jobs=1, max_context=max_context)
    compile_checkpoint(config, CommonConfig(offline=True), NullProgress())
    return image
