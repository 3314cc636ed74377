"""`edgetool demo`: the real small model, quantised, measured and asked, so that a newcomer sees it work."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetool.artifacts import MANIFEST_NAME
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.sources import resolve_configured
from edgetool.config import CommonConfig, DemoConfig, QuantizeConfig
from edgetool.errors import BadInput
from edgetool.progress import Progress
from edgetool.quantizers.job import run_quantize

if TYPE_CHECKING:
    from edgetool.models.streamed import StreamedModel

QUESTION = "Why is the sky blue? Answer in one sentence."
ANSWER_TOKENS = 48
CONTEXT = 512
EVALUATION_TOKENS = 8192


def evaluation_text() -> str:
    """English prose that no calibration text of edgetool contains (public domain; see data/README.md)."""
    return files("edgetool.data").joinpath("held_out.txt").read_text(encoding="utf-8")


def what_is_measured() -> str:
    """On what `held_out_perplexity` is measured, in words."""
    return f"{EVALUATION_TOKENS} tokens of held-out prose, context {CONTEXT}"


def held_out_perplexity(model: StreamedModel, tokenizer: Any, name: str, progress: Progress) -> float:
    """Perplexity of the held-out prose, by edgetool's own forward pass whatever made the checkpoint."""
    from edgetool.models import perplexity

    ids = tokenizer(evaluation_text(), verbose=False)["input_ids"]
    windows = perplexity.windows(ids, CONTEXT, EVALUATION_TOKENS)
    return perplexity.measure(model, windows, progress, f"perplexity of {name}").perplexity


def run_demo(config: DemoConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Quantise the demo model to 4 bits in groups of 64, and compare size, perplexity and an answer.

    An earlier demo at the output's place is replaced. Raises BadInput for anything else that is there.
    """
    _refuse_other_work(config.output)
    quantized = run_quantize(
        QuantizeConfig(
            model="demo",
            output=config.output,
            group_size=64,
            calib_samples=32,
            calib_seqlen=512,
            overwrite=True,
            threads=config.threads,
        ),
        common,
        progress,
    )
    source = resolve_configured("demo", common, None, progress).path
    original = _measure(Checkpoint.open(source), "original", config.threads, progress)
    result = _measure(Checkpoint.open(config.output), "quantised", config.threads, progress)
    return {
        "output": str(config.output),
        "comparison": [original, result],
        "perplexity_ratio": result["perplexity"] / original["perplexity"],
        "size_ratio": result["weights_bytes"] / original["weights_bytes"],
        "perplexity_text": what_is_measured(),
        "question": QUESTION,
        "answers": [{"model": m["model"], "answer": m.pop("answer")} for m in (original, result)],
        "quantize_seconds": quantized["seconds"],
        "peak_rss_bytes": quantized["peak_rss_bytes"],
    }


def _refuse_other_work(output: Path) -> None:
    manifest = output / MANIFEST_NAME
    if not manifest.is_file():
        return  # what edgetool did not write is refused where the output is opened
    try:
        model = json.loads(manifest.read_bytes())["result"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        model = None
    if model != "demo":
        raise BadInput(f"output {output} exists already, and holds no demo", "choose another --output")


def _measure(checkpoint: Checkpoint, name: str, threads: int | None, progress: Progress) -> dict[str, Any]:
    import torch

    from edgetool.models import generation
    from edgetool.models.devices import fast_dtype
    from edgetool.models.streamed import StreamedModel, load_tokenizer

    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    model = StreamedModel(checkpoint, device, fast_dtype(device))
    tokenizer = load_tokenizer(checkpoint)
    measured = held_out_perplexity(model, tokenizer, name, progress)
    prompt = generation.chat_prompt(tokenizer, QUESTION)
    progress.note(f"asking the {name} model")
    tokens = generation.generate(model, prompt, ANSWER_TOKENS, stop=tokenizer.eos_token_id)[0].tolist()
    return {
        "model": name,
        "weights_bytes": sum(path.stat().st_size for path in checkpoint.weight_files),
        "perplexity": measured,
        "answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
    }
