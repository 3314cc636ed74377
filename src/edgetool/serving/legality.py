"""Whether a checkpoint can be served as asked, decided before anything is started.

What stands in vLLM's way ends there, after minutes, in an assertion deep in a worker; here it is one sentence with the
number that would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgetool.checkpoints import legality
from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import ModuleLayout, QuantizationFound, detect
from edgetool.errors import BadInput
from edgetool.models.architectures import VISION_FAMILIES
from edgetool.serving.memory import (
    ACTIVATION_BYTES,
    CPU_OVERHEAD_BYTES,
    DTYPE_BYTES,
    Sizes,
    sizes,
    tokens_that_fit,
)

LOWEST_CAPABILITY = 7.5
"""Below this, vLLM 0.32 has no kernels at all."""
CPU_SEQUENCES = 4
"""Sequences of full length that the cache of a CPU server holds when nothing else was asked for."""
SHORTEST_CONTEXT = 16

_OWN_PROGRAM = "chatglm"
"""model_type whose published tokenizer is a program in the checkpoint, which neither engine is allowed to run."""
_ROW_PARALLEL = ("o_proj", "down_proj", "dense", "wo", "w2")
_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What would serve. capability: compute capability of the GPU, None for a CPU.

    memory_bytes: of one GPU all that it has, of a CPU the memory that is free now.
    """

    capability: float | None
    memory_bytes: int
    name: str


@dataclass(frozen=True)
class Demand:
    """What was asked for; None = not asked for."""

    engine: Literal["vllm", "transformers"]
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True)
class Allowed:
    """The answer: what will be served, and what it takes.

    kv_cache_bytes: room for the cache on each device (on a CPU what is set aside, on a GPU what is left over).
    needed_bytes: on each device, weights and a cache for one sequence of full length included.
    """

    max_model_len: int
    dtype: str
    weights_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int | None
    needed_bytes: int
    warnings: tuple[str, ...]


def look(checkpoint: Checkpoint) -> QuantizationFound | None:
    """The quantisation of a checkpoint, None for a 16-bit one."""
    return detect(checkpoint.tensors, checkpoint.read, checkpoint.config)


def check(checkpoint: Checkpoint, found: QuantizationFound | None, demand: Demand, device: Device) -> Allowed:
    """Decide. Raises BadInput where format, group size, split over GPUs, device or context do not fit."""
    if checkpoint.config.get("model_type") == _OWN_PROGRAM:
        raise BadInput(
            f"{_OWN_PROGRAM} cannot be served by vLLM or transformers without running the program in its checkpoint,"
            " which edgetool never does",
            "compile it: edgetool compile-vcu128, then edgetool serve-fpga",
        )
    warnings: list[str] = []
    dtype = _dtype(checkpoint, demand, device, warnings)
    if demand.engine == "vllm":
        _check_capability(device)
        _check_build(checkpoint, found, dtype, device)
        _check_split(checkpoint, found, demand.tensor_parallel_size)
        if found is not None:
            _check_kernels(checkpoint, found, device, warnings)
        elif checkpoint.config.get("quantization_config"):
            method = _method(checkpoint.config)
            warnings.append(f"quantisation {method!r} is not known here: whether vLLM can run it shows when it starts")
        if "fp8" in demand.kv_cache_dtype and (device.capability or 0) < 8.9:
            raise BadInput(f"kv_cache_dtype {demand.kv_cache_dtype} needs a GPU from 8.9, and this is {device.name}")
    elif demand.tensor_parallel_size != 1:
        raise BadInput("engine transformers runs on one device: tensor_parallel_size must be 1", "use --engine vllm")
    dense = DTYPE_BYTES[dtype] if demand.engine == "transformers" else None
    return _context(sizes(checkpoint, found, dense), demand, device, dtype, warnings)


def _dtype(checkpoint: Checkpoint, demand: Demand, device: Device, warnings: list[str]) -> str:
    if demand.dtype != "auto":
        if demand.dtype == "bfloat16" and device.capability is not None and device.capability < 8.0:
            raise BadInput(f"dtype bfloat16 needs a GPU from 8.0, and this is {device.name}", "use --dtype float16")
        return demand.dtype
    if device.capability is None:
        return "bfloat16"  # fp16 is slower than anything on a CPU, and some of its kernels lack it
    config = checkpoint.config
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if said == "bfloat16" and device.capability < 8.0:
        warnings.append(f"{device.name} has no bfloat16: float16 is used instead")
    return "float16" if said == "float16" or device.capability < 8.0 else "bfloat16"


def _check_capability(device: Device) -> None:
    if device.capability is not None and device.capability < LOWEST_CAPABILITY:
        raise BadInput(
            f"{device.name} has compute capability {device.capability}; vLLM needs {LOWEST_CAPABILITY} or more",
            "use --device cpu, or --engine transformers",
        )


def _check_build(checkpoint: Checkpoint, found: QuantizationFound | None, dtype: str, device: Device) -> None:
    """What vLLM itself says only after it has started."""
    if found is not None and dtype == "float32":
        raise BadInput(
            "vLLM runs quantised checkpoints in float16 or bfloat16, and dtype is float32",
            "leave --dtype out, or use --engine transformers",
        )
    model_type = checkpoint.config.get("model_type")
    if device.capability is None and model_type in VISION_FAMILIES:
        raise BadInput(
            f"{model_type} needs torchvision to load in vLLM, and the environment vllm-cpu has none"
            " (it exists beside CUDA builds of torch only)",
            "use --engine transformers",
        )


def _check_split(checkpoint: Checkpoint, found: QuantizationFound | None, shards: int) -> None:
    """Tensor parallelism cuts heads, the outputs of some linears and the inputs of others: all must come out even."""
    if shards == 1:
        return
    size = sizes(checkpoint, found)
    layouts = found.layouts if found else {}
    fitting = [n for n in (1, 2, 4, 8, 16) if _split_problem(size, layouts, n) is None]
    problem = _split_problem(size, layouts, shards)
    if problem is not None:
        raise BadInput(
            f"tensor_parallel_size {shards} does not fit: {problem}",
            f"sizes that fit: {', '.join(map(str, fitting))}",
        )


def _split_problem(size: Sizes, layouts: Any, shards: int) -> str | None:
    if size.heads and size.heads % shards:
        return f"the model has {size.heads} attention heads"
    if size.kv_heads and size.kv_heads % shards and shards % size.kv_heads:
        return f"the model has {size.kv_heads} key-value heads"
    for name, layout in layouts.items():
        problem = _linear_problem(name, layout, shards)
        if problem is not None:
            return problem
    return None


def _linear_problem(name: str, layout: ModuleLayout, shards: int) -> str | None:
    if name.rpartition(".")[2] in _ROW_PARALLEL:
        part = layout.in_features // shards
        if layout.in_features % shards:
            return f"in_features {layout.in_features} of {name} cannot be cut into {shards}"
        if layout.group_size < layout.in_features and part % layout.group_size:
            return f"a share of {part} inputs of {name} holds no whole number of groups of {layout.group_size}"
        return None
    part = layout.out_features // shards
    packed = 32 // layout.bits  # zeros and AWQ's codes lie packed along the outputs
    if (layout.out_features % shards or part % packed) and name.rpartition(".")[2] not in ("k_proj", "v_proj"):
        return f"out_features {layout.out_features} of {name} cannot be cut into {shards} shares of whole words"
    return None


def _check_kernels(checkpoint: Checkpoint, found: QuantizationFound, device: Device, warnings: list[str]) -> None:
    for name, layout in found.layouts.items():
        if layout.in_features % layout.group_size:
            raise BadInput(
                f"group_size {layout.group_size} does not divide in_features {layout.in_features} ({name}):"
                " no kernel runs this",
                f"quantise again with a group size that divides it: {_divisors(found)}",
            )
    shapes = {(layout.in_features, layout.out_features) for layout in found.layouts.values()}
    verdicts = legality.vllm_kernels(
        device.capability, found.format, found.bits, found.group_size, found.sym, found.desc_act, shapes
    )
    able = [verdict for verdict in verdicts if verdict.ok]
    if not able:
        raise BadInput(
            f"vLLM {legality.VLLM_VERSION} cannot run {checkpoint.directory} on {device.name}: "
            f"{found.format}, {found.bits} bits, group {found.group_size}: {_reasons(verdicts)}",
            "use --engine transformers, which runs every format that edgetool reads, or quantise again",
        )
    if all("package" in verdict.why for verdict in able):
        warnings.append(f"only {able[0].name} can run this ({able[0].why}); it has to be installed beside vLLM")


def _divisors(found: QuantizationFound) -> str:
    fits = [size for size in (128, 64, 32) if all(layout.in_features % size == 0 for layout in found.layouts.values())]
    return ", ".join(f"--group-size {size}" for size in fits) or "--group-size -1"


def _reasons(verdicts: Sequence[legality.KernelVerdict]) -> str:
    by_reason: dict[str, list[str]] = {}
    for verdict in verdicts:
        by_reason.setdefault(verdict.why, []).append(verdict.name.removeprefix("vLLM "))
    if len(by_reason) == 1:
        return next(iter(by_reason))
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())


def _context(size: Sizes, demand: Demand, device: Device, dtype: str, warnings: list[str]) -> Allowed:
    limit = size.context_tokens
    asked = demand.max_model_len
    if asked is not None and limit is not None and asked > limit:
        raise BadInput(
            f"max_model_len {asked} is longer than the model allows: {limit} tokens (config.json)",
            f"use --max-model-len {limit} or less",
        )
    on_cpu = device.capability is None
    shards = demand.tensor_parallel_size
    weights = size.weights_bytes // shards
    overhead = CPU_OVERHEAD_BYTES[demand.engine] if on_cpu else ACTIVATION_BYTES
    share = 1.0 if on_cpu else demand.gpu_memory_utilization
    budget = int(device.memory_bytes * share) - weights - overhead
    where = f"{device.name} ({device.memory_bytes / _GIB:.1f} GiB {'free' if on_cpu else f'x {share:g}'})"
    if budget <= 0:
        raise BadInput(
            f"the weights ({weights / _GIB:.2f} GiB) and {overhead / _GIB:.1f} GiB of working memory do not fit"
            f" on {where}",
            "free memory, quantise to fewer bits" + ("" if on_cpu else ", or raise --tensor-parallel-size"),
        )
    if size.kv_values_per_token is None:
        warnings.append("config.json does not tell the size of the key-value cache: whether it fits was not checked")
        return Allowed(
            asked or limit or 2048, dtype, size.weights_bytes, budget, None, weights + overhead, (*warnings,)
        )
    width = 1.0 if "fp8" in demand.kv_cache_dtype else DTYPE_BYTES[dtype]
    kv_shards = min(shards, size.kv_heads or 1)
    fits = tokens_that_fit(budget, size.kv_values_per_token, width, kv_shards)
    if (asked is not None and fits < asked) or fits < SHORTEST_CONTEXT:
        wanted = asked or SHORTEST_CONTEXT
        per_token = size.kv_values_per_token * width / kv_shards
        raise BadInput(
            f"a context of {wanted} tokens needs {wanted * per_token / _GIB:.2f} GiB of key-value cache"
            f" and {max(0, budget) / _GIB:.2f} GiB are left on {where}: {fits} tokens fit",
            f"use --max-model-len {fits}" if fits >= SHORTEST_CONTEXT else "free memory, or use a smaller model",
        )
    length = asked or min(limit or fits, fits)
    if asked is None and limit is not None and fits < limit:
        warnings.append(f"max_model_len is {length}, what fits; the model itself allows {limit}")
    per_token = int(size.kv_values_per_token * width / kv_shards)
    cache = min(budget, CPU_SEQUENCES * length * per_token) if on_cpu else budget
    needed = weights + overhead + (length + 2 * 16) * per_token
    return Allowed(length, dtype, size.weights_bytes, cache, per_token, needed, tuple(warnings))


def _method(config: dict[str, Any]) -> str:
    claim = config.get("quantization_config")
    return str(claim.get("quant_method", "unknown")) if isinstance(claim, dict) else "unknown"
