"""The program bound to its image: names made whole for every layer, and every shape checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetool.errors import BadInput
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.interfaces import BoundOp

TABLE_ENTRIES = 1 << 16


@dataclass(frozen=True)
class KvShape:
    """Of the cache: what every KV_WRITE, QK and PV of a program must agree on."""

    kv_heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class BoundProgram:
    """body: prologue and all layers. epilogue: from the last norm to the logits. logits: the buffer of LOGITS."""

    body: tuple[BoundOp, ...]
    epilogue: tuple[BoundOp, ...]
    logits: str
    kv: KvShape
    layers: int
    chunk_tokens: int
    max_context_tokens: int


def bind(image: Image) -> BoundProgram:
    """Raises BadInput, naming the operation, where program.json asks for what its image cannot give."""
    where = str(image.directory / "program.json")
    binder = _Binder(image, where)
    program = image.program
    for key in ("chunk_tokens", "max_context"):
        if type(program.get(key)) is not int or program[key] < 1:
            raise BadInput(f"{where}: {key} is {program.get(key)!r}; must be a positive whole number")
    if program["max_context"] > image.manifest["kv"]["capacity_tokens"]:
        raise BadInput(
            f"{where}: max_context {program['max_context']} is over the KV cache's"
            f" {image.manifest['kv']['capacity_tokens']} tokens"
        )
    body = binder.part("prologue", [0])
    body += binder.part("layer", range(program["layers"]))
    epilogue = binder.part("epilogue", [0])
    handed = [op.fields["in"] for op in epilogue if op.kind == "LOGITS"]
    if len(handed) != 1 or binder.kv is None:
        raise BadInput(f"{where}: the program must have one LOGITS in its epilogue, and a KV cache in its layers")
    return BoundProgram(
        tuple(body),
        tuple(epilogue),
        handed[0],
        binder.kv,
        program["layers"],
        program["chunk_tokens"],
        program["max_context"],
    )


@dataclass
class _Binder:
    """Walks over the program once, in the order in which it runs."""

    image: Image
    where: str
    kv: KvShape | None = None
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.constants = self.image.constants
        self.tensors = self.image.tensors
        self.channels: dict[str, int] = {}
        for buffer in self.image.program.get("buffers", []):
            name, channels = buffer.get("name"), buffer.get("channels")
            if type(channels) is not int or channels < 1:
                raise BadInput(f"{self.where}: buffer {name!r} has {channels!r} channels")
            self.channels[name] = channels

    def part(self, part: str, layers: Any) -> list[BoundOp]:
        bound = []
        for layer in layers:
            for number, op in enumerate(self.image.program[part]):
                fields = {
                    key: value.replace("{layer}", str(layer)) if isinstance(value, str) else value
                    for key, value in op.items()
                    if key != "op"
                }
                one = BoundOp(op["op"], part, layer, number, fields)
                try:
                    self._check(one)
                except (KeyError, TypeError, ValueError) as error:
                    raise self._wrong(one, f"a field is of a wrong kind: {error}") from None
                bound.append(one)
        return bound

    def _wrong(self, op: BoundOp, what: str) -> BadInput:
        return BadInput(f"{self.where}: {op.part}[{op.number}] {op.kind}: {what}", "compile the checkpoint again")

    def _check(self, op: BoundOp) -> None:
        for name in ("in", "residual", "mul"):
            if name in op.fields and op.fields[name] not in self.written:
                raise self._wrong(op, f"reads {op.fields[name]!r}, which no operation before it has written")
        rows = op.fields.get("rows", "seq")
        if rows not in ("seq", "last") or (rows == "last" and op.part != "epilogue"):
            raise self._wrong(op, f"rows is {rows!r}; must be 'seq', or 'last' in the epilogue")
        getattr(self, f"_{op.kind.lower()}")(op, op.fields)
        if "out" in op.fields:
            self.written.add(op.fields["out"])

    def _same(self, op: BoundOp, *sizes: tuple[str, int]) -> None:
        """Named sizes that must all be equal."""
        if len({size for _, size in sizes}) > 1:
            raise self._wrong(op, "sizes do not fit: " + ", ".join(f"{name} {size}" for name, size in sizes))

    def _positive(self, op: BoundOp, *names: str) -> list[int]:
        values = [op.fields[name] for name in names]
        for name, value in zip(names, values, strict=True):
            if type(value) is not int or value < 1:
                raise self._wrong(op, f"{name} is {value!r}; must be a positive whole number")
        return values

    def _number(self, op: BoundOp, name: str) -> None:
        value = op.fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
            raise self._wrong(op, f"{name} is {value!r}; must be a number of at least 0")

    def _shape(self, op: BoundOp, name: str, dtype: str, *shape: int) -> None:
        record = self.constants[op.fields[name]]
        if record["dtype"] != dtype or list(record["shape"]) != list(shape):
            raise self._wrong(
                op, f"{name} {op.fields[name]!r} is {record['dtype']} {record['shape']}; must be {dtype} {list(shape)}"
            )

    def _ends(self, op: BoundOp) -> tuple[int, int]:
        """Channels of `in` and `out`."""
        return self.channels[op.fields["in"]], self.channels[op.fields["out"]]

    def _embed(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        if fields["table"] != "embedding":
            raise self._wrong(op, f"table is {fields['table']!r}; must be 'embedding'")
        width = self.image.manifest["embedding"]["shape"][1]
        self._same(op, ("embedding", width), ("out", self.channels[fields["out"]]))

    def _rmsnorm(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        source, out = self._ends(op)
        (width,) = self._positive(op, "width")
        self._number(op, "eps")
        self._same(op, ("in", source), ("out", out), ("runs of width", source // width * width))
        self._shape(op, "gamma", "float16", 2, width)

    def _perm(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        source, out = self._ends(op)
        self._same(op, ("in", source), ("out", out))
        self._shape(op, "index", "uint32", source)
        largest = int(self.image.constant(fields["index"]).max())
        if largest >= source:
            raise self._wrong(op, f"index {fields['index']!r} names channel {largest} of {source}")

    def _mvm(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        source, out = self._ends(op)
        record = self.tensors[fields["weight"]]
        self._same(op, ("in", source), ("K", record["K"]))
        extra = [(name, self.channels[fields[name]]) for name in ("residual", "mul") if name in fields]
        self._same(op, ("out", out), ("N", record["N"]), *extra)
        self._shape(op, "bias", "int32", record["Np"])

    def _rope(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        source, out = self._ends(op)
        heads, head_dim, rotary_dim = self._positive(op, "heads", "head_dim", "rotary_dim")
        self._same(op, ("in", source), ("out", out), ("heads x head_dim", heads * head_dim))
        if fields["style"] not in ("half", "interleaved") or rotary_dim % 2 or rotary_dim > head_dim:
            raise self._wrong(op, f"style {fields['style']!r} with rotary_dim {rotary_dim} of head_dim {head_dim}")
        for name in ("cos", "sin"):
            rows = self.constants[fields[name]]["shape"][0]
            if rows < self.image.program["max_context"]:
                raise self._wrong(op, f"{name} has {rows} positions, fewer than max_context")
            self._shape(op, name, "float16", rows, rotary_dim // 2)

    def _kv_write(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        self._cache(op)
        if fields["cache"] not in ("k", "v") or op.part != "layer":
            raise self._wrong(op, f"cache is {fields['cache']!r}; must be 'k' or 'v', in a layer")
        self._same(op, ("in", self.channels[fields["in"]]), ("kv_heads x head_dim", self._kv().channels))

    def _qk(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        heads = self._heads(op)
        self._number(op, "scale")
        if fields["mask"] != "causal":
            raise self._wrong(op, f"mask is {fields['mask']!r}; must be 'causal'")
        self._same(op, ("in", self.channels[fields["in"]]), ("heads x head_dim", heads * self._kv().head_dim))

    def _softmax(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        self._positive(op, "heads")
        self._shape(op, "exp", "float16", TABLE_ENTRIES)

    def _pv(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        heads = self._heads(op)
        self._same(op, ("out", self.channels[fields["out"]]), ("heads x head_dim", heads * self._kv().head_dim))

    def _act(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        source, out = self._ends(op)
        self._same(op, ("in", source), ("out", out))
        self._shape(op, "table", "float16", TABLE_ENTRIES)

    def _logits(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        vocab = self.image.manifest["embedding"]["shape"][0]
        self._same(op, ("in", self.channels[fields["in"]]), ("vocabulary", vocab))

    def _argmax(self, op: BoundOp, fields: Mapping[str, Any]) -> None:
        self.channels.setdefault(fields["out"], 1)

    def _heads(self, op: BoundOp) -> int:
        self._cache(op)
        (heads,) = self._positive(op, "heads")
        if heads % self._kv().kv_heads:
            raise self._wrong(op, f"heads {heads} is no multiple of kv_heads {self._kv().kv_heads}")
        return heads

    def _cache(self, op: BoundOp) -> None:
        shape = KvShape(*self._positive(op, "kv_heads", "head_dim"))
        if self.kv is None:
            self.kv = shape
            record = self.image.manifest["kv"]
            region = record["capacity_tokens"] * shape.channels * 2
            if (
                shape.channels % 32
                or region != record["bytes_per_pc_region"] * 32
                or record["bytes_per_pc_layer"] * 16 != region
            ):
                raise self._wrong(op, f"the manifest's KV cache is not that of {shape.channels} channels")
        elif shape != self.kv:
            raise self._wrong(op, f"{shape.kv_heads} x {shape.head_dim} is not the KV cache's shape")

    def _kv(self) -> KvShape:
        assert self.kv is not None
        return self.kv
