"""The program of an image: what is done with the weights, in a few named operations.

One template of a decoder layer stands for all layers: `{layer}` in the name of a weight or constant is the layer's
number. Buffers are fixed places in DDR. `seq` is the number of tokens of this call (a chunk of a prompt, or one), `pos`
the position of its first token, `last` its last token. docs/image-format.md says what each operation computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetool.errors import BadInput
from edgetool.fpga.model import BoardModel
from edgetool.fpga.plan import Buffer

FORMAT = "edgetool-vcu128-program"
VERSION = (1, 0)
NUMERICS = "et1"

OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "EMBED": (("table", "out"), ()),
    "RMSNORM": (("in", "out", "gamma", "eps", "width"), ("rows",)),
    "PERM": (("in", "out", "index"), ()),
    "MVM": (("in", "out", "weight", "bias"), ("residual", "mul", "rows")),
    "ROPE": (("in", "out", "heads", "head_dim", "rotary_dim", "style", "cos", "sin"), ()),
    "KV_WRITE": (("in", "cache", "kv_heads", "head_dim"), ()),
    "QK": (("in", "out", "heads", "kv_heads", "head_dim", "scale", "mask"), ()),
    "SOFTMAX": (("in", "out", "heads", "exp"), ()),
    "PV": (("in", "out", "heads", "kv_heads", "head_dim"), ()),
    "ACT": (("in", "out", "table"), ()),
    "LOGITS": (("in", "rows"), ()),
    "ARGMAX": (("in", "out", "rows"), ()),
}
"""Operation -> (fields it needs, fields it may have)."""

Op = dict[str, Any]


@dataclass(frozen=True)
class Gathers:
    """Where an activation order needs a gather at run time: none, one for all of a stage (shared) or one an operation.

    qkv, gate_up: `none`, `shared` or `each`. o: whether o_proj's input is gathered. down never needs one.
    """

    qkv: str = "none"
    o: bool = False
    gate_up: str = "none"


@dataclass(frozen=True)
class Program:
    """All operations: `prologue` once, `layer` for each of `layers`, `epilogue` once."""

    layers: int
    prologue: tuple[Op, ...]
    layer: tuple[Op, ...]
    epilogue: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    chunk_tokens: int
    rope: Mapping[str, Any]
    max_context: int

    def to_dict(self) -> dict[str, Any]:
        """The content of program.json."""
        return {
            "format": FORMAT,
            "version": list(VERSION),
            "numerics": NUMERICS,
            "symbols": {
                "seq": f"tokens of a call, 1 .. {self.chunk_tokens}",
                "pos": f"position of the call's first token; pos + seq is at most {self.max_context}",
                "last": "the call's last token, seq - 1",
                "layer": f"0 .. {self.layers - 1}",
            },
            "max_context": self.max_context,
            "chunk_tokens": self.chunk_tokens,
            "rope": dict(self.rope),
            "buffers": [
                {
                    "id": buffer.id,
                    "name": buffer.name,
                    "channels": buffer.channels,
                    "rows": buffer.rows,
                    "dtype": "float16",
                    "layout": "[channels/32, token, 32]",
                    "addr": buffer.addr,
                    "bytes": buffer.bytes,
                }
                for buffer in self.buffers
            ],
            "layers": self.layers,
            "prologue": list(self.prologue),
            "layer": list(self.layer),
            "epilogue": list(self.epilogue),
        }


def buffers_of(model: BoardModel, gathers: Gathers, max_context: int) -> list[tuple[str, int, str]]:
    """(name, channels, rows) of the activations that the operations pass on."""
    sizes = model.sizes
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    buffers = [
        ("x", sizes.hidden, "seq"),
        ("normed", sizes.hidden, "seq"),
        ("q", q, "seq"),
        ("k", kv, "seq"),
        ("v", kv, "seq"),
        ("scores", sizes.heads * max_context, "seq"),
        ("attention", q, "seq"),
        ("gate", sizes.ffn, "seq"),
        ("inner", sizes.ffn, "seq"),
        ("final", sizes.hidden, "last"),
        ("logits", sizes.vocab, "last"),
    ]
    if gathers.qkv != "none" or gathers.gate_up != "none":
        buffers.append(("gathered", sizes.hidden, "seq"))
    if gathers.o:
        buffers.append(("attention_gathered", q, "seq"))
    return buffers


def build_program(
    model: BoardModel, gathers: Gathers, buffers: Sequence[Buffer], chunk_tokens: int, max_context: int
) -> Program:
    """The operations of `model`."""
    head = {"heads": model.sizes.heads, "kv_heads": model.sizes.kv_heads, "head_dim": model.sizes.head_dim}
    layer = [
        _norm("x", "normed", "layers.{layer}.input_norm", model),
        *_products("normed", ("q", "k", "v"), gathers.qkv, "qkv"),
        *_head_norms(model),
        _rope("q", model.sizes.heads, model),
        _rope("k", model.sizes.kv_heads, model),
        _write("k", head),
        _write("v", head),
        {"op": "QK", "in": "q", "out": "scores", **head, "scale": model.sizes.head_dim**-0.5, "mask": "causal"},
        {"op": "SOFTMAX", "in": "scores", "out": "scores", "heads": model.sizes.heads, "exp": "table.exp"},
        {"op": "PV", "in": "scores", "out": "attention", **head},
        *_output(gathers.o),
        _norm("x", "normed", "layers.{layer}.post_norm", model),
        *_feed_forward(gathers.gate_up),
        _product("inner", "x", "down", residual="x"),
    ]
    epilogue = [
        {**_norm("x", "final", "final_norm", model), "rows": "last"},
        {"op": "MVM", "in": "final", "out": "logits", "weight": "lm_head", "bias": "lm_head.bias", "rows": "last"},
        {"op": "LOGITS", "in": "logits", "rows": "last"},
        {"op": "ARGMAX", "in": "logits", "out": "token", "rows": "last"},
    ]
    return Program(
        layers=model.sizes.layers,
        prologue=({"op": "EMBED", "table": "embedding", "out": "x"},),
        layer=tuple(layer),
        epilogue=tuple(epilogue),
        buffers=tuple(buffers),
        chunk_tokens=chunk_tokens,
        rope=model.rope.to_dict(),
        max_context=max_context,
    )


def check_program(document: Mapping[str, Any], weights: set[str], constants: set[str]) -> None:
    """Raise BadInput where program.json cannot be run: version, operations, fields, or names that are not there."""
    version = document.get("version")
    if document.get("format") != FORMAT or not isinstance(version, list) or version[:1] != [VERSION[0]]:
        raise BadInput(
            f"program.json is {document.get('format')!r} version {version}; this edgetool reads {FORMAT!r} version"
            f" {VERSION[0]}"
        )
    if document.get("numerics") != NUMERICS:
        raise BadInput(f"program.json asks for numerics {document.get('numerics')!r}; known is {NUMERICS!r}")
    layers = document.get("layers")
    if not isinstance(layers, int) or layers < 1:
        raise BadInput(f"program.json: layers is {layers!r}; must be a positive whole number")
    listed = document.get("buffers")
    if not isinstance(listed, list) or not all(isinstance(b, dict) and isinstance(b.get("name"), str) for b in listed):
        raise BadInput("program.json: buffers is not a list of records with names")
    buffers = {buffer["name"] for buffer in listed} | {"token"}
    known = {"weight": weights, "in": buffers, "out": buffers, "residual": buffers, "mul": buffers}
    known |= dict.fromkeys(("bias", "gamma", "index", "cos", "sin", "exp"), constants)
    for part, repeats in (("prologue", 1), ("layer", layers), ("epilogue", 1)):
        operations = document.get(part)
        if not isinstance(operations, list):
            raise BadInput(f"program.json: {part} is not a list of operations")
        for number, op in enumerate(operations):
            _check_op(f"program.json: {part}[{number}]", op, known, repeats, constants)


def _check_op(where: str, op: Any, known: Mapping[str, set[Any]], repeats: int, constants: set[str]) -> None:
    if not isinstance(op, dict) or not isinstance(op.get("op"), str) or op["op"] not in OPERATIONS:
        raise BadInput(f"{where}: unknown operation {op.get('op') if isinstance(op, dict) else op!r}")
    needed, optional = OPERATIONS[op["op"]]
    fields = set(op) - {"op"}
    if not set(needed) <= fields or not fields <= {*needed, *optional}:
        raise BadInput(f"{where}: {op['op']} has fields {sorted(fields)}; needed are {sorted(needed)}")
    for field, names in known.items():
        if field not in op:
            continue
        for layer in range(repeats):
            name = str(op[field]).replace("{layer}", str(layer))
            if name not in names:
                raise BadInput(f"{where}: {op['op']} names {field} {name!r}, which is not in the image")
    if op["op"] == "ACT" and str(op["table"]) not in constants:
        raise BadInput(f"{where}: ACT names table {op['table']!r}, which is not in the image")


def _norm(source: str, out: str, gamma: str, model: BoardModel) -> Op:
    width = model.sizes.hidden
    return {"op": "RMSNORM", "in": source, "out": out, "gamma": gamma, "eps": model.rms_norm_eps, "width": width}


def _head_norms(model: BoardModel) -> list[Op]:
    if not model.qk_norm:
        return []
    return [
        {
            "op": "RMSNORM",
            "in": part,
            "out": part,
            "gamma": f"layers.{{layer}}.{part}_norm",
            "eps": model.rms_norm_eps,
            "width": model.sizes.head_dim,
        }
        for part in "qk"
    ]


def _product(source: str, out: str, role: str, **extra: str) -> Op:
    weight = f"layers.{{layer}}.{role}"
    return {"op": "MVM", "in": source, "out": out, "weight": weight, "bias": f"{weight}.bias", **extra}


def _perm(source: str, out: str, role: str) -> Op:
    return {"op": "PERM", "in": source, "out": out, "index": f"layers.{{layer}}.{role}.order"}


def _products(source: str, roles: Sequence[str], gather: str, stage: str) -> list[Op]:
    operations: list[Op] = []
    if gather == "shared":
        operations.append(_perm(source, "gathered", stage))
    for role in roles:
        if gather == "each":
            operations.append(_perm(source, "gathered", role))
        operations.append(_product(source if gather == "none" else "gathered", role, role))
    return operations


def _rope(buffer: str, heads: int, model: BoardModel) -> Op:
    return {
        "op": "ROPE",
        "in": buffer,
        "out": buffer,
        "heads": heads,
        "head_dim": model.sizes.head_dim,
        "rotary_dim": model.rope.rotary_dim,
        "style": model.rope.style,
        "cos": "rope.cos",
        "sin": "rope.sin",
    }


def _write(buffer: str, head: Mapping[str, int]) -> Op:
    return {
        "op": "KV_WRITE",
        "in": buffer,
        "cache": buffer,
        "kv_heads": head["kv_heads"],
        "head_dim": head["head_dim"],
    }


def _output(gathered: bool) -> list[Op]:
    if not gathered:
        return [_product("attention", "x", "o", residual="x")]
    return [
        _perm("attention", "attention_gathered", "o"),
        _product("attention_gathered", "x", "o", residual="x"),
    ]


def _feed_forward(gather: str) -> list[Op]:
    """gate, ACT, then up whose result is multiplied with ACT's, as the board's MVM_BN_RES does."""
    act = {"op": "ACT", "in": "gate", "out": "gate", "table": "table.silu"}
    first: list[Op] = (
        [] if gather == "none" else [_perm("normed", "gathered", "gate" if gather == "each" else "gate_up")]
    )
    source = "normed" if gather == "none" else "gathered"
    second = [_perm("normed", "gathered", "up")] if gather == "each" else []
    return [*first, _product(source, "gate", "gate"), act, *second, _product(source, "inner", "up", mul="gate")]
