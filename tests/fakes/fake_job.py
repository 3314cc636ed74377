"""A stand-in for `edgetool.quantizers.job`, so that the command line is tested without torch and in no time.

As a script it is `edgetool` with that stand-in: `python fake_job.py quantize demo -o out --json`. What the job does is
said by the variable FAKE_JOB: the name of an error class, or bug, print, sleep, plan; nothing = success.
"""

from __future__ import annotations

import os
import sys
import time
import types
from typing import Any

from edgetool import errors

RESULT: dict[str, Any] = {
    "output": "out",
    "model": "demo",
    "backend": "native",
    "method": "gptq",
    "format": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
    "quantized_modules": 210,
    "seconds": 12.5,
    "peak_rss_bytes": 650_000_000,
    "source_bytes": 270_000_000,
    "output_bytes": 112_000_000,
    "worst_modules": [
        {"module": "model.layers.29.mlp.a_very_long_module_name_indeed.down_proj", "relative_error": 0.12}
    ],
    "smoke": {"prompt": "The sky is", "text": " blue ☀"},
    "warnings": ["something to know"],
}
PLAN: dict[str, Any] = {
    "model": "demo",
    "architecture": "llama",
    "output": "out",
    "method": "gptq",
    "format": "gptq",
    "bits": 4,
    "group_size": 64,
    "sym": True,
    "desc_act": False,
    "device": "cpu",
    "quantized_modules": 210,
    "calibration_tokens": 65_536,
    "memory": {"needed_bytes": 650_000_000, "available_bytes": 8_000_000_000},
    "disk": {"needed_bytes": 224_000_000, "free_bytes": 900_000_000_000, "output_bytes": 112_000_000},
    "time": {"expected_s": 90.0},
    "kernels": [
        {"name": "gptq_marlin", "ok": True, "why": ""},
        {"name": "machete", "ok": False, "why": "needs Hopper"},
    ],
    "vcu128": [{"name": "sim", "ok": True, "why": ""}],
}


def run_quantize(config: Any, common: Any, progress: Any) -> dict[str, Any]:
    """Behave as FAKE_JOB says."""
    todo = os.environ.get("FAKE_JOB", "")
    with progress.task("quantise", 3, "layer") as task:
        for layer in range(3):
            task.advance(1, f"model.layers.{layer}")
        progress.note("a note")
        progress.warn("a warning")
    if todo == "bug":
        raise ValueError("a bug of ours")
    if todo == "interrupt":
        raise KeyboardInterrupt
    if todo == "print":
        print("a library talks on stdout")
        os.system("echo a child talks on stdout")
    if todo == "sleep":
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    if todo == "nan":
        return {**RESULT, "worst_modules": [{"module": "m", "relative_error": float("nan")}]}
    if hasattr(errors, todo):
        raise getattr(errors, todo)("what was wrong", None if todo == "Stopped" else "what to do")
    return {"plan": PLAN} if todo == "plan" or config.dry_run else {**RESULT, "output": str(config.output)}


def install() -> types.ModuleType:
    """Put the stand-in where the command imports the job from."""
    module = types.ModuleType("edgetool.quantizers.job")
    module.run_quantize = run_quantize  # type: ignore[attr-defined]
    sys.modules["edgetool.quantizers.job"] = module
    return module


if __name__ == "__main__":
    install()
    from edgetool.cli import app

    app()
