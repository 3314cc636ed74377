"""What a kind of numerics is to the simulator: it turns operations of the program into steps that work on a call.

`et1` (exact_*.py) computes docs/image-format.md to the bit; `fast` (fast_*.py) computes the same model in float32. The
engine knows neither: it binds the program, asks for steps, and runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from edgetool.fpga.simulator.traffic import Traffic

Array = npt.NDArray[Any]
NumericsName = Literal["et1", "fast"]
Wanted = Literal["last", "all", "none"]


class MatrixKernel(Protocol):
    """One matrix, ready to be multiplied with. x: [tokens, K], fp16 in `et1`. Returns float32 [tokens, N], no bias."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Int4Matrix:
    """A 4-bit matrix as the image has it, rows in order and padding included.

    codes: int8 [Np, Kp], q in -8..7. scales: float16 [Np, ceil(Kp / group)]. offsets: as scales, or None.
    read_bytes_per_pc: int64 [32], what reading it took from each pseudo-channel.
    """

    name: str
    role: str
    n: int
    k: int
    group: int
    codes: Array
    scales: Array
    offsets: Array | None
    read_bytes_per_pc: Array


@dataclass(frozen=True)
class HalfMatrix:
    """A matrix of plain fp16. values: float16 [Np, Kp], padding included; the rest as in Int4Matrix."""

    name: str
    role: str
    n: int
    k: int
    values: Array
    read_bytes_per_pc: Array


class Resources(Protocol):
    """What an image holds, read from its bytes when asked for. Nothing is kept: who needs it twice keeps it."""

    def matrix(self, name: str) -> Int4Matrix | HalfMatrix: ...

    def constant(self, name: str) -> Array:
        """An array of DDR in the dtype and shape of its record."""
        ...

    def bias(self, name: str) -> Array:
        """float16 [Np] of a bias constant."""
        ...

    def embedding(self) -> Array:
        """float16 [vocab, hidden], mapped."""
        ...


@dataclass(frozen=True)
class BoundOp:
    """An operation of the program with its names made whole, for one layer.

    kind: EMBED, RMSNORM ... fields: as in program.json (`in`, `out`, `weight` ...), `{layer}` filled in.
    part: prologue, layer or epilogue. layer: 0 outside of layers. number: its place in its part.
    """

    kind: str
    part: str
    layer: int
    number: int
    fields: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For messages and traces: `layers.3.MVM q`."""
        where = f"layers.{self.layer}." if self.part == "layer" else ""
        return f"{where}{self.kind} {self.fields.get('out', self.fields.get('in', ''))}"


class Snapshot(Protocol):
    """Keys and values of a sequence's first tokens, to be kept."""

    @property
    def tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class KvStore(Protocol):
    """Keys and values of one sequence, of all layers. How steps write and read them is their numerics' own business."""

    def snapshot(self, tokens: int) -> Snapshot:
        """A copy of the first `tokens` positions."""
        ...

    def restore(self, snapshot: Any, tokens: int) -> None:
        """Fill the first `tokens` positions from a snapshot that has at least as many."""
        ...


@dataclass
class Call:
    """Some tokens on their way through the program: at most `chunk_tokens`, of one sequence.

    ids: int64 [tokens]. position: of the first one. wanted: whether the epilogue runs for the last token or for all.
    buffers: name -> activations [rows, channels]; scores are [heads, tokens, keys].
    overflows: label of an operation -> values that became infinite or NaN in it.
    """

    ids: Tensor
    position: int
    cache: Any
    traffic: Traffic
    wanted: Wanted = "last"
    buffers: dict[str, Tensor] = field(default_factory=dict)
    overflows: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[0])

    def rows(self, buffer: str, rows: str | None) -> Tensor:
        """A buffer's rows that an operation works on: all, or for `rows` "last" those that are wanted."""
        values = self.buffers[buffer]
        if rows == "last" and self.wanted == "last":
            return values[-1:]
        return values


@dataclass(frozen=True)
class Step:
    """One or several operations as a function of a call. op: the (last) one, whose `out` holds the result."""

    op: BoundOp
    run: Callable[[Call], None]


class Numerics(Protocol):
    """A way to compute. `compile` may fuse neighbouring operations of one layer; with `traced` it must not."""

    name: NumericsName
    logits_dtype: torch.dtype

    def compile(self, ops: Sequence[BoundOp], resources: Resources, traced: bool) -> list[Step]: ...

    def new_cache(self) -> KvStore:
        """An empty cache for a sequence of the image's whole context."""
        ...

    def threads(self, tokens: int, available: int) -> int:
        """How many of torch's threads a call of some tokens should use: where work is little, waiting costs more."""
        ...


class Trace(Protocol):
    """Is told of every operation, with its result. It must not change it."""

    def step(self, op: BoundOp, call: Call, result: Tensor | None, seconds: float) -> None:
        """result: the buffer `out` (of LOGITS: `in`; of KV_WRITE: what was written)."""
        ...


@dataclass(frozen=True)
class SimulatorFacts:
    """What an image says about itself to those who use it."""

    family: str
    vocab: int
    hidden: int
    layers: int
    max_context_tokens: int
    chunk_tokens: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    numerics: NumericsName
    int4_encoding: str
    profile: str
    tokenizer_files: tuple[str, ...]
