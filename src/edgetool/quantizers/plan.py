"""The plan of a quantisation: whether it is legal, what it will cost, and who can run the result."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.legality import kernels, vcu128
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES
from edgetool.config import QuantizeConfig
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.models.architectures import FAMILIES, LINEARS_PER_LAYER, STAGES, LayerMap
from edgetool.progress_lines import size as readable
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.storage import stored_dtype_of
from edgetool.runs import available_memory_bytes, free_disk_bytes

GROUP_SIZES = (128, 64, 32)
_INTERPRETER_BYTES = 380 * 2**20
"""Python with torch and transformers imported, measured."""


@dataclass(frozen=True)
class Costs:
    """Estimates. memory: peak of this process (or of the GPU); disk: extra space while running; output: what stays."""

    memory_bytes: int
    disk_bytes: int
    output_bytes: int
    multiplications: float


def check_shapes(checkpoint: Checkpoint, layers: LayerMap, recipe: Recipe, *, lm_head: bool) -> list[tuple[int, int]]:
    """(in_features, out_features) of every distinct linear that will be quantised.

    Raises BadInput for missing tensors, and for widths that the group size or the packing does not divide.
    """
    shapes: set[tuple[int, int]] = set()
    names = layers.quantizable()
    if lm_head:
        names.append(layers.lm_head or layers.embedding)
    widths: dict[int, str] = {}
    for name in names:
        info = checkpoint.tensors.get(name)
        if info is None:
            raise BadInput(
                f"{checkpoint.directory}: tensor {name} is missing (config.json promises {layers.n_layers} layers)"
            )
        if len(info.shape) != 2:
            raise BadInput(f"{name} has shape {list(info.shape)}; must be [out_features, in_features]")
        if info.dtype not in ("F16", "BF16", "F32", "F64"):
            raise BadInput(f"{name} is stored as {info.dtype}, not as a 16- or 32-bit float: quantised already?")
        shapes.add((info.shape[1], info.shape[0]))
        widths.setdefault(info.shape[1], name.removesuffix(".weight"))
    size = recipe.group_size
    for width, name in widths.items():
        if size != -1 and width % size:
            fitting = [str(s) for s in GROUP_SIZES if all(other % s == 0 for other in widths)]
            raise BadInput(
                f"group_size {size} does not divide in_features {width} ({name})",
                f"use --group-size {' or '.join(fitting)}"
                if fitting
                else "use --group-size -1 (one group for each row)",
            )
    for width, rows in sorted(shapes):
        for what, value in (("in_features", width), ("out_features", rows)):
            if value % 32:
                raise BadInput(f"{what} {value} is not a multiple of 32, which packed {recipe.bits}-bit weights need")
    return sorted(shapes)


def estimate(
    checkpoint: Checkpoint, layers: LayerMap, recipe: Recipe, spec: Spec, format_name: str, dtype: str, tokens: int
) -> Costs:
    """What the run will take, from shapes alone."""
    first = [checkpoint.tensors[f"{name}.weight"].shape for name in layers.linear_names(0)]
    layer_weights = sum(math.prod(shape) for shape in first)
    quantized = set(layers.quantizable())
    packed = 0
    for name in quantized:
        rows, width = checkpoint.tensors[name].shape
        for kind, shape in FORMATS[format_name].layout(rows, width, spec).values():
            packed += math.prod(shape) * int(NUMPY_DTYPES[kind].itemsize)
    rest = sum(
        math.prod(info.shape) * int(NUMPY_DTYPES[stored_dtype_of(info.dtype, dtype)].itemsize)
        for name, info in checkpoint.tensors.items()
        if name not in quantized
    )
    widest = max(shape[1] for shape in first)
    streams = 2 if recipe.asymmetric_calibration > 0 else 1
    # The layer in the compute dtype, and of the stage being solved: about six copies of its weights in float32 and,
    # with calibration, its Gram matrix and the factor of it (measured; the cross moments come on top). A fifth more,
    # since memory that was given back is not always taken again.
    matrices = (1 + streams) if tokens else 0
    stages = []
    for stage in STAGES:
        shapes = [checkpoint.tensors[f"{layers.layer_prefix(0)}{name}.weight"].shape for name in stage.linears]
        stages.append(sum(math.prod(shape) for shape in shapes) * 24 + shapes[0][1] ** 2 * 4 * matrices)
    working = (layer_weights * 2 * streams + max(stages)) * 6 // 5
    hidden = tokens * layers.hidden_size * 4
    disk = packed + rest + packed + streams * (2 * hidden + tokens * widest * 2)
    forward = 2.0 * tokens * layer_weights * streams
    grams = sum(2.0 * tokens * width**2 for width in {shape[1] for shape in first}) * streams * 2
    solving = sum(2.0 * shape[0] * shape[1] ** 2 * 3 for shape in first) if recipe.method == "gptq" else 0.0
    return Costs(int(working), int(disk), packed + rest, (forward + grams + solving) * layers.n_layers)


def make_plan(
    config: QuantizeConfig,
    checkpoint: Checkpoint,
    layers: LayerMap,
    recipe: Recipe,
    spec: Spec,
    dtype: str,
    device: str,
    gpu_free_bytes: int | None,
) -> dict[str, Any]:
    """The resolved plan as a document. Raises where the run cannot succeed: bad shapes, no memory, no disk."""
    reason = FORMATS[config.format].check(spec)
    if reason is not None:
        raise BadInput(f"format {config.format}: {reason}", "choose another --format")
    if config.quantize_lm_head and config.format != "gptq":
        raise BadInput(f"format {config.format} cannot hold a quantised lm_head", "use --format gptq")
    shapes = check_shapes(checkpoint, layers, recipe, lm_head=config.quantize_lm_head)
    tokens = config.calib_samples * config.calib_seqlen if recipe.method != "rtn" else 0
    costs = estimate(checkpoint, layers, recipe, spec, config.format, dtype, tokens)
    available = gpu_free_bytes if gpu_free_bytes is not None else available_memory_bytes()
    needed = costs.memory_bytes + (0 if gpu_free_bytes is not None else _INTERPRETER_BYTES)
    if needed > available:
        where = "on the GPU" if gpu_free_bytes is not None else "of memory"
        raise ResourceUnavailable(
            f"quantising needs about {readable(needed)} {where}, {readable(available)} are free",
            "free some, or use another --device",
        )
    free_disk = free_disk_bytes(config.output, costs.disk_bytes, "quantising")
    text = layers.text_config
    head_dim = int(text.get("head_dim") or layers.hidden_size // int(text.get("num_attention_heads", 1)))
    arguments = (recipe.bits, recipe.group_size, recipe.sym, recipe.desc_act)
    return {
        "model": str(checkpoint.directory),
        "architecture": FAMILIES[layers.model_type],
        "output": str(config.output),
        "method": recipe.method,
        "format": config.format,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.sym,
        "desc_act": recipe.desc_act,
        "device": device,
        "quantized_modules": layers.n_layers * len(LINEARS_PER_LAYER) + int(config.quantize_lm_head),
        "calibration_tokens": tokens,
        "memory": {"needed_bytes": needed, "available_bytes": int(available)},
        "disk": {"needed_bytes": costs.disk_bytes, "free_bytes": free_disk, "output_bytes": costs.output_bytes},
        "time": {"expected_s": round(expected_seconds(costs, layers, device, recipe), 1)},
        "kernels": [{"name": k.name, "ok": k.ok, "why": k.why} for k in kernels(config.format, *arguments, shapes)],
        "vcu128": [
            {"name": v.name, "ok": v.ok, "why": v.why}
            for v in vcu128(*arguments, head_dim, qk_norm=layers.model_type == "qwen3")
        ],
    }


def expected_seconds(costs: Costs, layers: LayerMap, device: str, recipe: Recipe) -> float:
    """A rough time: products at a measured rate, plus the steps over input channels that do not overlap."""
    rate = 2e14 if device.startswith("cuda") else 1.2e11 * (os.cpu_count() or 1)
    channels = layers.n_layers * 4 * layers.hidden_size if recipe.method == "gptq" else 0
    return 10.0 + costs.multiplications / rate + channels * 60e-6


def free_gpu_bytes(device: Any) -> int | None:
    """Free memory of a CUDA device, None for the CPU."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
