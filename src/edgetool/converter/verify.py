"""After writing: both sides are read again, by another reader than the one that converted, and held together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgetool.checkpoints.checkpoint import Checkpoint, read_json_object
from edgetool.checkpoints.config_claims import claimed_quantization
from edgetool.checkpoints.detect import detect
from edgetool.checkpoints.formats import FORMATS
from edgetool.converter.compare import (
    UNCHANGED,
    Difference,
    Order,
    compare_linears,
    compare_values,
    compare_weights,
    crc32,
)
from edgetool.converter.sides import CheckpointSide, Side
from edgetool.errors import BadInput, Stopped, VerificationFailed
from edgetool.progress import NullProgress, Progress

SAMPLE_EVERY = 8
SAMPLE_AT_LEAST = 4

_HINT = "run it again; if the same tensor is wrong again, please report it, otherwise doubt the disk or the memory"

FLOATS = {"fp16": ("F16", "float16"), "bf16": ("BF16", "bfloat16")}
"""16-bit target -> safetensors' dtype and config.json's."""


@dataclass(frozen=True)
class Meant:
    """What the output must be, beyond holding the source's weights.

    target: a name of FORMATS, fp16, bf16 or gguf. linears: quantised linear -> its (bits, group_size) in the output.
    order: tensor or module -> whose channels were reordered (--fold-act-order). crc32: module -> CRC-32 of the float32
    weights it must have, where those are not the source's (--requant). rounding: other tensors may have been rounded.
    """

    target: str
    linears: Mapping[str, tuple[int, int]]
    order: Mapping[str, Order] = field(default_factory=dict)
    crc32: Mapping[str, int] = field(default_factory=dict)
    rounding: bool = False


@dataclass(frozen=True)
class Verified:
    """How many tensors of the output were compared, and how many of them hold what they must."""

    compared: int
    equal: int


Result = list[tuple[str, Difference | None]]
"""Names of tensors of the output, each with what is wrong with it."""


def open_side(path: Path, format_name: str, linears: Mapping[str, tuple[int, int]], dtype: str = "F16") -> Side:
    """A checkpoint directory or a GGUF file as verification reads it.

    format_name decides GPTQ's version. linears: the quantised linears, each with its (bits, group_size). dtype: F16,
    BF16 or F32, into which other tensors are rounded that are quantised too (a GGUF file's embeddings).
    Raises BadInput for what cannot be read, MissingDependency for GGUF without the `gguf` package.
    """
    if path.is_file():
        from edgetool.converter.gguf_side import GgufSide

        return GgufSide.open(path, linears, dtype)
    return CheckpointSide.of(Checkpoint.open(path), format_name, linears)


def verify(
    source: Side,
    output: Path,
    meant: Meant,
    *,
    sample: bool = False,
    threads: int = 1,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Verified:
    """Read `output` again and hold every tensor of it against `source`, as `open_side` reads that.

    sample: of the quantised linears only the first, the last and every eighth; of all others everything.
    Raises VerificationFailed naming the first tensor that is wrong and where in it, or what is missing, too much, or
    said wrongly by config.json; BadInput where the source cannot be read; Stopped when a stop was requested.
    """
    with _blaming_output():
        made = _opened(output, meant)
    _compare_names(source, made, meant)
    tasks = _tasks(source, made, meant, sample)
    results: Result = []
    pool = ThreadPoolExecutor(max(1, threads), "verify")
    try:
        with (progress or NullProgress()).task("verify", len(tasks), "tensor") as task:
            for result in pool.map(lambda work: work(), tasks):
                results += result
                task.advance()
                if stop_requested():
                    raise Stopped("stopped on request: everything is written and not yet verified")
    finally:
        pool.shutdown(cancel_futures=True)
    verified = Verified(len(results), sum(wrong is None for _, wrong in results))
    for name, wrong in results:
        if wrong is not None:
            counts = {"tensors_compared": verified.compared, "tensors_equal": verified.equal}
            raise VerificationFailed(f"the output is wrong: {name} {wrong.text}", _HINT, details=counts)
    return verified


def _opened(output: Path, meant: Meant) -> Side:
    """The output's side, after its configuration was held against its tensors."""
    if meant.target == "gguf":
        files = sorted(output.glob("*.gguf"))
        if len(files) != 1:
            raise VerificationFailed(f"the output holds {len(files)} GGUF files, not one")
        return open_side(files[0], "gguf", meant.linears)
    checkpoint = Checkpoint.open(output)
    claim = claimed_quantization(checkpoint.config)
    if meant.target in FLOATS:
        if claim is not None:
            raise VerificationFailed(
                "the output's config.json has a quantization_config, and nothing in it is quantised"
            )
        dtype = FLOATS[meant.target][1]
        for key in ("dtype", "torch_dtype"):
            if checkpoint.config.get(key, dtype) != dtype:
                raise VerificationFailed(f"the output's config.json says {key} {checkpoint.config[key]}, not {dtype}")
        return open_side(output, meant.target, meant.linears)
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config, written_as=_gptq(meant.target))
    if found is None or found.format != meant.target:
        raise VerificationFailed(f"the output's tensors are {found.format if found else 'plain'}, not {meant.target}")
    if found.disagreements:
        raise VerificationFailed(f"the output contradicts itself: {'; '.join(found.disagreements)}")
    side_config = FORMATS[meant.target].side_config
    if side_config is not None and read_json_object(output / side_config) != claim:
        raise VerificationFailed(f"the output's {side_config} is not what config.json says")
    return open_side(output, meant.target, meant.linears)


def _gptq(target: str) -> str | None:
    return target if target in ("gptq", "gptq_v2") else None


def _compare_names(source: Side, made: Side, meant: Meant) -> None:
    """Both have the same linears and the same other tensors; where nothing is quantised, weights are in their place."""
    plain = set(source.plain)
    if meant.linears:
        for module in sorted(set(source.modules) ^ set(made.modules)):
            wrong = "should not be quantised" if module in made.modules else "is not quantised in the output"
            raise VerificationFailed(f"{module} {wrong}")
    else:
        plain |= {f"{module}.weight" for module in source.modules}
    for name in sorted(plain ^ set(made.plain)):
        raise VerificationFailed(f"{name} {'should not be in' if name in made.plain else 'is missing in'} the output")


def _tasks(source: Side, made: Side, meant: Meant, sample: bool) -> list[Callable[[], Result]]:
    modules = list(source.modules)
    if sample:
        step = max(1, min(SAMPLE_EVERY, len(modules) // SAMPLE_AT_LEAST))
        modules = [module for index, module in enumerate(modules) if index % step == 0 or index == len(modules) - 1]

    def linear(module: str) -> Result:
        given = source.linear(module)
        order = meant.order.get(module, UNCHANGED)
        if module not in made.modules:
            name = f"{module}.weight"
            with _blaming_output():
                return [(name, compare_weights(given, made.plain[name], FLOATS[meant.target][0], order))]
        parts = made.modules[module]
        with _blaming_output():
            written = made.linear(module)
            if module in meant.crc32:
                same = crc32(written) == meant.crc32[module]
                wrong = None if same else Difference(("codes",), "does not hold the weights that were meant")
            else:
                wrong = compare_linears(given, written, order)
        blamed = [name for part, name in parts.items() if wrong is not None and part in wrong.parts]
        blamed = blamed or ([next(iter(parts.values()))] if wrong is not None else [])
        return [(name, wrong if name in blamed else None) for name in parts.values()]

    def other(name: str) -> Result:
        order = meant.order.get(name, UNCHANGED)
        with _blaming_output():
            return [(name, compare_values(source.plain[name], made.plain[name], order, rounding=meant.rounding))]

    work: list[Callable[[], Result]] = [partial(linear, module) for module in modules]
    return work + [partial(other, name) for name in source.plain]


@contextmanager
def _blaming_output() -> Iterator[None]:
    """Readers blame their input, which here is what has just been written."""
    try:
        yield
    except BadInput as error:
        raise VerificationFailed(f"the output is damaged: {error.message}") from error
