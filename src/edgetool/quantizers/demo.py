"""`edgetool demo`: the real small model, quantised, measured and asked, so that a newcomer sees it work."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.sources import resolve_configured
from edgetool.config import CommonConfig, DemoConfig, QuantizeConfig
from edgetool.progress import Progress
from edgetool.quantizers.job import run_quantize

QUESTION = "Why is the sky blue? Answer in one sentence."
ANSWER_TOKENS = 48
CONTEXT = 512
EVALUATION_TOKENS = 8192


def evaluation_text() -> str:
    """English prose that no calibration text of edgetool contains (public domain; see data/README.md)."""
    return files("edgetool.data").joinpath("held_out.txt").read_text(encoding="utf-8")


def run_demo(config: DemoConfig, common: CommonConfig, progress: Progress) -> dict[str, Any]:
    """Quantise the demo model to 4 bits in groups of 64, and compare size, perplexity and an answer."""
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
        "perplexity_text": f"{EVALUATION_TOKENS} tokens of held-out prose, context {CONTEXT}",
        "question": QUESTION,
        "answers": [{"model": m["model"], "answer": m.pop("answer")} for m in (original, result)],
        "quantize_seconds": quantized["seconds"],
        "peak_rss_bytes": quantized["peak_rss_bytes"],
    }


def _measure(checkpoint: Checkpoint, name: str, threads: int | None, progress: Progress) -> dict[str, Any]:
    import torch

    from edgetool.models import generation, perplexity
    from edgetool.models.devices import fast_dtype
    from edgetool.models.streamed import StreamedModel, load_tokenizer

    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    model = StreamedModel(checkpoint, device, fast_dtype(device))
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(evaluation_text(), verbose=False)["input_ids"]
    measured = perplexity.measure(
        model, perplexity.windows(ids, CONTEXT, EVALUATION_TOKENS), progress, f"perplexity, {name}"
    )
    prompt = generation.chat_prompt(tokenizer, QUESTION)
    progress.note(f"asking the {name} model")
    tokens = generation.generate(model, prompt, ANSWER_TOKENS, stop=tokenizer.eos_token_id)[0].tolist()
    return {
        "model": name,
        "weights_bytes": sum(path.stat().st_size for path in checkpoint.weight_files),
        "perplexity": measured.perplexity,
        "answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
    }
