"""What another tool wrote, held against the model it was made of: nothing is believed because a tool ended well."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import detect, read_linear
from edgetool.checkpoints.formats import Spec
from edgetool.checkpoints.tensor_file import TensorInfo
from edgetool.errors import BadInput, VerificationFailed
from edgetool.progress import Progress, Task

WORTHLESS_ERROR = 1.0
"""A weight_error from which on zeros would do as well."""


def check_output(
    output: Checkpoint,
    source: Checkpoint,
    modules: Collection[str],
    spec: Spec,
    format_name: str,
    *,
    scaled: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Compare every tensor of `output` with the model `source`; returns a report for each of `modules`, in their order.

    scaled: the tool moves scales between weights and norms (AWQ), so that only whole outputs can be compared; reports
        then have no weight_error.
    Raises VerificationFailed naming the first tensor that is missing, foreign, of another shape, worthless or, where it
    is not quantised, other than the source's (rounding to 16 bits apart).
    """
    try:
        with progress.task("check", len(modules) + len(source.tensors), "tensor") as task:
            reports = _modules(output, source, modules, spec, format_name, scaled, task)
            _others(output, source, set(modules), scaled, task)
    except BadInput as error:
        raise VerificationFailed(f"what the backend wrote is damaged: {error.message}") from error
    return reports


def _modules(
    output: Checkpoint,
    source: Checkpoint,
    modules: Collection[str],
    spec: Spec,
    format_name: str,
    scaled: bool,
    task: Task,
) -> list[dict[str, Any]]:
    found = detect(output.tensors, output.read, output.config, written_as="gptq" if format_name == "gptq" else None)
    if found is None:
        raise VerificationFailed("the backend's output is not a quantised checkpoint")
    for module in sorted(set(found.modules) ^ set(modules)):
        wrong = "was quantised and should not be" if module in found.modules else "was not quantised"
        raise VerificationFailed(f"{module} {wrong}")
    seen = (found.format, found.bits, found.group_size, found.sym or not spec.sym)
    if seen != (format_name, spec.bits, spec.group_size, True):
        raise VerificationFailed(
            f"asked for {format_name}, {spec.bits} bits, group {spec.group_size}{', symmetric' if spec.sym else ''}; "
            f"the backend wrote {found.format}, {found.bits} bits, group {found.group_size}"
        )
    reports = []
    for module in modules:
        linear = read_linear(output, module, found)
        info = source.tensors[f"{module}.weight"]
        if (linear.out_features, linear.in_features) != info.shape:
            raise VerificationFailed(
                f"{module} is [{linear.out_features}, {linear.in_features}], the model's is {list(info.shape)}"
            )
        values = linear.dequantize()
        report: dict[str, Any] = {"module": module}
        if not scaled:
            report["weight_error"] = weight_error(values, plain(source, info))
            if report["weight_error"] >= WORTHLESS_ERROR:
                off = f"{report['weight_error']:.2f} of their size"
                raise VerificationFailed(f"{module}: its weights are off by {off}: the backend has spoilt it")
        reports.append(report)
        task.advance()
    return reports


def _others(output: Checkpoint, source: Checkpoint, modules: set[str], scaled: bool, task: Task) -> None:
    replaced = {f"{module}.weight" for module in modules}
    packed = {name for name in output.tensors if name.rpartition(".")[0] in modules and not name.endswith(".bias")}
    for name, info in source.tensors.items():
        task.advance()
        if name in replaced:
            continue
        written = output.tensors.get(name)
        if written is None:
            if name.endswith("lm_head.weight"):  # a copy of the embedding, which tools leave out
                continue
            raise VerificationFailed(f"{name} is missing in what the backend wrote")
        if written.shape != info.shape:
            raise VerificationFailed(f"{name} is {list(written.shape)}, the model's is {list(info.shape)}")
        theirs, ours = plain(output, written), plain(source, info)
        if not np.isfinite(theirs).all():
            raise VerificationFailed(f"{name} holds NaN or infinity")
        may_differ = scaled and ".layers." in name
        # rounding a 16-bit number to the other 16-bit kind costs at most half a unit of 8 bits
        if not may_differ and not np.allclose(theirs, ours, rtol=2.0**-8, atol=2.0**-24):
            raise VerificationFailed(f"{name} is not quantised, and is not the model's either")
    foreign = sorted(set(output.tensors) - set(source.tensors) - packed)
    if foreign and not all(name.endswith("lm_head.weight") for name in foreign):
        raise VerificationFailed(f"{foreign[0]} is in what the backend wrote and not in the model")


def plain(checkpoint: Checkpoint, info: TensorInfo) -> Any:
    """A stored float tensor as float32."""
    array = checkpoint.read(info.name)
    return bfloat16_to_float32(array) if info.dtype == "BF16" else np.asarray(array, dtype=np.float32)


def weight_error(values: Any, original: Any) -> float:
    """Frobenius norm of the difference over that of the original, float32 arrays of one shape.

    Not the engine's relative_error, which weighs by the calibration text what the outputs lose.
    """
    norm = float(np.linalg.norm(original))
    return float(np.linalg.norm(values - original)) / norm if norm else float(np.linalg.norm(values) > 0)


def worst(reports: Collection[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The reports with the largest errors; none where errors are not known."""
    known = [dict(report) for report in reports if "weight_error" in report]
    return sorted(known, key=lambda report: -float(report["weight_error"]))[:count]
